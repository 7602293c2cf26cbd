"""The report: what is read, thinned and said, and that its page is whole, small and safe."""

import base64
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff import images
from jaxdiff.config import files
from jaxdiff.errors import ConfigError
from jaxdiff.report import curves, galleries, pictures, reading, scores, sections, tables, text, write_report
from tests.report import synthetic
from tests.report.page import Page
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic.make_run(tmp_path_factory.mktemp("runs") / synthetic.HOSTILE)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    other = synthetic.make_run(run.parent / "two", seed=50, lr=2e-3)
    return write_report([run, other], tmp_path_factory.mktemp("report") / "new" / "report.html")


@pytest.fixture(scope="module")
def parsed(written):
    return Page(written.read_text())


@pytest.mark.parametrize("n, most", [(3, 10), (10, 10), (5000, 100), (1501, 1500), (7, 4)])
def test_thinned_curves_keep_their_ends_and_extremes(n, most):
    values = np.random.default_rng(n).normal(size=n)
    values[n // 2], values[n // 3] = 1e3, -1e3
    values[n // 2 + 1 : n // 2 + 2] = np.nan
    kept = curves.thin(values, most)
    assert len(kept) <= most and (np.diff(kept) > 0).all()
    assert {0, n // 2, n // 3, n - 1} <= set(kept.tolist())


def test_thinning_what_is_nowhere_finite_leaves_the_ends():
    assert curves.thin(np.full(100, np.nan), 10).tolist() == [0, 99]


def test_smoothing_is_the_average_it_says_and_has_no_lag():
    rng = np.random.default_rng(0)
    x, span = rng.normal(size=40), 7
    x[5], x[20] = np.nan, np.inf
    d, finite = 1 - 2 / (span + 1), np.flatnonzero(np.isfinite(x))
    weights = d ** np.abs(np.arange(40)[:, None] - finite)
    np.testing.assert_allclose(curves.smooth(x, span), weights @ x[finite] / weights.sum(1), rtol=1e-9)
    np.testing.assert_allclose(curves.smooth(x[::-1], span), curves.smooth(x, span)[::-1], rtol=1e-9)
    assert np.isnan(curves.smooth(np.full(3, np.nan), span)).all()


def test_log_axes_where_they_show_more(run):
    def series(*values):
        return [curves.Series(reading.read_run(run, "a"), np.arange(len(values)), np.arange(3.0), np.array(values))]

    assert curves.logarithmic(series(0.01, 1.0, np.nan)) and not curves.logarithmic(series(0.5, 1.0, 2.0))
    assert not curves.logarithmic(series(-0.01, 1.0, 2.0)) and not curves.logarithmic(series(0.0, 1.0, 2.0))
    assert curves.log_ticks(series(0.03, 0.9))[:4] == [0.01, 0.02, 0.05, 0.1]
    assert curves.log_ticks(series(1e-9, 1.0)) == [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 2, "loss": null}\n\n[1]\n\xff\xfe\n{"loss": 1}\n{"step": 1, "loss": NaN}\n{"step": 3, "lo'
    )
    assert [line["step"] for line in reading.read_metrics(path)] == [1, 2]
    assert reading.read_metrics(tmp_path / "none.jsonl") == []


def test_values_that_are_not_finite_leave_a_gap_and_no_more(run):
    loss = curves.read_series(reading.read_run(run, "a"), "diffusion", "loss")
    assert np.flatnonzero(np.isnan(loss.value)).tolist() == [6] and len(loss.value) == 60
    (stage,) = (s for s in curves.read_stages([reading.read_run(run, "a")]) if s.name == "diffusion")
    chart = next(chart for chart in stage.main if chart.name == "loss")
    assert chart.gaps == 1 and chart.rows[0]["last"] == (pytest.approx(0.1 + 2 / 60), 400)
    assert json.loads(json.dumps(chart.item, allow_nan=False))["root_id"]


@pytest.mark.parametrize(
    "content, validation, count",
    [
        ({"val_loss": 0.1, "knn_accuracy": 1.0}, {"val_loss": 0.1, "knn_accuracy": 1.0}, 0),
        ({"validation": {"val_loss": 0.1}}, {"val_loss": 0.1}, 0),
        ({"records": [{"scores": {"fid": 3.0}}, {"scores": {}}, 7, {"protocol": {}}]}, {}, 1),
        ([], {}, 0),
    ],
)
def test_scores_of_all_ages_are_read(tmp_path, content, validation, count):
    (tmp_path / "scores.json").write_text(json.dumps(content))
    found, records = reading.read_scores(tmp_path / "scores.json")
    assert found == validation and len(records) == count
    assert all(isinstance(r["protocol"], dict) and isinstance(r["floor"], dict) for r in records)


def test_names_tell_folders_apart(tmp_path):
    names = reading.short_names([tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"])
    assert names == ["a/x", "b/x", "b/y"] and reading.short_names([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]


def test_an_autoencoder_is_found_once_wherever_it_is(run, tmp_path):
    assert [(r.name, r.own) for r in reading.read_runs([run, run])] == [
        (synthetic.HOSTILE, True),
        (f"{synthetic.HOSTILE}/autoencoder", False),
    ]
    both = reading.read_runs([run, run / "autoencoder"])
    assert all(r.own for r in both) and len(both) == 2
    elsewhere = synthetic.make_autoencoder(tmp_path / "vae")
    workdir = tmp_path / "ldm"
    workdir.mkdir()
    config = tiny_config("ldm")
    config.autoencoder.path = str(elsewhere)
    files.save(config, workdir / "config.json")
    assert [r.name for r in reading.read_runs([workdir])] == ["ldm", "vae of ldm"]


def test_steps_of_epochs_are_known_from_a_checkpoint(run):
    first = reading.read_run(run, "a")
    assert first.steps == (400, 400)
    first.config.update(steps=0, epochs=2.0, batch_size=100)
    assert first.steps == (400, 30) and first._replace(meta={}).steps == (400, None)


def test_what_is_no_workdir_is_said_in_one_line(tmp_path):
    for content in (None, "{", "[]", '{"experiment": "ldm"}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=re.escape(f"--workdir={tmp_path}: ")) as error:
            write_report([tmp_path], tmp_path / "report.html")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ConfigError, match="none given"):
        write_report([], tmp_path / "report.html")


def test_only_reports_are_replaced(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    files.save(tiny_config("ddpm"), bare / "config.json")
    target = tmp_path / "mine.html"
    target.write_text("my notes")
    with pytest.raises(ConfigError, match="no report of jaxdiff"):
        write_report([bare], target)
    assert target.read_text() == "my notes"
    target.unlink()
    assert write_report([bare], target) == write_report([bare], target) == target
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "mine.html"]


def test_the_page_loads_nothing_and_is_small(written, parsed):
    assert written.stat().st_size < 4_000_000
    assert {tag for tag, value in parsed.loads if not value.startswith(("data:", "#"))} == set()
    assert not re.search(r"url\(|@import", parsed.styles)
    (policy,) = (a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert "sourceMappingURL" not in written.read_text()


def test_names_and_commands_of_users_are_text(written, parsed):
    whole = written.read_text()
    assert "<script>alert" not in whole and "</script><script>" not in whole.replace("</script>\n<script>", "")
    assert all(word in parsed.words for word in (synthetic.HOSTILE, "<script>alert(1)", synthetic.CLASSES[1]))
    assert not [tag for tag, attributes in parsed.tags if tag in ("i", "b") or "onerror" in attributes]


def test_the_page_can_be_used_without_eyes_and_mouse(parsed):
    assert all(a.get("alt") or a.get("src") == "data:," for tag, a in parsed.tags if tag == "img")
    assert len(parsed.ids) == len(set(parsed.ids))
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert not [a for _, a in parsed.tags if "onclick" in a or int(a.get("tabindex") or 0) > 0]
    ids = {a["for"] for tag, a in parsed.tags if tag == "label" and "for" in a}
    sliders = [a for tag, a in parsed.tags if tag == "input" and a.get("type") == "range"]
    assert len(sliders) == 4 and all(a["id"] in ids and a["aria-valuetext"].startswith("step ") for a in sliders)


def test_sections_appear_as_far_as_there_are_files(parsed, tmp_path):
    keys = [
        "overview",
        "curves",
        "training",
        "samples",
        "guidance",
        "classes",
        "denoising",
        "neighbours",
        "scores",
        "latency",
        "config",
        "starts",
    ]
    assert [a["id"] for tag, a in parsed.tags if tag == "section"] == keys
    files.save(tiny_config("ddpm"), tmp_path / "config.json")
    bare = Page(write_report([tmp_path], tmp_path / "report.html").read_text())
    assert [a["id"] for tag, a in bare.tags if tag == "section"] == ["overview", "config"]


@pytest.mark.parametrize("kind", ["*.json*", "*.png", "*.npz", "metadata"])
def test_damaged_files_are_as_good_as_none(tmp_path, kind):
    run = synthetic.make_run(tmp_path / "run")
    damaged = [path for path in run.rglob(kind) if path.name != "config.json"]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "latent diffusion" in Page(write_report([run], tmp_path / "report.html").read_text()).words


def test_pictures_are_reduced_to_the_budget_and_it_is_said(tmp_path):
    run = synthetic.make_run(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (20, 300, 300, 3), dtype=np.uint8)
    for k, image in enumerate(noise):
        path = run / "samples" / f"diffusion-{1000 + k:07d}-raw-ema.png"
        images.save_png(path, images.side_by_side(image, image))
    limit = 2_800_000
    report = write_report([run], tmp_path / "report.html", limit)
    words = Page(report.read_text()).words
    assert report.stat().st_size < limit and re.search(r"grids of run, diffusion: \d+ of 24", words)
    assert "kept with loss" in words
    tiny = write_report([run], tmp_path / "tiny.html", 100_000)
    assert "pictures are left out" in Page(tiny.read_text()).words


def test_even_choices_keep_the_ends():
    assert pictures.evenly(range(100), 4) == [0, 33, 66, 99] and pictures.evenly([1, 2], 4) == [1, 2]


def test_small_pictures_are_kept_without_loss():
    album = pictures.Album(pictures.LEVELS[0], 10**6)
    image = synthetic.sheet(0)
    kept = album.add(image, "a sheet")
    decoded = Image.open(io.BytesIO(base64.b64decode(kept.src.partition(",")[2]))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decoded), image)
    assert album.spent == len(kept.src) and album.notes() == []


def test_raw_and_averaged_are_taken_apart(tmp_path):
    path = images.save_png(tmp_path / "a.png", images.side_by_side(synthetic.sheet(0), synthetic.sheet(1)))
    for half, seed in zip(pictures.halves(path), (0, 1), strict=True):
        np.testing.assert_array_equal(half, synthetic.sheet(seed))
    assert len(pictures.halves(images.save_png(tmp_path / "b.png", synthetic.sheet(0)))) == 1


def test_no_score_stands_without_its_protocol(run):
    (table,) = scores.record_tables([reading.read_run(run, "one")])
    head = [h.text for h in table.head]
    assert head == ["Run", "Sampler", "Steps", "w", "N", "FD ↓", "KID ↓", "kNN accuracy ↑"]
    facts = dict(table.facts)
    assert (facts["Reference"], facts["Extractor"]) == ("val, 297 images", "effnet_lite0")
    assert facts["Real images (the floor)"] == "train, 1,000 images"
    row = next(r for r in table.rows if [c.text for c in r[1:4]] == ["ddim", "20", "1.5"])
    assert row[4].text == "1,000" and row[5] == tables.Cell("18.1", ("real 18.0",), "at floor", strong=True)
    assert row[6].notes == ("0.00100 to 0.00300", "no floor") and row[7] == row[7]._replace(
        notes=("real 0.980",), mark=""
    )
    assert dict(table.details[0].facts)["extractor.weights_sha256"] == "cd" * 32


def test_another_reference_or_extractor_is_another_table(run):
    first = reading.read_run(run, "one")
    other = synthetic.record("ddim", 5, 0.0)
    other["protocol"]["reference"] = {"name": "train", "num": 1500}
    assert len(scores.record_tables([first._replace(records=[*first.records, other])])) == 2


def test_likelihoods_are_a_table_of_their_own(run):
    first = reading.read_run(run, "one")
    bits = {"bits_per_dim": 3.327, "bits_per_dim_prior": 1e-5}
    protocol = {"num": 256, "images": "validation images' likelihood", "bound": "all 1000 terms", "step": 400}
    record = {"scores": bits, "floor": {}, "protocol": protocol, "seconds": {}, "pictures": {}}
    run_with = first._replace(records=[record, *first.records])
    table, _ = scores.record_tables([run_with])
    assert table.title == "Likelihood of validation images" and dict(table.facts) == {"Bound": "all 1000 terms"}
    assert [c.text for c in table.rows[0]][:3] == ["one", "256", "3.33"]
    assert sections.best_fact(run_with) == sections.best_fact(first)


def test_scores_of_old_runs_say_what_is_not_recorded(run):
    first = reading.read_run(run, "one")._replace(
        validation={"val_loss": 0.1, "knn_accuracy": 1.0, "knn_accuracy_real": 0.98}
    )
    validation, final = scores.validation_tables([first])
    assert [c.text for c in validation.rows[0]] == ["one", "not recorded", "0.1"]
    assert [c.text for c in scores.validation_tables([reading.read_run(run, "one")])[0].rows[0]] == [
        *("one", "297", "0.117")
    ]
    assert [c.text for c in final.rows[0]] == ["one", "16", "1"] and final.rows[0][2].mark == "at floor"


def test_scores_are_at_the_floor_from_either_side():
    assert scores.at_floor("fid", 10.1, 10) and not scores.at_floor("fid_50k", 11, 10)
    assert scores.at_floor("recall_x", 0.79, 0.8) and not scores.at_floor("precision_x", 0.7, 0.8)


def test_times_stand_apart_from_compilation(run):
    table = tables.latency_table([reading.read_run(run, "one")])
    assert [c.text for c in table.rows[0]] == ["one", "ddim", "5", "0", "1,000", "1.25", "800", "12.1", "1 x cpu"]
    assert tables.latency_table([reading.read_run(run / "autoencoder", "vae")]) is None


def test_compilations_stand_with_the_start_above_them(run):
    table = tables.start_table(reading.read_run(run, "one"))
    (row,) = table.rows
    assert row[-1].text == "autoencoder 12.3 s; diffusion 72.1 s"


def test_the_distance_to_training_images_has_no_better_side(run):
    records = [synthetic.record("ddim", 5, 0.0), synthetic.record("ddim", 20, 0.0)]
    for k, record in enumerate(records):
        record["scores"], record["floor"] = {"nearest_train": 0.1 + k}, {"nearest_train": 5.0}
    one = reading.read_run(run, "one")._replace(records=records)
    cells = scores.score_column(records, "nearest_train")
    assert [(cell.text, cell.mark, cell.strong) for cell in cells] == [("0.10", "", False), ("1.10", "", False)]
    assert scores.score_head("nearest_train").text == "Nearest" and sections.best_fact(one) is None
    (found,) = galleries.maps([one], pictures.Album(pictures.LEVELS[0], 10**6))
    (variant,) = found["variants"]
    assert "better" not in variant["note"] and not any(cell["best"] for cell in variant["cells"].values())


def test_times_of_denoising_are_those_of_the_schedule(tmp_path):
    run = synthetic.make_run(tmp_path / "run")
    with np.load(run / "samples" / "denoising.npz") as file:
        arrays = {name: file[name] for name in file.files}
    t = np.array([1.0, 0.75, 0.5, 0.25, 0.125], np.float32)
    np.savez(run / "samples" / "denoising.npz", **{**arrays, "t": t})
    (strip,) = galleries.denoising([reading.read_run(run, "one")], pictures.Album(pictures.LEVELS[0], 10**6))
    assert strip["times"] == ["1", "0.75", "0.5", "0.25", "0.125"]


def test_the_last_samples_of_the_end_are_shown(tmp_path):
    run = synthetic.make_run(tmp_path / "run")
    last = synthetic.pictures(4, 99)
    images.save_png(run / "samples" / "final-2.png", images.grid(last, 2))
    np.savez(run / "samples" / "final-2.npz", arr_0=last, arr_1=np.arange(4) % 3)
    files.write_json(run / "samples" / "final-2.json", {"sampler": "ddim", "steps": 7, "num": 4})
    for suffix in ("png", "npz"):
        os.utime(run / "samples" / f"final.{suffix}", (1, 1))
    figures = galleries.drawn([reading.read_run(run, "one")], pictures.Album(pictures.LEVELS[0], 10**6))
    assert figures[0]["title"] == "one: final samples" and figures[0]["note"].startswith("ddim, 7 steps; 4 images")
    (shown,) = galleries.classes([reading.read_run(run, "one")], pictures.Album(pictures.LEVELS[0], 10**6))
    assert "final-2.npz" in str(shown)


def test_configs_are_compared_by_what_differs(run):
    runs = [reading.read_run(run, "one"), reading.read_run(run, "two"), reading.read_run(run / "autoencoder", "vae")]
    runs[1].config.lr = 0.5
    (table,) = tables.config_tables(runs[:2])
    assert [[c.text for c in row] for row in table.rows] == [["lr", "0.001", "0.5"]] and not table.details
    (table,) = tables.config_tables(runs)
    assert "sample.sampler" in [row[0].text for row in table.details[0].rows]
    assert tables.config_tables(runs[:1]) == []


@pytest.mark.parametrize(
    "value, shown",
    [
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (0.0664934, "0.06649"),
        (-1e-9, "−1e−09"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_numbers_are_short(value, shown):
    assert text.figures(value) == shown
