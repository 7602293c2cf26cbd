"""The beginning of a ladder's report: its tables, and Figure 1."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import ConfigError
from jaxdiff.ladder.tables import TABLES, fill
from jaxdiff.report import ladders, pictures, reading, write_report
from tests.ladder.synthetic import make_ladder, shade
from tests.report.page import Page


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    return make_ladder(tmp_path_factory.mktemp("ladders") / "study")


def figure_of(folder):
    """Figure 1 of a ladder, and what stands with it; its pixels."""
    (found,) = reading.read_ladders(reading.read_runs([folder]))
    figure = ladders.picture(found, tables_of(found), pictures.Album(pictures.LEVELS[0], 10**6))
    decoded = Image.open(io.BytesIO(base64.b64decode(figure["picture"].src.partition(",")[2])))
    return figure, np.asarray(decoded.convert("RGB"))


def tables_of(found):
    return fill(found.config, found.rungs, {name: run.records for name, run in found.runs.items()})


def test_a_ladder_begins_the_page_with_its_tables(ladder, tmp_path):
    whole = write_report([ladder], tmp_path / "report.html").read_text()
    page = Page(whole)
    assert [a["id"] for tag, a in page.tags if tag == "section"][:2] == ["ladder", "overview"]
    assert "<h1>ladder-digits</h1>" in whole and "autoencoder, ddpm, ldm" in page.words
    places = [page.words.index(w) for w in ("Figure 1", *(table.title for table in TABLES), "Validation loss")]
    assert places == sorted(places)
    assert all(table.compared in page.words for table in TABLES)
    for once in ("N = 300 samples", "(SHA-256 abababababab)", "(SHA-256 cdcdcdcdcdcd)", "Tables 3, 4, 5"):
        assert page.words.count(once) == 1
    for names, there in ((("ldm", "ddpm"), True), (("autoencoder", "ddpm"), False)):  # ldm brings its autoencoder
        runs = reading.read_runs([ladder / name for name in names])
        assert bool(reading.read_ladders(runs)) == there


def test_tables_of_a_ladder_are_those_of_its_results(ladder):
    (found,) = reading.read_ladders(reading.read_runs([ladder]))
    ddim, guided = (ladders.table_of(tables_of(found)[k]) for k in (1, 3))
    assert [h.text for h in ddim.head][2:] == [
        *("FD ↓", "KID ↓", "kNN accuracy ↑", "Sampling, s", "Images/s", "Compiling, s", "Speed-up")
    ]
    assert [row[0].text for row in ddim.rows] == ["DDPM, 100 steps", *(f"DDIM, {n} steps" for n in (50, 100, 200))]
    assert [row[-1].text for row in ddim.rows] == ["1.00×", "2.50×", "1.25×", ""] and ddim.rows[3][1].text == "not yet"
    fd, kid, knn = ddim.rows[0][2:5]
    assert (fd.text, fd.notes, kid.notes[0]) == ("31.50", ("real 18.25",), "0.1250 to 0.5000")
    assert (knn.text, knn.notes) == ("0.8750", ("real 0.9688",))
    assert [row[1].text for row in guided.rows] == ["40", "40", "40", "not yet"] and len(guided.rows[3]) == 8


def test_a_picture_shows_the_same_classes_on_every_rung(ladder):
    figure, pixels = figure_of(ladder)
    rows = ["DDPM, 100 steps", "DDIM, 50 steps", "DDIM, 100 steps", "real images, 16×16"]
    rows += ["latent diffusion, w = 0", "w = 1.5", "w = 2", "real images, 32×32"]
    assert figure["rows"] == rows and figure["columns"] == [f"digit {k}" for k in range(10)]
    assert pixels.shape == (8 * 34 - 2, 10 * 34 - 2, 3)
    expected = [*(shade(k, 0)[0] for k in range(3)), 250, *(shade(k, 0)[0] for k in range(3, 6)), 250]
    for column in range(10):
        place = slice(34 * column, 34 * column + 32)
        for k, red in enumerate(expected):
            image = pixels[34 * k : 34 * k + 32, place]
            assert (image[..., 0] == red).all() and (red == 250 or (image[..., 1] == column).all())
    assert "Not yet: DDIM, 200 steps; w = 3; cosine." in figure["note"] and "seed 0 in all rows" in figure["note"]


def test_a_ladder_of_which_nothing_is_there_yet_is_one_line(tmp_path):
    folder = make_ladder(tmp_path / "study")
    for config in folder.glob("*/config.json"):
        config.unlink()
    with pytest.raises(ConfigError, match=re.escape(f"--workdir={folder}: no training of this ladder has begun yet")):
        write_report([folder], tmp_path / "report.html")


def test_files_of_a_ladder_may_be_damaged(tmp_path):
    folder = make_ladder(tmp_path / "study")
    for path in (folder / "ldm" / "samples").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    figure, _ = figure_of(folder)
    assert figure["rows"] == ["DDPM, 100 steps", "DDIM, 50 steps", "DDIM, 100 steps", "real images"]
    (folder / "ladder.json").write_text("{")
    page = Page(write_report([folder, folder / "ddpm"], tmp_path / "report.html").read_text())
    assert page.words.count("not yet") >= 14 and "Figure 1" not in page.words
