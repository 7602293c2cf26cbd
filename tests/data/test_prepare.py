"""--mode=prepare: the same pixels as without it, nothing lost, and nothing that only looks complete."""

import concurrent.futures
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdiff.config import fields
from jaxdiff.data import load_source, train_batches, writing
from jaxdiff.data.prepare import prepare
from jaxdiff.errors import ConfigError
from tests.tiny_birds import TinyBirds

SIZE = 16


def data_config(root, **changes):
    data = fields.base("ddpm", "folder").data
    data.update({"path": str(root), "image_size": SIZE, "threads": 2, **changes})
    return data


@pytest.fixture
def folder(tmp_path):
    """Noise, so that no two images are alike; the same file names in every class."""
    rng = np.random.default_rng(0)
    root = tmp_path / "birds"
    for split, count in (("train", 120), ("val", 10)):
        for name in ("goose", "robin"):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                image = Image.fromarray(rng.integers(0, 256, (20, 16 + k % 5, 3), np.uint8))
                image.save(root / split / name / f"{k:03d}.{'png' if k % 2 else 'jpg'}")
    return root


def everything(source):
    return source.batch(np.arange(len(source)))


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def rejected(root):
    return [json.loads(line) for line in (root / "rejected.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_prepared_images_are_those_of_the_folder(folder, cache_gb):
    data = data_config(folder, cache_gb=cache_gb)
    before = {split: everything(load_source(data, split)) for split in ("train", "val")}
    root, manifest = prepare(data)
    assert root == folder.with_name("birds-16px") and not (root / "partial").exists()
    for split, batch in before.items():
        source = load_source(data, split)
        assert same(everything(source), batch) and list(source.class_names) == ["goose", "robin"]
    assert manifest["images"] == {"train": 240, "val": 20} and manifest["per_class"]["train"] == [120, 120]
    assert manifest["settings"]["image_size"] == SIZE and manifest["rejected"] == 0 == len(rejected(root))
    assert sum(shard["rows"] for shard in manifest["shards"]["train"]) == 240 and len(manifest["shards"]["train"]) > 1


def test_prepared_folder_is_enough(folder):
    data = data_config(folder)
    root, _ = prepare(data)
    before = everything(load_source(data, "train"))
    folder.rename(folder.with_name("away"))
    assert same(everything(load_source(data, "train")), before)
    assert same(everything(load_source(data_config(root), "train")), before)


def test_training_batches_are_those_of_the_folder(folder):
    def batches(**kwargs):
        source = load_source(data_config(folder, cache_gb=0.0), "train")
        options = dict(seed=1, batch_size=8, start=25, stop=35, flip=True, threads=2)
        return list(train_batches(source, **options, **kwargs))

    before = batches()
    prepare(data_config(folder))
    assert all(same(a, b) for a, b in zip(before, batches(), strict=True))
    assert all(same(a, b) for a, b in zip(before, batches(workers=1), strict=True))


def test_anybody_can_read_it(folder):
    root, manifest = prepare(data_config(folder))
    builder = tfds.builder_from_directory(str(root / manifest["folder"]))
    source = builder.as_data_source("train")
    assert len(source) == 240 and builder.info.features["label"].names == ["goose", "robin"]
    assert source[120]["label"] == 1 and source[120]["file"].decode().endswith("train/robin/000.jpg")
    batch = everything(load_source(data_config(folder), "train"))
    assert (source[120]["image"] == batch["image"][120]).all()


def test_again_does_nothing(folder):
    root, manifest = prepare(data_config(folder))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert prepare(data_config(folder))[1] == manifest
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_what_changed_is_refused_and_left_alone(folder):
    root, _ = prepare(data_config(folder))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="image_size is 16, wanted is 8"):
        prepare(data_config(folder, prepared=str(root), image_size=8))
    Image.new("RGB", (9, 9)).save(folder / "train" / "robin" / "new.png")
    with pytest.raises(ConfigError, match="its fingerprint is .* delete it to have it made again"):
        prepare(data_config(folder))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_images_that_came_later_are_noticed(folder, capsys):
    data = data_config(folder)
    prepare(data)
    load_source(data, "train")
    (folder / "train" / "goose" / "notes.txt").write_text("no image")
    load_source(data, "train")
    assert "images that" not in capsys.readouterr().out
    (folder / "train" / "goose" / "later.jpg").write_bytes((folder / "train" / "goose" / "000.jpg").read_bytes())
    assert len(load_source(data, "train")) == 240
    assert "birds-16px has the 260 images that " in (said := capsys.readouterr().out) and "it has 261 now" in said


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(data_config(folder, prepared=str(tmp_path / "home")))
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.tex"]
    (tmp_path / "home" / "partial").mkdir()  # as ours is called
    (tmp_path / "home" / "partial" / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(data_config(folder, prepared=str(tmp_path / "home")))
    assert len(list((tmp_path / "home").rglob("thesis.tex"))) == 2


def test_two_at_once_write_once(folder, monkeypatch):
    """The second waits, and finds what the first wrote."""
    written, write_shard = [], writing.Records._write_shard

    def slow(self, shard):
        written.append(shard)
        time.sleep(0.2)
        return write_shard(self, shard)

    monkeypatch.setattr(writing.Records, "_write_shard", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (root, first), (_, second) = pool.map(prepare, [data_config(folder)] * 2)
    assert first == second and len(written) == len(set(written))
    text = (root / "manifest.json").read_text()
    files = list(root.rglob("*.array_record*"))
    assert len(files) == len(written) and all(hashlib.sha256(f.read_bytes()).hexdigest() in text for f in files)


def spoil(folder):
    """Files that no viewer would show; how many."""
    train = folder / "train"
    whole = (train / "goose" / "000.jpg").read_bytes()
    (train / "goose" / "cut.jpg").write_bytes(whole[:-40])
    (train / "goose" / "page.jpg").write_text("<html>404</html>")
    (train / "robin" / "empty.png").write_bytes(b"")
    (train / "robin" / "gone.jpg").symlink_to("nowhere")
    (train / "robin" / "folder.jpg").mkdir()
    Image.new("1", (20_000, 20_000)).save(folder / "val" / "robin" / "bomb.png")
    return 6


def test_unusable_files_are_counted_and_listed(folder):
    clean = {split: everything(load_source(data_config(folder), split)) for split in ("train", "val")}
    count = spoil(folder)
    (folder / "train" / "robin" / "notes.txt").write_text("not an image")
    root, manifest = prepare(data_config(folder, max_rejected=0.05))
    listed = rejected(root)
    assert manifest["rejected"] == count == len(listed)
    reasons = {line["file"].rsplit("/", 1)[1]: line["reason"] for line in listed}
    assert "truncated" in reasons["cut.jpg"] and "not an image" in reasons["page.jpg"]
    assert reasons["gone.jpg"] == "No such file or directory" and reasons["folder.jpg"] == "Is a directory"
    assert "pixels" in reasons["bomb.png"] and "not an image" in reasons["empty.png"]
    assert manifest["ignored_files"] == {"train": {".txt": 1}, "val": {}}
    for split, batch in clean.items():  # what is left is what there was without them
        assert same(everything(load_source(data_config(folder), split)), batch)


def test_too_many_unusable_files(folder):
    count = spoil(folder)
    with pytest.raises(ConfigError, match=rf"max_rejected = 0\.001: {count} of 266 images \(2\.26%\).*rejected\.jsonl"):
        prepare(data_config(folder))
    root = folder.with_name("birds-16px")
    assert len(rejected(root)) == count and not (root / "manifest.json").exists()
    assert not list(root.rglob("*.array_record-*"))
    _, manifest = prepare(data_config(folder, max_rejected=0.03))  # goes on from the shards that are done
    assert manifest["images"]["train"] == 240


def test_class_of_which_nothing_is_usable(folder):
    for path in (folder / "train" / "robin").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match="class 'robin' has no usable training image"):
        prepare(data_config(folder, max_rejected=1.0))


def test_interrupted_and_gone_on_with(folder, monkeypatch):
    """Finished shards are not computed again; what an interruption leaves is not taken for a data set."""
    data = data_config(folder, cache_gb=0.0)
    reference = everything(load_source(data, "train"))
    decoded = []
    decode_into = writing_decode(monkeypatch, decoded, fail_after=150)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, threads=1)
    root = folder.with_name("birds-16px")
    assert not (root / "manifest.json").exists() and not list(root.rglob("*.array_record-*"))
    done = len(list((root / "partial").glob("train-*.array_record")))
    assert done == 2  # of 64 rows each
    assert same(everything(load_source(data, "train")), reference)  # read from the folder
    decoded.clear()
    monkeypatch.setattr("jaxdiff.data.prepare.decode_into", decode_into)
    writing_decode(monkeypatch, decoded)
    prepare(data, threads=1)
    assert len(decoded) == 260 - 64 * done
    assert same(everything(load_source(data, "train")), reference)


def writing_decode(monkeypatch, decoded, fail_after=None):
    """Notes what is decoded, and interrupts as Ctrl-C does; the true function."""
    from jaxdiff.data import prepare as module

    true = module.decode_into

    def noting(data, out):
        if fail_after is not None and len(decoded) >= fail_after:
            raise KeyboardInterrupt
        decoded.append(data)
        true(data, out)

    monkeypatch.setattr(module, "decode_into", noting)
    return true


def test_interrupted_then_the_folder_changed(folder, monkeypatch):
    """Shards of the old files are not mixed with those of the new ones."""
    true = writing_decode(monkeypatch, [], fail_after=150)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_config(folder), threads=1)
    monkeypatch.setattr("jaxdiff.data.prepare.decode_into", true)
    (folder / "train" / "goose" / "000.jpg").unlink()
    before = everything(load_source(data_config(folder), "train"))
    _, manifest = prepare(data_config(folder))
    assert manifest["images"]["train"] == 239 and same(everything(load_source(data_config(folder), "train")), before)


