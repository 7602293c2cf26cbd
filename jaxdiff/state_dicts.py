"""State dicts in files: safetensors, and what torch saved, read without torch and without running a pickle's code."""

import collections
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdiff.errors import ConfigError

Tensors = dict[str, np.ndarray]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of files made before torch 1.6
MALFORMED = (AttributeError, EOFError, LookupError, TypeError, ValueError)  # what reading other bytes ends in
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage:
    """The numbers of a storage; those of legacy files come after the pickle that mentions it."""

    def __init__(self, dtype: Any, data: np.ndarray | None = None) -> None:
        self.dtype, self.data = dtype, data


class _Tensor:
    """Where in a storage a tensor's numbers are."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        self._args = (storage, offset, shape, strides)

    def array(self) -> np.ndarray:
        storage, offset, shape, strides = self._args
        if storage.data is None:
            raise ValueError("a tensor without numbers")
        numbers = storage.data[offset:]
        if any(n < 0 for n in (*shape, *strides)) or 0 not in shape and _extent(shape, strides) > numbers.size:
            raise ValueError("a tensor beyond its numbers")
        strides = tuple(n * numbers.itemsize for n in strides)
        return np.lib.stride_tricks.as_strided(numbers, shape, strides, writeable=False).copy()


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a state dict is made of and refuses all others, so that no code of a file's is run."""

    def __init__(self, file: IO[bytes], storage: Callable[[Any, str, int], _Storage]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ValueError(f"{module}.{name}, which is no part of a state dict")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage" or dtype not in STORAGES.values():
            raise ValueError(f"a reference to {kind!r}")
        return self._storage(dtype, str(key), int(count))


def _read_zip(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        root = name.removesuffix("data.pkl")

        def storage(dtype: Any, key: str, count: int) -> _Storage:
            return _Storage(dtype, np.frombuffer(archive.read(f"{root}data/{key}"), dtype, count))

        with archive.open(name) as file:
            return _Unpickler(file, storage).load()


def _read_legacy(path: pathlib.Path) -> Any:
    storages: dict[str, _Storage] = {}

    def storage(dtype: Any, key: str, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype))

    with path.open("rb") as file:
        magic, _, _, state, keys = (_Unpickler(file, storage).load() for _ in range(5))
        if magic != LEGACY_MAGIC:
            raise ValueError("another format")
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            dtype = np.dtype(storages[key].dtype)
            storages[key].data = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return state


def read_safetensors(path: pathlib.Path, flag: str = "--from") -> Tensors:
    """All tensors of a file, as float32; ConfigError, beginning with `flag`, when it is missing or damaged."""
    if not path.is_file():
        raise ConfigError(f"{flag}: there is no file {path}")
    try:
        with safe_open(path, framework="flax") as file:  # knows bfloat16, which numpy's does not
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{flag}: {path} is no safetensors file, or a damaged one ({error})") from None


def read_state_dict(path: pathlib.Path, flag: str) -> Tensors:
    """The tensors, as float32, of a .safetensors file or of one that torch.save made of a state dict.

    Raises: ConfigError beginning with `flag` when the file is missing, damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, flag)
    if not path.is_file():
        raise ConfigError(f"{flag}: there is no file {path}")
    try:
        state = (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
        return {name: np.asarray(tensor.array(), np.float32) for name, tensor in state.items()}
    except (pickle.UnpicklingError, zipfile.BadZipFile, OSError, *MALFORMED) as error:
        raise ConfigError(f"{flag}: {path} holds no state dict of torch's, or a damaged one ({error})") from None
