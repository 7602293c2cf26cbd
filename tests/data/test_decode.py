"""Every kind of image file becomes the RGB that a viewer would show, or is refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.decode import Unreadable, center_crop, decode_into

SIZE = 16


def decoded(data, size=SIZE):
    out = np.full((size, size, 3), 7, np.uint8)
    decode_into(data, out)
    return out


def file(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width=SIZE, height=SIZE, seed=0):
    """Smooth colours, which JPEG keeps."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_are_read_to_the_last_bit(format):
    image = picture()
    options = {"lossless": True} if format == "WEBP" else {}
    assert (decoded(file(image, format, **options)) == np.asarray(image)).all()


@pytest.mark.parametrize("size", [(SIZE, SIZE), (61, 45), (200, 70)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}], ids=str)
def test_jpeg_is_what_pillow_makes_of_it(size, options):
    data = file(picture(*size), "JPEG", **options)
    assert (decoded(data) == center_crop(Image.open(io.BytesIO(data)), SIZE)).all()


def test_grey_jpeg_and_png():
    image = picture().convert("L")
    assert (decoded(file(image)) == np.asarray(image)[..., None]).all()
    data = file(image, "JPEG")
    assert (decoded(data) == np.asarray(Image.open(io.BytesIO(data)))[..., None]).all()


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    expected = np.round(ramp / 257).astype(np.uint8)
    assert (decoded(file(Image.fromarray(ramp))) == expected[..., None]).all()


def test_sixteen_bit_colour():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = np.linspace(0, 65535, SIZE * SIZE * 3).astype(">u2").reshape(SIZE, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    expected = (values / 257).reshape(SIZE, SIZE, 3)
    assert np.abs(decoded(data) - expected).max() <= 1


def test_cmyk():
    data = file(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "JPEG")
    assert np.abs(decoded(data).astype(int) - [255, 0, 0]).max() < 4


def test_palette():
    image = picture().quantize(16)
    assert (decoded(file(image)) == np.asarray(image.convert("RGB"))).all()


def test_transparent_is_on_white():
    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, SIZE, SIZE // 2))
    out = decoded(file(image))
    assert (out[: SIZE // 2] == [200, 0, 0]).all() and (out[SIZE // 2 :] == 255).all()


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([10, 20, 30, 0, 0, 0])
    assert (decoded(file(image, transparency=1)) == 255).all()


def test_first_frame_of_an_animation():
    first, second = Image.new("RGB", (SIZE, SIZE), "red"), Image.new("RGB", (SIZE, SIZE), "blue")
    for format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = file(first, format, save_all=True, append_images=[second], duration=100, **options)
        assert (decoded(data) == [255, 0, 0]).all(), format


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_rotated_as_exif_says(format):
    image = Image.new("RGB", (SIZE, SIZE))
    image.paste((255, 0, 0), (0, 0, SIZE, SIZE // 2))  # upper half red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    out = decoded(file(image, format, exif=exif, **options)).astype(int)
    assert np.abs(out[:, SIZE // 2 :] - [255, 0, 0]).max() < 4 and np.abs(out[:, : SIZE // 2]).max() < 4


def test_one_pixel():
    assert (decoded(file(Image.new("RGB", (1, 1), (1, 2, 3)))) == [1, 2, 3]).all()


def bomb():
    """A PNG of 20,000 x 20,000 pixels; its lines compress to half a megabyte."""
    return file(Image.new("1", (20_000, 20_000)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an image"),
        (b"\0" * 1000, "not an image"),
        (b"<html>404</html>", "not an image"),
        (file(picture(64, 64), "JPEG")[:-200], "truncated"),
        (file(picture(64, 64), "JPEG")[:30], "."),
        (file(picture(64, 64))[:-200], "."),
        (file(picture(64, 64), "WEBP")[:-20], "."),
        (bomb(), "pixels"),
        (file(Image.new("RGB", (60_000, 1))), "strip"),
        (file(picture(), "TIFF"), "not an image"),
    ],
    ids=["empty", "zeros", "html", "cut JPEG", "JPEG head", "cut PNG", "cut WebP", "bomb", "strip", "TIFF"],
)
def test_refused(data, why):
    with pytest.raises(Unreadable, match=why):
        decoded(data, 128 if why == "strip" else SIZE)


def test_large_jpeg_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("simplejpeg.decode_jpeg", None)  # whoever calls it fails
    data = bytearray(file(picture(), "JPEG"))
    at = data.index(b"\xff\xc0")  # frame header: length, precision, height, width
    data[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(Unreadable, match="pixels"):
        decoded(bytes(data))


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (16, 16), (5, 9), (33, 32)])
def test_center_crop_keeps_the_middle(size):
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, size[0]).astype(np.uint8)[None]
    out = center_crop(Image.fromarray(ramp), 16)
    assert out.shape == (16, 16, 3)
    assert abs(float(out[..., 0].mean()) - 127.5) < 8


def test_center_crop_is_adm_s():
    """Its code, in other words: halve with a box filter while twice as large, then bicubic, then the middle."""
    image = picture(151, 97)
    half = image.resize((75, 48), Image.Resampling.BOX)
    half = half.resize((37, 24), Image.Resampling.BOX)
    last = half.resize((round(37 * 16 / 24), 16), Image.Resampling.BICUBIC)
    left = (last.width - 16) // 2
    assert (center_crop(image, 16) == np.asarray(last)[:, left : left + 16]).all()
