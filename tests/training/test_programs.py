"""Steps that an earlier start compiled: found where nothing is other than then, and the same to the bit."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff import diffusion
from jaxdiff import mesh as meshes
from jaxdiff.errors import Stopped
from jaxdiff.models import splitting
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.training import programs
from jaxdiff.training.compiling import Compiling
from jaxdiff.training.stages import run_train


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """The tests are no code of others, and what runs them is no notebook."""
    monkeypatch.setattr(programs, "OWN", [*programs.OWN, pathlib.Path(__file__).parent.parent])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of programs of a CPU too. XLA cannot write one of those anew that it has read from JAX's cache."""
    monkeypatch.setattr(programs, "folder", lambda: tmp_path / "steps")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield tmp_path / "steps"
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


class Found(Exception):
    """Ends a run where its step would be traced."""


def step_identity(config, workdir, monkeypatch):
    """Of the step that a run of `config` would compile."""

    def find(function, args):
        raise Found(programs.identity(function, args))

    monkeypatch.setattr(programs, "find", find)
    with pytest.raises(Found) as found:
        run_train(config, workdir)
    return str(found.value)


def losses(file):
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records if "grad_norm" in record]


def scaled(factor):
    return jax.jit(lambda x: (x * factor) @ x)


def test_a_step_is_found_by_the_next_start(folder):
    x = jnp.arange(16.0).reshape(4, 4)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    first = Compiling(scaled(3.0), shape)
    result = first.result()[0](x)
    first.kept.result(30)
    second = Compiling(scaled(3.0), shape)
    assert not first.found and second.found and second.flops() == first.flops() == 2 * 4**3
    np.testing.assert_array_equal(second.result()[0](x), result)
    third = Compiling(scaled(2.0), shape)  # the same code, of another number
    np.testing.assert_array_equal(third.result()[0](x), 2 * x @ x)
    third.kept.result(30)
    assert not third.found and len(list(folder.iterdir())) == 2
    assert not Compiling(scaled(3.0), jax.ShapeDtypeStruct(x.shape, jnp.int32)).found


def split_over_devices(factor):
    """As a kernel of our own is, each device with its own rows."""
    split, out = NamedSharding(meshes.make_mesh(), PartitionSpec("data")), [jax.ShapeDtypeStruct((16, 4), jnp.float32)]

    def function(x):
        return splitting.over_batch(lambda x: [x * factor], factor, [x], out)[0] @ jnp.ones((4, 2))

    return jax.jit(function, in_shardings=split), jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split)


def test_a_step_of_several_devices_is_found(folder):
    function, shape = split_over_devices(3.0)
    first = Compiling(function, shape)
    x = jax.device_put(jnp.arange(64.0).reshape(16, 4), shape.sharding)
    result = first.result()[0](x)
    first.kept.result(30)
    second = Compiling(*split_over_devices(3.0))
    again = second.result()[0](x)
    assert second.found and again.sharding == result.sharding and len(again.sharding.device_set) == 8
    np.testing.assert_array_equal(again, result)
    np.testing.assert_array_equal(first.result()[0](x), 3 * np.asarray(x) @ np.ones((4, 2)))
    assert not Compiling(*split_over_devices(2.0)).found


def test_one_that_calls_python_is_not_kept(folder, capsys):
    """What it would call is of this process."""
    function = jax.jit(lambda x: jax.pure_callback(np.sin, jax.typeof(x), x))
    Compiling(function, jnp.ones(2)).kept.result(30)
    assert not folder.exists() and "is not kept for the next start" in capsys.readouterr().out


def test_what_cannot_be_read_is_compiled_anew(folder):
    x = jnp.ones((2, 2))
    Compiling(scaled(3.0), x).kept.result(30)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"other"):
        file.write_bytes(content)
        again = Compiling(scaled(3.0), x)
        np.testing.assert_array_equal(again.result()[0](x), 3 * x @ x)
        again.kept.result(30)
        assert not again.found and Compiling(scaled(3.0), x).found


def test_what_cannot_be_kept_is_said(folder, capsys):
    folder.write_text("in the way")
    x = jnp.ones((2, 2))
    compiling = Compiling(scaled(3.0), x)
    np.testing.assert_array_equal(compiling.result()[0](x), 3 * x @ x)
    compiling.kept.result(30)
    text = capsys.readouterr().out
    assert text.startswith("the compiled step is not kept for the next start: ") and folder.read_text() == "in the way"


