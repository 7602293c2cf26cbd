"""The FID's InceptionV3 and both ways of resizing against what torch and TensorFlow implementations compute."""

import pathlib
import zlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from jaxdiff.errors import ConfigError
from jaxdiff.evaluation import extractors
from jaxdiff.models import inception
from jaxdiff.models.resizing import RESIZES, as_pytorch_fid, as_tf1

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FLAG = "config.eval.inception"


def value(name, shape):
    """The tensors that the golden outputs were recorded with, as functions of their names."""
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("conv.weight") or name == "fc.weight":
        return n * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.1) * n
    return np.exp(np.float32(0.2) * n) if name.endswith("running_var") else np.float32(0.1) * n


@pytest.fixture(scope="module")
def tensors():
    return {name: value(name, shape) for name, shape in inception.shapes().items()}


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    counters = {name.replace(".weight", ".num_batches_tracked") for name in tensors if name.endswith("bn.weight")}
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file({**tensors, **{name: np.zeros((), np.int64) for name in counters}}, path)
    return path


def settings(path, resize="pytorch"):
    return ConfigDict({"inception": str(path), "resize": resize})


def test_as_pytorch_fid(path):
    golden = np.load(GOLDEN / "fid_inception.npz")
    params = inception.load(path, FLAG)

    @jax.jit
    def run(params, image):
        out = inception.apply(params, image)
        return out.pooled, out.logits, out.spatial, out.maps["Mixed_6c"], out.maps["Mixed_6e"].mean((1, 2))

    image = np.concatenate([as_pytorch_fid(golden[f"image_{x}"]) for x in "ab"])
    with jax.default_matmul_precision("highest"):
        pooled, logits, spatial, before, block2 = run(params, image)
    for x, name in ((pooled, "pool3"), (logits, "logits_nobias"), (block2, "block2_mean")):
        expected = np.concatenate([golden[f"{name}_a"], golden[f"{name}_b"]])
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    kernel, bias = params["Mixed_6d.branch1x1"]
    by_hand = np.maximum(np.asarray(before) @ kernel[0, 0] + bias, 0)[..., :7]
    np.testing.assert_allclose(spatial, by_hand.reshape(5, 17 * 17 * 7), rtol=1e-4, atol=1e-5)


def test_resizes():
    golden = np.load(GOLDEN / "metrics.npz")
    resized = np.asarray(as_tf1(golden["resize_in"])) * 128 + 128
    np.testing.assert_allclose(resized[:, ::13, ::13], golden["resize_tf1_299"], atol=1e-3)
    image = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), np.uint8)
    np.testing.assert_allclose(as_pytorch_fid(image), image / 127.5 - 1, atol=1e-6)
    # Without antialiasing a pixel is made of four, however many there are.
    dot = np.zeros((1, 598, 598, 3), np.uint8)
    dot[0, 101, 200] = 255
    assert np.argwhere(as_pytorch_fid(dot)[0, :, :, 0] > -1).tolist() == [[50, 100]]
    assert not (as_tf1(dot)[0, :, :, 0] > -1).any()  # which sees every second pixel only


def test_extractor(path):
    extractor = extractors.EXTRACTORS["inception"](settings(path, "tf1"))
    image = jax.ShapeDtypeStruct((4, 20, 30, 3), np.uint8)
    features = jax.eval_shape(extractor.apply, extractor.params, image)
    assert [x.shape for x in features] == [(4, 2048), (4, 2023), (4, 1008)]
    assert extractor.resize == RESIZES["tf1"].words
    assert extractor.weights.startswith("weights.safetensors, SHA-256 ")
    assert extractor.weights.endswith("(another file than pt_inception-2015-12-05)")
    names = [extractors.scored_name(score, extractor) for score in ("fid", "sfid", "is", "kid_low", "recall")]
    assert names == ["fid", "sfid", "is", "kid_low", "recall"]


def test_a_known_file_is_recognised(path, monkeypatch):
    digest = extractors.EXTRACTORS["inception"](settings(path)).weights.split()[2]
    monkeypatch.setattr(inception, "KNOWN_SHA256", digest[:8])
    assert extractors.EXTRACTORS["inception"](settings(path)).weights.endswith("(known: pt_inception-2015-12-05)")


def test_other_files_are_refused(tensors, tmp_path):
    def refused(message, path=tmp_path / "x.safetensors", resize="pytorch", **changes):
        save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, tmp_path / "x.safetensors")
        with pytest.raises(ConfigError, match=message) as error:
            extractors.EXTRACTORS["inception"](settings(path, resize))
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    refused(
        r"^config.eval.inception = .*x.safetensors' is not the FID's InceptionV3: it misses fc.bias$",
        **{"fc.bias": None},
    )
    refused(
        r"it has another shape of fc.weight \[1000, 2048\], not \[1008, 2048\]; it has besides AuxLogits.x$",
        **{"fc.weight": np.zeros((1000, 2048), np.float32), "AuxLogits.x": np.zeros(1, np.float32)},
    )
    refused(
        r"it misses fc.weight, fc.bias, .* and 466 more; it has besides a$",
        **dict.fromkeys(tensors),
        a=np.zeros(1, np.float32),
    )
    refused("^config.eval.inception: there is no file", tmp_path / "missing.pth")
    refused("^config.eval.inception is ''", "")
    refused("^config.eval.resize = 'nearest': allowed are pytorch, tf1$", resize="nearest")
