"""From the bytes of an image file to uint8 RGB of the size that is trained on."""

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # recognised by content, whatever the file is called
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
MAX_PIXELS = 2 * 89_478_485  # where Pillow calls an image a decompression bomb
PROCEDURE = "short side to size by box halvings and bicubic, centre square (ADM)"


class Unreadable(ValueError):
    """An image that cannot be converted; the message says why."""


def decode_into(data: bytes, out: UInt8[np.ndarray, "size size 3"]) -> None:
    """Decode an image file's bytes to RGB, cropped and resized to the square `out` as `center_crop` does.

    What the EXIF orientation says is applied, transparent pixels are put on white, 16 bits a channel scaled to 8, and
    of an animation the first frame is taken. Raises: Unreadable.
    """
    size = len(out)
    # libjpeg-turbo itself: the pixels that Pillow gives, in half the time, and without the interpreter's lock.
    if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("Gray", "YCbCr", "RGB") and height * width <= MAX_PIXELS:
                if height == width == size:
                    simplejpeg.decode_jpeg(data, "RGB", buffer=out)
                else:
                    out[...] = center_crop(Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")), size)
                return
        except ValueError:
            pass  # it is strict: Pillow knows what can be recovered
    out[...] = center_crop(open_image(data), size)


def open_image(data: bytes) -> Image.Image:
    """An image file's bytes as RGB of the image's own size, otherwise as in `decode_into`. Raises: Unreadable."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise Unreadable(f"{file.width} x {file.height} pixels are more than {MAX_PIXELS:,}")
            image = ImageOps.exif_transpose(file)
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise all sorts of things at broken files
        raise Unreadable(f"{type(error).__name__}: {error}") from None
    if image.mode.startswith("I;16"):  # Pillow would clip where it should scale
        image = Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    if image.mode not in MODES:
        raise Unreadable(f"pixels of mode {image.mode} have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the short side to `size` (halvings with a box filter, then bicubic) and crop the centre square.

    Raises: Unreadable when the image is so long a strip that enlarging it would fill the memory.
    Source: the preprocessing of ADM (arXiv 2105.05233), on whose reference statistics FID is compared.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    if width * height > MAX_PIXELS:
        raise Unreadable(f"{image.width} x {image.height} pixels: too long a strip")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