def test_the_last_used_are_kept(folder, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    x = jnp.ones((2, 2))
    for i, factor in enumerate((1.0, 2.0, 1.0, 3.0)):
        before = time.time() - 100 + 10 * i
        Compiling(scaled(factor), x).kept.result(30)
        for file in folder.iterdir():  # the files' times are seconds apart
            if file.stat().st_mtime > time.time() - 10:
                os.utime(file, (before, before))
    assert [Compiling(scaled(factor), x).found for factor in (1.0, 3.0, 2.0)] == [True, True, False]


def test_what_is_not_known_is_not_kept(folder):
    class Other:
        factor = 3.0

    other = Other()
    function = jax.jit(lambda x: x * other.factor)
    with pytest.raises(programs.Unknown, match="Other"):
        programs.identity(function, (jnp.ones(2),))
    compiling = Compiling(function, jnp.ones(2))
    np.testing.assert_array_equal(compiling.result()[0](jnp.ones(2)), 3 * jnp.ones(2))
    compiling.kept.result(30)
    assert programs.find(function, (jnp.ones(2),)) is None and not folder.exists()


def test_nothing_is_kept_beside_code_of_others(monkeypatch, tmp_path):
    """It may have changed whatever is looked up when a step is traced."""
    arguments = scaled(1.0), (jnp.ones(2),)
    assert len(programs.identity(*arguments)) == 64
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules["__main__"], "__file__")
        with pytest.raises(programs.Unknown, match="notebook"):
            programs.identity(*arguments)
    other = types.ModuleType("other")
    other.__file__ = str(tmp_path / "other.py")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "other", other)
        with pytest.raises(programs.Unknown, match=r"other\.py"):
            programs.identity(*arguments)
        (tmp_path / "x-1.dist-info").mkdir()  # where things are installed
        patch.syspath_prepend(tmp_path)
        assert len(programs.identity(*arguments)) == 64


def test_nothing_is_kept_of_source_that_was_edited_since(monkeypatch):
    monkeypatch.setattr(programs, "STARTED", time.time() - 1e9)
    with pytest.raises(programs.Unknown, match="edited since"):
        programs.identity(scaled(1.0), (jnp.ones(2),))


def test_links_of_editors_are_no_source(monkeypatch, tmp_path):
    (tmp_path / ".#loop.py").symlink_to("user@host.1:1")
    monkeypatch.setattr(programs, "PACKAGE", tmp_path)
    assert len(programs.identity(scaled(1.0), (jnp.ones(2),))) == 64


def made(inner):
    @dataclasses.dataclass
    class Thing:
        number: int = inner

    return Thing


@pytest.mark.parametrize(
    "value",
    [
        *(made(1), made(1)(), np.array([None]), np.ma.masked_array([1]), PatchDiscriminator(layers=2).bind({})),
        *(scaled(2.0), eval("lambda x: x"), functools.partial(made(1)), nn.remat(PatchDiscriminator)),
    ],
)
def test_what_it_cannot_tell_from_something_else(value):
    with pytest.raises(programs.Unknown):
        programs._Hash().add(value)


def test_where_they_are_kept(monkeypatch):
    cache = pathlib.Path(str(jax.config.jax_compilation_cache_dir))
    assert programs.folder() is None  # without a GPU
    monkeypatch.setattr("jaxdiff.models.forms.CAPABILITY", 9.0)
    assert programs.folder() == cache / "steps"
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert programs.folder() is None
    for name, value in {
        "jax_enable_compilation_cache": False,
        "jax_compilation_cache_dir": "gs://bucket/cache",
    }.items():
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            assert programs.folder() is None
        finally:
            jax.config.update(name, before)


VALUES = [
    *(None, True, 1, 1.0, "1", b"1", (1,), [1], {"1": 1}, {1: 1}, (1, 1), ((1,), 1), jnp.float32, np.dtype("int8")),
    *(np.float32(1), np.ones(1), np.ones(2), np.ones(1, np.int32), np.ones((1, 1)), np.zeros(1), jnp.sin, jnp.cos),
    *(jax.random.key(0), jax.random.key(1), jax.random.key_data(jax.random.key(1)), PatchDiscriminator(layers=2)),
    *(PatchDiscriminator(layers=3), functools.partial(jnp.sum, axis=0), functools.partial(jnp.sum, axis=1)),
    *(lambda x: x + 1, lambda x: x + 2, lambda x, y=1: x, lambda x, y=2: x),
    *(lambda x: lambda: x + 1, lambda x: lambda: x + 2, jnp.ones(1), jnp.asarray(1.0), jnp.float32(1.0)),
]


def hashed(value):
    found = programs._Hash()
    try:
        found.add(value)
    except programs.Unknown as error:
        return str(error)
    return found.digest.hexdigest()


