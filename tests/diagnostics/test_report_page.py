"""The page in a real browser: headless Chromium, driven over WebDriver.

On Debian: `apt-get install chromium chromium-driver`. Without them these tests are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvsplit.diagnostics.report import write_report
from tests.diagnostics.browser import (
    ActionChains,
    Page,
    WebDriverWait,
    needs_browser,
    start_browser,
)
from tests.diagnostics.report_reader import half_a_level, page_data
from tests.diagnostics.synthetic import write_lines, write_run

pytestmark = needs_browser
SECTIONS = ("glance", "timeline", "depth", "modes", "law", "extinction", "autopsy", "settings")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    root = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(root / "plain", collapses=True, steps=300, layers=24),
        write_run(root / "mvsplit", collapses=False, steps=300, layers=24),
    ]
    return folders, write_report(folders, root / "report.html")


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    """A fresh page; whatever a test does with it, it must not complain or reach out."""
    page = Page(driver)
    yield page
    assert page.complaints() == []
    schemes = {url.split(":", 1)[0] for url in page.requests()}
    assert schemes <= {"file", "data", "blob"}


def probes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]


def test_every_section_fills(page, twins):
    page.open(twins[1])
    for section in SECTIONS:
        page.go_to(section)
    assert len(page.all(".plot .main-svg")) > 0
    assert page.all(".plot.absent") == []
    assert page.js("return document.querySelectorAll('#strips img').length") == 8
    assert all(page.js("return [...document.images].map((i) => i.complete && i.naturalWidth > 0)"))
    verdicts = [card.text for card in page.all("#verdicts .card")]
    assert "mean-mode" in verdicts[0]
    assert "layer 16" in verdicts[0]
    assert "no verdict" in verdicts[1]  # the healthy run's log holds saves only


def test_the_timeline_draws_the_log_and_its_events(page, twins):
    page.open(twins[1])
    lines = (twins[0][0] / "metrics.jsonl").read_text().splitlines()
    curve = next(t for t in page.traces("plot-loss") if t["name"] == "plain" and not t["yaxis"])
    np.testing.assert_allclose(curve["y"], [json.loads(line)["loss"] for line in lines], rtol=1e-6)
    marks = next(t for t in page.traces("plot-loss") if t["name"] == "plain" and t["yaxis"] == "y2")
    events = [json.loads(x) for x in (twins[0][0] / "events.jsonl").read_text().splitlines()]
    assert marks["x"] == [event["step"] for event in events]
    assert "alarm: mean-mode, layer 16" in marks["text"]
    page.pick("#field", "lr")
    page.wait("return document.getElementById('plot-field').data[0].y[0] === 0")


def test_a_metric_is_switched_and_drawn_as_logged(page, twins):
    page.open(twins[1])
    page.go_to("depth")
    scales = page_data(twins[1])["scales"]
    for metric in ("g_mean_ffn", "mu_eff"):
        before = page.levels(0)
        page.pick("#metric", metric)
        page.wait(f"return document.getElementById('metric').value === '{metric}'")
        WebDriverWait(page.driver, 20).until(
            lambda d, before=before: not np.array_equal(page.levels(0), before)
        )
        scale = scales[metric]
        low, high = scale["low"], scale["high"]
        for run, folder in enumerate(twins[0]):
            v = np.array([line[metric] for line in probes(folder)]).T
            exact = (
                np.log(v / low) / np.log(high / low) if scale["log"] else (v - low) / (high - low)
            )
            assert np.abs(page.levels(run) - 253 * exact).max() <= 0.501


def test_a_pointed_at_layer_is_read_in_every_run(page, twins):
    page.open(twins[1])
    page.go_to("depth")
    page.pick("#metric", "rho")
    page.wait("return document.querySelector('#metric-caption').textContent.includes('trunk')")
    page.wait("return document.querySelectorAll('#maps .nsewdrag').length === 2")
    ActionChains(page.driver).move_to_element(page.all("#maps .nsewdrag")[0]).perform()
    page.wait("return document.getElementById('readout').textContent.startsWith('Layer ')")
    text = page.find("#readout").text.replace("\u2009", "")
    layer = int(re.match(r"Layer (\d+)", text)[1])
    assert 8 < layer < 16  # the middle of 24
    scale = page_data(twins[1])["scales"]["rho"]
    for folder in twins[0]:
        value, step = re.search(rf"(\S+) {folder.name} \(step (\d+)\)", text).groups()
        logged = next(line["rho"][layer] for line in probes(folder) if line["step"] == int(step))
        slack = half_a_level(np.array(logged), scale) + 5e-4 * logged  # four digits are shown
        assert abs(float(value) - logged) <= slack
    assert page.find("#profile-title").text.replace("\u2009", "").endswith(f"step {step}")


def test_runs_stand_side_by_side_with_one_scale(page, twins):
    page.open(twins[1])
    page.go_to("depth")
    boxes = [plot.rect for plot in page.all("#maps .plot")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    script = (
        "return [...document.querySelectorAll('#maps .plot')].map((p) => [p.layout.xaxis.range,"
    )
    looks = page.js(script + " p.layout.yaxis.range, p.data[0].zmin, p.data[0].zmax])")
    assert looks[0] == looks[1]


def test_a_run_is_hidden_and_shown_again(page, twins):
    page.open(twins[1])
    page.go_to("depth")
    page.all("#runs .chip")[0].click()
    page.wait("return document.querySelectorAll('#maps .plot').length === 1")
    assert page.find("#maps").text.startswith("mvsplit")
    assert {t["name"] for t in page.traces("plot-loss")} == {"mvsplit"}
    page.all("#runs .chip")[0].click()
    page.wait("return document.querySelectorAll('#maps .plot').length === 2")


def test_a_metric_that_no_shown_run_has_is_said_to_be_missing(page, tmp_path):
    for name, fields in (("a", ["tcs", "rho"]), ("b", ["tcs"])):
        (tmp_path / name).mkdir()
        lines = [{"step": s} | {field: [0.5, 1.0] for field in fields} for s in (0, 1)]
        write_lines(tmp_path / name / "layers.jsonl", lines)
    page.open(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html"))
    page.go_to("depth")
    page.pick("#metric", "rho")
    page.wait("return document.querySelectorAll('#maps .plot').length === 1")
    page.all("#runs .chip")[0].click()
    page.wait("return document.querySelectorAll('#maps .plot').length === 0")
    page.find("#theme").click()  # draws again what is drawn, and nothing else
    assert page.find("#plot-profile").text == "Not recorded by any run on show."
    page.pick("#metric", "tcs")
    page.wait("return document.querySelectorAll('#maps .plot').length === 1")
    page.wait("return document.getElementById('plot-profile').data?.[0].name === 'b'")
    assert "Not recorded" not in page.find("#plot-profile").text


def test_a_zoom_is_followed_by_every_picture_over_steps(page, twins):
    page.open(twins[1])
    page.go_to("depth")
    page.js("Plotly.relayout('plot-loss', {'xaxis.range[0]': 50, 'xaxis.range[1]': 90})")
    ranges = (
        "[...document.querySelectorAll('#maps .plot, #plot-field')]"
        ".map((p) => p.layout.xaxis.range.map(Math.round).join())"
    )
    page.wait(f"return {ranges}.every((r) => r === '50,90')")
    page.js("Plotly.relayout('plot-loss', {'xaxis.autorange': true})")
    page.wait(f"return {ranges}.every((r) => r !== '50,90')")


def test_light_and_dark(page, twins):
    ground = "return getComputedStyle(document.body).backgroundColor"
    line = "return document.getElementById('plot-loss').data[0].line.color"
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.open(twins[1])
        seen[scheme] = page.js(ground), page.js(line)
    assert seen["light"] != seen["dark"]
    page.find("#theme").click()
    page.wait(f"{line} === '{seen['light'][1]}'")
    assert page.js(ground) == seen["light"][0]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_needs_no_sideways_scrolling(page, twins):
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.open(twins[1])
    for section in SECTIONS:
        page.go_to(section)
    assert page.js("return document.documentElement.scrollWidth") == 360
    boxes = [plot.rect for plot in page.all("#maps .plot")]
    assert boxes[0]["y"] + boxes[0]["height"] < boxes[1]["y"]
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_run_without_anything_says_what_is_missing(page, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page.open(write_report([tmp_path], tmp_path / "r.html"))
    for section in SECTIONS[:-1]:
        page.go_to(section)
    absent = page.all(".plot.absent")
    assert len(absent) == 8
    assert all("Not recorded" in plot.text for plot in absent)


def test_values_that_are_not_finite_are_shown(page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n'
    )
    (tmp_path / "layers.jsonl").write_text(
        '{"step": 0, "tcs": [0.5, 0.5]}\n{"step": 2, "tcs": [NaN, null]}\n'
    )
    page.open(write_report([tmp_path], tmp_path / "r.html"))
    assert [t["x"] for t in page.traces("plot-loss") if t["yaxis"] == "y2"] == [[1]]
    page.go_to("depth")
    cells = page.js(
        "return document.querySelector('#maps .plot').data.map((t) => t.z.map((r) => [...r]))"
    )
    level = pytest.approx(126, abs=1)
    assert cells == [[[level, None], [level, None]], [[None, 1], [None, None]]]
    assert "NaN or infinite" in page.find("#scale").text


def test_nothing_of_a_log_runs(page, tmp_path):
    attack = '</script><img src=x onerror="window.taken=1"><a href="javascript:taken=1">go</a>'
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "loss": 1, attack: 2} for s in (0, 1)])
    write_lines(tmp_path / "layers.jsonl", [{"step": s, attack: [1.0, 2.0]} for s in (0, 1)])
    event = {"step": 1, "level": "alarm", "verdict": attack, "layer": attack, "message": attack}
    write_lines(tmp_path / "events.jsonl", [event | {"evidence": {attack: attack}}])
    (tmp_path / "config.json").write_text(json.dumps({attack: attack}))
    page.open(write_report([tmp_path], tmp_path / "r.html"))
    for section in SECTIONS:
        page.go_to(section)
    assert page.js("return window.taken") is None
    assert page.js("return document.querySelectorAll('img, a').length") == 0
    assert attack in page.find("#events").text


def test_fields_of_any_name_are_shown(page, tmp_path):
    names = ["constructor", "__proto__", "two\nlines", "", "tcs_ffn_segment_3"]
    text = "".join(
        json.dumps({"step": s} | {name: [0.5, 1.0] for name in names}) + "\n" for s in (0, 1)
    )
    (tmp_path / "layers.jsonl").write_text(text)
    page.open(write_report([tmp_path], tmp_path / "r.html"))
    page.go_to("depth")
    labels = {o.get_property("value"): o.get_property("text") for o in page.all("#metric option")}
    assert labels == {
        "constructor": "constructor",
        "__proto__": "proto",
        "two\nlines": "two lines",
        "": "",
        "tcs_ffn_segment_3": "Token cosine similarity, FFN, segment 3",
    }
