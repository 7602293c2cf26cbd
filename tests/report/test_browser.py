"""The report in a real browser, from a file: nothing fails, everything works by keyboard, and it fits a phone.

Chromium and chromedriver have to be there (on Debian `apt-get install chromium chromium-driver`); without them the
tests are skipped, and fail where the environment says CI=true. JAXDIFF_SCREENSHOTS names a folder for screenshots.
"""

import base64
import io
import itertools
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from jaxdiff.report import curves, write_report
from tests.ladder.synthetic import make_ladder
from tests.report import synthetic

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,900"
)
DRAWN = """return [...document.querySelectorAll('[data-chart]')].filter((f) => !f.closest('details.more'))
  .map((f) => f.querySelector('.plot > *')?.shadowRoot != null)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [synthetic.make_run(folder / synthetic.HOSTILE), synthetic.make_run(folder / "two", seed=50, lr=2e-3)]
    return write_report(runs, folder / "report.html")


@pytest.fixture(scope="module")
def ladder_report(tmp_path_factory):
    folder = make_ladder(tmp_path_factory.mktemp("ladders") / "study")
    return write_report([folder], folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(found):
        missing = "no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, report):
    """Opens the report at a width and colour scheme, with its charts drawn."""

    def open_page(width=1280, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get("about:blank")  # or what an earlier test chose would be kept, as at a reload
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(report.as_uri())
        WebDriverWait(browser, 60).until(lambda b: (drawn := b.execute_script(DRAWN)) and all(drawn))
        return browser

    return open_page


def shot(browser, tmp_path: pathlib.Path, name: str) -> np.ndarray:
    """A screenshot of the whole page, stored: float [h, w, 3]."""
    width, height = browser.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, 8000), "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    picture = base64.b64decode(taken["data"])
    for folder in filter(None, (str(tmp_path), os.environ.get("JAXDIFF_SCREENSHOTS"))):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(folder) / f"report-{name}.png").write_bytes(picture)
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(float)


def shown(browser, section: str) -> list[str]:
    """What the visible panel of the first chooser of a section shows: the source of each picture."""
    panel = browser.find_element(By.CSS_SELECTOR, f"#{section} [data-panel]:not([hidden])")
    return [image.get_attribute("src") for image in panel.find_elements(By.TAG_NAME, "img")]


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_loads_alone_and_fits(opened, ladder_report, tmp_path, width, scheme):
    browser = opened(width, scheme)
    picture = shot(browser, tmp_path, f"{width}-{scheme}")
    assert (np.median(picture) > 200) == (scheme == "light")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in urls} <= {"file", "data", "blob"}
    assert sum(url.startswith("file:") for url in urls) == 1  # the page itself
    assert not [e for e in events if e["method"] == "Network.loadingFailed"]
    assert all(
        browser.execute_script("return [...document.images].map((i) => i.src == 'data:,' || i.naturalWidth > 0)")
    )
    browser.get(ladder_report.as_uri())
    shot(browser, tmp_path, f"ladder-{width}-{scheme}")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    tops, height, labels = browser.execute_script(BESIDE)
    rows = [(k + 0.5) * height / len(labels) for k in range(len(labels))]
    assert labels[0] == "DDPM, 100 steps" and np.abs(np.subtract(tops, rows)).max() < 3  # each beside its own row


BESIDE = """const box = (e) => e.getBoundingClientRect(), image = box(document.querySelector('.climb img'));
  const labels = [...document.querySelectorAll('.climb li')];
  const middle = (e) => (box(e).top + box(e).bottom) / 2 - image.top;
  return [labels.map(middle), image.height, labels.map((e) => e.innerText)]"""
PIXELS = """const inner = (e) => [e, ...(e.shadowRoot ? walk(e.shadowRoot) : [])];
  const walk = (root) => [...root.querySelectorAll('*')].flatMap(inner);
  const near = (d, k, c) => d[k + 3] > 250 && c.every((v, j) => Math.abs(v - d[k + j]) < 24);
  return arguments[1].map((colour) => walk(arguments[0]).filter((e) => e.tagName == 'CANVAS').map((canvas) => {
    const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let k = 0; k < data.length; k += 4) count += near(data, k, colour);
    return count;
  }).reduce((a, b) => a + b, 0));"""


@pytest.mark.parametrize("scheme, label", [("light", (0x5C, 0x62, 0x6C)), ("dark", (0x9B, 0xA2, 0xAC))])
def test_curves_are_drawn_in_colours_of_the_page(opened, scheme, label):
    browser = opened(scheme=scheme)
    figure = browser.find_element(By.CSS_SELECTOR, "[data-chart=diffusion-loss]")
    first, second = ([int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in curves.COLOURS[:2])

    def wait_for(*signs: bool) -> None:
        """Until there are many pixels, or none, of the first run's colour, the second's, and that of labels."""

        def seen(_):
            counts = browser.execute_script(PIXELS, figure, [first, second, label])
            return all(n > 30 if sign else n == 0 for n, sign in zip(counts, signs, strict=True))

        WebDriverWait(browser, 30).until(seen)

    wait_for(True, True, True)
    inputs = browser.find_elements(By.CSS_SELECTOR, "[data-run]")
    inputs[1].send_keys(Keys.SPACE)
    wait_for(True, False, True)
    inputs[0].send_keys(Keys.SPACE)
    wait_for(False, False, True)


def test_hovering_tells_the_value_and_the_name_as_text(opened):
    browser = opened()
    plot = browser.find_element(By.CSS_SELECTOR, "[data-chart=diffusion-grad_norm] .plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    find = """const inner = (e) => [e, ...(e.shadowRoot ? walk(e.shadowRoot) : [])];
      const walk = (root) => [...root.querySelectorAll('*')].flatMap(inner);
      const all = walk(document), words = all.map((e) => e.shadowRoot?.textContent ?? '').join(' ');
      return [words, all.filter((e) => e.hasAttribute('onerror')).length]"""

    places = itertools.cycle(range(-40, 40, 7))

    def tip(_):
        ActionChains(browser).move_to_element_with_offset(plot, next(places), 0).perform()
        return "at step" in browser.execute_script(find)[0]

    WebDriverWait(browser, 20).until(tip)
    words, harmful = browser.execute_script(find)
    assert synthetic.HOSTILE in words and harmful == 0


def test_arrow_keys_move_the_slider_and_its_fellow(opened, tmp_path):
    browser = opened()
    sliders = browser.find_elements(By.CSS_SELECTOR, "#training input[type=range]")
    last = shown(browser, "training")
    assert len(last) == 2 and sliders[0].get_attribute("aria-valuetext") == "step 400"
    sliders[0].send_keys(Keys.ARROW_LEFT)
    assert set(shown(browser, "training")).isdisjoint(last)
    outputs = [o.text for o in browser.find_elements(By.CSS_SELECTOR, "#training output")]
    assert outputs == ["300", "300", "200", "200"]  # of both runs; the autoencoders' stay
    browser.find_element(By.ID, "together").send_keys(Keys.SPACE)
    sliders[0].send_keys(Keys.HOME)
    outputs = [o.text for o in browser.find_elements(By.CSS_SELECTOR, "#training output")]
    assert outputs == ["100", "300", "200", "200"]
    shot(browser, tmp_path, "slider")


def test_classes_and_samplers_are_chosen_by_keyboard(opened):
    browser = opened()
    for section, choices in (("classes", 3), ("guidance", 2)):
        first = shown(browser, section)
        radio = browser.find_element(By.CSS_SELECTOR, f"#{section} input:checked")
        radio.send_keys(Keys.ARROW_RIGHT)
        assert first and set(shown(browser, section)).isdisjoint(first)
        for _ in range(choices - 1):
            browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert shown(browser, section) == first
    titles = [c.text for c in browser.find_elements(By.CSS_SELECTOR, "#classes [data-panel]:not([hidden]) figcaption")]
    assert titles == ["real images", f"{synthetic.HOSTILE}, final.npz", "two, final.npz"]


def test_pictures_are_enlarged_and_closed_by_keyboard(opened):
    browser = opened()
    button = browser.find_element(By.CSS_SELECTOR, "#guidance .zoom")
    small = button.find_element(By.TAG_NAME, "img")
    button.send_keys(Keys.ENTER)
    large = browser.find_element(By.CSS_SELECTOR, "#large img")
    assert large.is_displayed() and large.get_attribute("src") == small.get_attribute("src")
    assert large.size["width"] > small.size["width"]
    assert "N = 1,000 against val, 297 images; extractor effnet_lite0" in browser.find_element(By.ID, "large").text
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    WebDriverWait(browser, 5).until(lambda _: not large.is_displayed())
    assert browser.switch_to.active_element == button


def test_numbers_of_a_curve_can_be_had(opened):
    browser = opened()
    browser.execute_script(
        "HTMLAnchorElement.prototype.click = function () { window.link = this; fetch = null; };"
        "URL.createObjectURL = (blob) => { window.blob = blob; return 'data:,'; }"
    )
    figure = browser.find_element(By.CSS_SELECTOR, "[data-chart=diffusion-loss]")
    figure.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert "0.1333" in figure.find_element(By.TAG_NAME, "table").text
    figure.find_element(By.CSS_SELECTOR, "[data-csv]").send_keys(Keys.ENTER)
    text = browser.execute_async_script("window.blob.text().then(arguments[0])")
    lines = text.splitlines()
    assert lines[0] == "run,step,images,value,smoothed" and len(lines) == 1 + 2 * 60
    assert lines[7].startswith(f'"{synthetic.HOSTILE}",46,448,,')  # the loss that was null
    assert browser.execute_script("return window.link.download") == "diffusion-loss.csv"


def test_folded_curves_are_drawn_when_they_are_opened(opened):
    browser = opened()
    more = browser.find_element(By.CSS_SELECTOR, "details.more")
    assert not more.find_elements(By.CSS_SELECTOR, ".plot > *")
    more.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: more.find_elements(By.CSS_SELECTOR, ".plot > *"))