def test_what_differs_has_another_hash():
    hashes = [hashed(value) for value in VALUES]
    assert len(set(hashes)) == len(VALUES) and hashes == [hashed(value) for value in VALUES]
    assert hashed(np.ones(2)) == hashed(np.ones(2))


# Fields of which a step has other code or other numbers in it.
CHANGES = {
    "seed": 1,
    "dtype": "bfloat16",
    "batch_size": 32,
    "accumulate": 2,
    "steps": 5,
    "lr": 2e-4,
    "warmup_steps": 2,
    "weight_decay": 0.0,
    "adam_betas": (0.9, 0.99),
    "clip_norm": 2.0,
    "ema_decay": 0.98,
    "ema_decays": (0.9,),
    "ema_sigma_rel": (0.1,),
    "model.channels": 32,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "model.norm_groups": 8,
    "model.norm_eps": 1e-6,
    "model.freq_shift": 1.0,
    "model.qk_norm": True,
    "model.attention_chunk": 8,
    "model.remat": "dots",
    "diffusion.schedule": "cosine",
    "diffusion.beta_end": 0.03,
    "diffusion.noise_shift": 2.0,
    "diffusion.prediction": "v",
    "diffusion.weighting": "min_snr",
    "diffusion.stratified": True,
    "diffusion.label_dropout": 0.2,
}


def test_a_field_that_changes_the_step_changes_its_identity(tiny, tmp_path, monkeypatch):
    identities = {}
    for field, value in {"": None, **CHANGES}.items():
        config = tiny("ddpm")
        if field:
            config.update_from_flattened_dict({field: value})
        name = field or "none"
        identities[name] = step_identity(config, tmp_path / name, monkeypatch)
    same = [name for name, found in identities.items() if list(identities.values()).count(found) > 1]
    assert not same and len(identities) == len(CHANGES) + 1
    config = tiny("ddpm")  # and one that does not, does not
    config.log_every, config.sample.steps, config.keep = 2, 2, 3
    assert step_identity(config, tmp_path / "same", monkeypatch) == identities["none"]


@pytest.mark.parametrize("settings", [{"JAXDIFF_FORMS": "plain"}, {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}])
def test_settings_of_what_compiles_change_it(settings, monkeypatch):
    arguments = scaled(1.0), (jnp.ones(2),)
    before = programs.identity(*arguments)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert programs.identity(*arguments) != before


def test_what_is_added_to_a_table_changes_it(monkeypatch):
    arguments = scaled(1.0), (jnp.ones(2),)
    found = {programs.identity(*arguments)}
    for factor in (1, 2):
        own = diffusion.WEIGHTINGS["min_snr"]._replace(gamma=5.0 * factor)
        monkeypatch.setitem(diffusion.WEIGHTINGS, "own", own)
        found.add(programs.identity(*arguments))
    assert len(found) == 3


def test_another_process_finds_the_same():
    """Nothing of it depends on where things are in memory, or on the order of sets."""
    code = """
import jax
from tests.tiny import tiny_config
from jaxdiff.training import programs
from tests.training.test_programs import Found, step_identity
import pathlib, sys, pytest
programs.OWN.append(pathlib.Path("tests").resolve())
sys.modules["__main__"].__file__ = programs.__file__
with pytest.MonkeyPatch.context() as patch:
    for name in ("ddpm", "vae"):
        print(step_identity(tiny_config(name), pathlib.Path(sys.argv[1]) / name, patch))
"""
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        words = [sys.executable, "-c", code, f"/nowhere/{seed}"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append([line for line in done.stdout.splitlines() if len(line) == 64])
    assert found[0] == found[1] and len(set(found[0])) == 2


def test_a_run_goes_on_with_the_step_of_the_first_start(tiny, folder, tmp_path, capsys, optimized):
    config = tiny("ddpm")
    config.model.update(channel_mult=(1,), attention_resolutions=(), mid_attention=False, context_tokens=0)
    config.eval.scores = ()
    workdirs = tmp_path / "whole", tmp_path / "stopped"
    run_train(config, workdirs[0])
    assert "diffusion: step compiled in" in capsys.readouterr().out
    deadline = time.monotonic() + 30
    while not list(folder.glob("*[!l]")) and time.monotonic() < deadline:  # it is kept while training goes on
        time.sleep(0.01)
    with pytest.raises(Stopped):
        run_train(config, workdirs[1], stop_at=2)
    run_train(config, workdirs[1])
    assert capsys.readouterr().out.count("diffusion: the step of an earlier start found in") == 2
    whole, stopped = (losses(workdir / "metrics.jsonl") for workdir in workdirs)
    assert whole == stopped and len(whole) == config.steps