COMMAND = """
from jaxdiff.config import fields
from jaxdiff.data.prepare import prepare
data = fields.base("ddpm", "folder").data
data.update(path={!r}, image_size=16)
prepare(data, threads=1)
"""


def test_killed(folder):
    """kill -9 in the middle, wherever that is."""
    root = folder.with_name("birds-16px")
    code = "import jaxdiff.data.prepare as p, time; f = p.decode_into\n"
    code += "def slow(*a): time.sleep(0.01); f(*a)\n"
    code += "p.decode_into = slow\n" + COMMAND.format(str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    while not list((root / "partial").glob("train-*.array_record")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "manifest.json").exists()
    assert prepare(data_config(folder))[1]["images"] == {"train": 240, "val": 20}


def test_full_disk(folder):
    """Files may not grow beyond 100 kB; then they may, and it goes on."""
    code = "import resource as r, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "r.setrlimit(r.RLIMIT_FSIZE, (100_000, r.RLIM_INFINITY))\n" + COMMAND.format(str(folder))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "ConfigError" in last and "birds-16px: cannot be written" in last and "goes on" in last, result.stderr
    assert not (folder.with_name("birds-16px") / "manifest.json").exists()
    assert prepare(data_config(folder))[1]["images"] == {"train": 240, "val": 20}


def test_not_enough_room_is_said_before_it_begins(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=5_000_000))
    with pytest.raises(ConfigError, match=r"up to 3,120 MB are needed and 5 MB free"):
        prepare(data_config(folder, image_size=2000))
    assert not folder.with_name("birds-2000px").exists()


