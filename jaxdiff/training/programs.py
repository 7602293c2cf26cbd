"""Compiled training steps of earlier starts, which are found again before anything is traced.

What a step computes follows from the source, from what its functions refer to, and from the shapes of its arguments: a
file is called by a hash of all that, and of the versions and settings of what compiles. Where code of others has been
imported, which may have changed whatever is looked up when a step is traced, nothing is kept, nor where a file has been
edited since it was.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import itertools
import os
import pathlib
import pickle
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jaxdiff import STARTED, diffusion
from jaxdiff.config.files import replacing
from jaxdiff.mesh import say
from jaxdiff.models import forms, norm

PACKAGE = pathlib.Path(__file__).resolve().parent.parent
OWN = [PACKAGE, PACKAGE.parent / "configs", PACKAGE.parent / "benchmarks"]
# How names of the environment begin that what compiles looks at.
SETTINGS = ("JAX", "XLA", "FLAX", "TRITON", "NVIDIA_TF32", "CUDNN", "CUBLAS", "LD_LIBRARY_PATH")
KEPT = 32  # the last used; that of a UNet of 36 M parameters has 11 MB


class Program(NamedTuple):
    """A compiled function, and the floating point operations that it was written with."""

    compiled: jax.stages.Compiled
    flops: int


class Unknown(Exception):
    """What a step follows from holds something of which cannot be told whether it is the same as before."""


def folder() -> pathlib.Path | None:
    """Where programs are kept: within the folder of JAX's own cache. None where there is none, for several processes,
    and without a GPU: on a CPU tracing is short beside the rest."""
    cache = jax.config.values["jax_enable_compilation_cache"] and jax.config.values["jax_compilation_cache_dir"]
    local = cache and "://" not in cache  # it may be a bucket
    return pathlib.Path(cache) / "steps" if local and forms.for_gpu() and jax.process_count() == 1 else None


def find(function: Any, args: Sequence[Any]) -> pathlib.Path | None:
    """The file, which may not be there yet, of a function compiled for these arguments or their shapes; None where
    none is kept."""
    try:
        root = folder()
        return root and root / identity(function, args)
    except Exception:  # Unknown, or whatever it is: the step is compiled as without
        return None


def load(path: pathlib.Path, args: Sequence[Any]) -> Program | None:
    """The program of a file that `find` names; None where it is not there, or cannot be read."""
    if not path.exists():
        return None
    if forms.capability() == 9.0:
        from jaxdiff.models import mosaic  # noqa: F401  # its kernels look for what this brings
    try:
        (content, inputs, outputs), flops = pickle.loads(path.read_bytes())
        devices = _devices(args)
        compiled = serialize_executable.deserialize_and_load(content, inputs, outputs, execution_devices=devices)
        with contextlib.suppress(OSError):  # where it may be read alone
            os.utime(path)
    except Exception:  # whatever it is: the function is compiled anew
        return None
    return Program(compiled, flops)


def save(path: pathlib.Path, compiled: jax.stages.Compiled, flops: Callable[[], int]) -> None:
    """Keep a program in a file that `find` names, and of all others the last used; says so where it cannot be kept."""
    # What JAX asked how to split our kernels over devices: it cannot be written, and is not asked any more.
    unloaded: Any = getattr(getattr(compiled, "_executable", None), "_unloaded_executable", None)
    if getattr(unloaded, "keepalive", None) and not getattr(unloaded, "host_callbacks", True):
        unloaded.keepalive = []
    try:
        content = pickle.dumps((serialize_executable.serialize(compiled), flops()))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except Exception as error:  # a full disk, or what JAX cannot write: the run needs it not
        say(f"the compiled step is not kept for the next start: {' '.join(str(error).split())}")
        return
    with contextlib.suppress(OSError):  # others may do the same
        for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink()


def identity(function: Any, args: Sequence[Any]) -> str:
    """Hash of all that the function, compiled for these arguments or their shapes, follows from. Raises: Unknown."""
    found = _Hash()
    found.add(sys.version, _source(), _installed(), dict(jax.config.values), forms.CAPABILITY, norm.INTERPRET)
    found.add({name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)})
    devices = _devices(args)
    found.add([(d.id, d.device_kind, d.client.platform_version) for d in devices], len(jax.devices()))
    found.add(diffusion.SCHEDULES, diffusion.PREDICTIONS, diffusion.WEIGHTINGS, diffusion.TIMES)  # config files may add
    found.add(getattr(function, "__wrapped__", function))
    leaves, tree = jax.tree.flatten(args)
    found.add(str(tree))
    for leaf in leaves:
        described = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        lies = (getattr(leaf, name, None) for name in ("weak_type", "sharding", "format"))
        found.add(described.shape, described.dtype, *map(repr, lies))
    return found.digest.hexdigest()


def _devices(args: Sequence[Any]) -> list[jax.Device]:
    """Those that the arguments are split over; the first where they do not say."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh))
    return next((list(mesh.devices.flat) for mesh in meshes), jax.devices()[:1])


