"""Images in an .npz, as ADM and this project write it."""

import pathlib

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.errors import ConfigError


def read_npz(
    path: pathlib.Path, field: str
) -> tuple[UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, " n"] | None, list[str] | None]:
    """The images (arr_0 or images), and where there are any the labels (arr_1 or labels) and class_names.

    Raises: ConfigError beginning with `field` when the file is damaged or holds something else.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is an .npy, a single array")
        with loaded as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile's and zlib's own among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{field}: {path} cannot be read as an .npz ({reason})") from None

    def get(*names: str) -> np.ndarray | None:
        return next((arrays[name] for name in names if name in arrays), None)

    images, labels, names = get("arr_0", "images"), get("arr_1", "labels"), get("class_names")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        found = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items()) or "nothing"
        raise ConfigError(f"{field}: {path} must hold uint8 images [N, H, W, 3] as arr_0 or images; it has {found}")
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        found = f"{labels.dtype} {list(labels.shape)}"
        raise ConfigError(f"{field}: labels in {path} must be {len(images)} integers; they are {found}")
    decoded = None if names is None else [n.decode() if isinstance(n, bytes) else str(n) for n in names.ravel()]
    return images, labels, decoded
