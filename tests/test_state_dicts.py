"""Files of torch.save are read as torch wrote them, and whatever else a pickle asks for is refused.

The two golden files hold one state dict, written by torch 2.14 in its zip format and in that before torch 1.6.
"""

import io
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.state_dicts import read_state_dict

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_reads_what_torch_wrote(kind):
    base = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    expected = {
        "a": base,
        "turned": base.T,
        "part": base[1:3, 2:5],
        "half": base.astype(np.float16),
        "bf16": base.astype(ml_dtypes.bfloat16),
        "long": np.array(7),
        "p": base[0],
    }
    found = read_state_dict(GOLDEN / f"state_dict_{kind}.pth", "--weights")
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.astype(np.float32))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def in_zip(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", data)
    return file.getvalue()


@pytest.mark.parametrize("wrap", [in_zip, bytes])
def test_code_is_not_run(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes(wrap(pickle.dumps({"a": Evil()})))
    with pytest.raises(ConfigError, match=r"^--weights: .*evil.pth holds no state dict.*mkdir"):
        read_state_dict(path, "--weights")
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        read_state_dict(tmp_path / "a.pth", "--weights")
    for kind in ("zip", "legacy"):
        data = (GOLDEN / f"state_dict_{kind}.pth").read_bytes()
        for size in range(0, len(data) - 1, len(data) // 7):
            (tmp_path / "b.pth").write_bytes(data[:size])
            with pytest.raises(ConfigError, match="or a damaged one"):
                read_state_dict(tmp_path / "b.pth", "--weights")
    flipped = bytearray((GOLDEN / "state_dict_zip.pth").read_bytes())
    at = flipped.index(np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32).tobytes())
    flipped[at] ^= 1
    (tmp_path / "b.pth").write_bytes(flipped)
    with pytest.raises(ConfigError, match="or a damaged one"):
        read_state_dict(tmp_path / "b.pth", "--weights")
    for value in ({"a": 1}, [1], 1):
        (tmp_path / "c.pth").write_bytes(in_zip(pickle.dumps(value)))
        with pytest.raises(ConfigError, match="holds no state dict"):
            read_state_dict(tmp_path / "c.pth", "--weights")