def _source() -> str:
    """Hash of the source. Raises: Unknown where code of others was imported, or a file is younger than what runs."""
    roots = [path for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name))]
    roots += [path for path in sys.path if path and next(pathlib.Path(path).glob("*.dist-info"), None)]
    if not getattr(sys.modules["__main__"], "__file__", None):
        raise Unknown("what was typed, or a notebook")
    names = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    imported = {pathlib.Path(name) for name in names if name and not any(map(pathlib.Path(name).is_relative_to, roots))}
    own = {file for file in imported if any(map(file.resolve().is_relative_to, OWN))}
    if others := imported - own:
        raise Unknown(str(min(others)))
    digest = hashlib.sha256()
    for file in sorted({*(file for file in PACKAGE.rglob("*.py") if file.is_file()), *own}):
        if file.stat().st_mtime > STARTED:
            raise Unknown(f"{file}, edited since it was imported")
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _installed() -> list[str]:
    """The folders that tell what is installed, and in which version."""
    roots = [pathlib.Path(path) for path in sys.path]
    return sorted(file.name for root in roots if root.is_dir() for file in root.glob("*.dist-info"))


class _Hash:
    """Of values, by what they are made of: functions by their code, and by what they hold. What they look up in modules
    is of the source."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # with the value, so that no other one gets its number

    def add(self, *values: Any) -> None:
        for value in values:
            if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
                self._text(type(value).__name__, repr(value))
            elif id(value) in self._seen:
                self._text("again", str(self._seen[id(value)][0]))
            else:
                self._seen[id(value)] = len(self._seen), value
                self._add(value)

    def _text(self, *words: str) -> None:
        for word in words:
            data = word.encode()
            self.digest.update(f"{len(data)}:".encode() + data)

    def _add(self, value: Any) -> None:
        kind = type(value)
        if name := _importable(value):
            self._text("named", name)
            return
        self._text("dtype" if isinstance(value, np.dtype) else _class(kind))
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, type):
            raise Unknown(str(value))
        elif isinstance(value, jax.Array | np.generic) or kind is np.ndarray:
            data = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
            if data.dtype.hasobject:
                raise Unknown("an array of objects")
            weak = str(getattr(value, "weak_type", False))
            self._text(str(value.dtype), weak, str(data.shape), data.tobytes().hex())
        elif isinstance(value, np.dtype | enum.Enum | jax.ShapeDtypeStruct):
            self._text(repr(value))
        elif isinstance(value, tuple | list):
            self.add(len(value), *value)
        elif isinstance(value, dict | types.MappingProxyType | ConfigDict):
            self.add(len(value), *itertools.chain.from_iterable(value.items()))
        elif isinstance(value, functools.partial):
            self.add(value.func, value.args, value.keywords)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__, value.__self__)
        elif isinstance(value, nn.Module):
            if value.scope is not None:
                raise Unknown("a module with variables")
            self._fields(value, {"parent", "name"})
        elif dataclasses.is_dataclass(value):
            self._fields(value, ())
        elif kind.__module__.startswith("jaxdiff.") and not hasattr(kind, "__slots__"):
            self.add(vars(value))
        else:
            raise Unknown(f"{kind.__module__}.{kind.__qualname__}")

    def _function(self, function: types.FunctionType) -> None:
        self._text(function.__module__, function.__qualname__)
        self._code(function.__code__)
        self.add(function.__defaults__, function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self._text("empty")

    def _code(self, code: types.CodeType) -> None:
        if not os.path.exists(code.co_filename):
            raise Unknown(f"{code.co_name}, which is in no file")
        self._text(str(code.co_firstlineno), code.co_code.hex())
        self.add(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._text(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant))

    def _fields(self, value: Any, without: Iterable[str]) -> None:
        names = [field.name for field in dataclasses.fields(value) if field.name not in without]
        self.add(*itertools.chain.from_iterable((name, getattr(value, name)) for name in names))


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _class(kind: type) -> str:
    """Its name. Raises: Unknown where that does not tell it from others, as it is made within a function."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ != "builtins" and not _importable(kind):
        raise Unknown(name)
    return name


def _importable(value: Any) -> str | None:
    """The name that this very value has in a module; None where it has none."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules:
        return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is value else None
