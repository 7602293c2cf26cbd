"""EfficientNet-Lite0, LPIPS and SSIM against what torch implementations compute; what the discriminator promises."""

import pathlib
import pickle
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff import images
from jaxdiff.errors import ConfigError
from jaxdiff.models import efficientnet
from jaxdiff.models.discriminator import PatchDiscriminator, patches
from jaxdiff.models.perceptual import VGG_SLICES, load_perceptual

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def test_efficientnet():
    golden = np.load(GOLDEN / "effnet_lite0.npz")
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(efficientnet.apply)(efficientnet.load(), images.to_unit(golden["image_224"]))
    np.testing.assert_allclose(outputs.features, golden["features"], atol=1e-4)
    np.testing.assert_allclose(outputs.logits, golden["logits"], atol=1e-4)
    assert outputs.logits.argmax(-1).tolist() == [285, 967, 540]
    assert [m.shape[1:] for m in outputs.maps] == [
        (112, 112, 16),
        (56, 56, 24),
        (28, 28, 40),
        (14, 14, 112),
        (7, 7, 320),
    ]


def pair():
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    return a, np.clip(a + 0.3 * rng.standard_normal(a.shape), -1, 1).astype(np.float32)


def test_ssim():
    """As scikit-image 0.26's structural_similarity(win_size=11, gaussian_weights=True, use_sample_covariance=False,
    data_range=2, channel_axis=-1)."""
    a, b = pair()
    np.testing.assert_allclose(images.ssim(a, b), [0.6577901, 0.6055674], atol=1e-6)
    np.testing.assert_allclose(images.ssim(a[:, :8, :8], a[:, :8, :8]), 1, atol=1e-6)


def lpips_weights():
    """Tensors of the lpips package's LPIPS(net="vgg"), as functions of their names."""
    widths = (3, 64, 64, 128, 128, *[256] * 3, *[512] * 6)
    shapes, k = {}, 0
    for i, numbers in enumerate(VGG_SLICES, 1):
        for n in numbers:
            shapes[f"net.slice{i}.{n}.weight"] = (widths[k + 1], widths[k], 3, 3)
            shapes[f"net.slice{i}.{n}.bias"] = (widths[k + 1],)
            k += 1
        shapes[f"lin{i - 1}.model.1.weight"] = (1, widths[k], 1, 1)
    tensors = {}
    for name, shape in shapes.items():
        n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])) if n.ndim == 4 else 0.1)
        tensors[name] = np.abs(n) * np.float32(0.1) if name.startswith("lin") else n * scale
    return tensors


def test_lpips(tmp_path):
    """As lpips 0.1.4 and torch 2.14 with these weights."""
    tensors = lpips_weights()
    save_file(tensors, tmp_path / "lpips.safetensors")
    perceptual = load_perceptual(str(tmp_path / "lpips.safetensors"))
    with jax.default_matmul_precision("highest"):
        distance = jax.jit(perceptual.distance)(perceptual.params, *pair())
    assert perceptual.name == "lpips_vgg"
    np.testing.assert_allclose(distance, [0.03023749, 0.02914898], rtol=1e-4)
    del tensors["lin2.model.1.weight"]
    save_file(tensors, tmp_path / "lpips.safetensors")
    with pytest.raises(ConfigError, match="config.autoencoder.lpips = .*: misses lin2.model.1.weight of LPIPS"):
        load_perceptual(str(tmp_path / "lpips.safetensors"))
    (tmp_path / "lpips.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="^config.autoencoder.lpips: .* holds no state dict"):
        load_perceptual(str(tmp_path / "lpips.pth"))


def test_distance_on_efficientnet():
    perceptual = load_perceptual("")
    distance = jax.jit(perceptual.distance)
    a, b = pair()
    assert perceptual.name == "effnet_lite0_distance"
    noisier = np.clip(b + 3 * (b - a), -1, 1)
    same, near, far = (float(distance(perceptual.params, a, x)[0]) for x in (a, b, noisier))
    assert same == 0 and 0.05 < near < far < 4


@pytest.mark.parametrize(("layers", "seen"), [(1, 16), (2, 34), (3, 70)])
def test_what_a_score_of_the_discriminator_sees(layers, seen):
    model = PatchDiscriminator(4, layers)
    size = 128
    x = jnp.zeros((1, size, size, 3))
    params = model.init(jax.random.key(0), x)
    scores = jax.eval_shape(model.apply, params, x)
    assert scores.shape == (1, patches(size, layers), patches(size, layers))

    # GroupNorm carries a little of every pixel everywhere, so that the convolutions alone are asked.
    def convolutions(image):
        h = image
        for i in range(layers + 1):
            kernel = params["params"][f"conv{i}"]["kernel"]
            stride = 2 if i < layers else 1
            h = jax.lax.conv_general_dilated(
                h, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        kernel = params["params"]["conv_out"]["kernel"]
        return jax.lax.conv_general_dilated(h, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    middle = scores.shape[1] // 2
    touched = jax.jit(jax.grad(lambda image: convolutions(image)[0, middle, middle, 0]))(x)
    assert (jnp.abs(touched).sum((0, 2, 3)) > 0).sum() == seen


def test_a_score_is_of_its_image_alone():
    model = PatchDiscriminator(4, 1)
    x = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), x)
    np.testing.assert_allclose(model.apply(params, x)[1:2], model.apply(params, x[1:2]), atol=1e-6)