def test_a_shard_cut_short_is_found_before_training(folder):
    root, manifest = prepare(data_config(folder))
    shard = next((root / manifest["folder"]).glob("*train*00001-of*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"00001-of.*bytes are left of the .* written; delete .* and make it again"):
        load_source(data_config(folder), "train")
    shard.unlink()
    with pytest.raises(ConfigError, match="0 bytes are left"):
        load_source(data_config(folder), "train")


def test_damaged_bytes_are_found_when_they_are_read(folder):
    root, manifest = prepare(data_config(folder))
    shard = next((root / manifest["folder"]).glob("*train*00001-of*"))
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 3 :] = struct.pack("B", 1) * (len(whole) - len(whole) // 3)
    shard.write_bytes(whole)
    with pytest.raises(ConfigError, match="00001-of.*damaged"):
        everything(load_source(data_config(folder, cache_gb=0.0), "train"))


def test_tfds_data_set_with_some_of_its_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("robin\ngoose\n")
    TinyBirds(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    two = dict(classes=str(tmp_path / "classes.txt"), prepared=str(tmp_path / "two"))
    data = data_config(tmp_path, source="tfds", name="tiny_birds", **two)
    _, manifest = prepare(data)
    assert manifest["classes"] == ["goose", "robin"] and manifest["images"] == {"train": 26, "val": 4}
    batch = everything(load_source(data, "train"))
    assert (batch["image"][:, 8, 8, 0] == np.array([120, 60])[batch["label"]]).all()
    (tmp_path / "others.txt").write_text("heron\nrobin\n")
    for classes in ("", str(tmp_path / "others.txt")):
        data.classes = classes
        with pytest.raises(ConfigError, match="data.classes = .* was prepared with other ones, 2 in all"):
            load_source(data, "train")


def test_sources_that_need_no_preparing(tmp_path):
    data = data_config(tmp_path)
    data.source = "digits"
    with pytest.raises(ConfigError, match="data.source = 'digits': must be one of folder, tfds"):
        prepare(data)


def test_layout_of_shards():
    def plan(count, row_bytes):
        return writing.Plan(None, {"train": count, "val": 3}, {}, row_bytes, None, None).shards()

    for count, row_bytes in ((1, 3), (65, 3), (5000, 3), (126_689, 128 * 128 * 3), (100, 10**9)):
        shards = plan(count, row_bytes)
        covered = [k for shard in shards if shard.split == "train" for k in shard.candidates]
        assert covered == list(range(count)) and shards[-1].candidates == range(3)
        assert all(shard.candidates.start % 2 == 0 for shard in shards)
    assert len(plan(126_689, 128 * 128 * 3)) < 60  # shards of 128 MB
