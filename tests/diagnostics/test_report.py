"""What the page carries, against the logs it was made from."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mvsplit import cli
from mvsplit.diagnostics.report import PAGE_BUDGET, write_report
from mvsplit.diagnostics.report_layers import LayerMap
from mvsplit.diagnostics.report_pack import pack_runs, quantise, scale_of
from mvsplit.diagnostics.report_run import MOST_EVENTS, RunRecord, read_run
from mvsplit.errors import UserError
from tests.diagnostics.report_reader import (
    half_a_level,
    page_data,
    unpack_array,
    unpack_map,
    values_of,
)
from tests.diagnostics.synthetic import FIELDS, write_lines, write_run


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Two run folders, the lines of their logs, and the data of their page."""
    root = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(root / "plain", collapses=True, steps=300),
        write_run(root / "mvsplit", collapses=False, steps=300),
    ]
    page = write_report(folders, root / "report.html")
    return folders, page_data(page), page


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("field", FIELDS)
def test_maps_decode_to_the_log_within_half_a_level(twins, field):
    folders, data, _ = twins
    scale = data["scales"][field]
    for folder, run in zip(folders, data["runs"], strict=True):
        lines = read_lines(folder / "layers.jsonl")
        steps, levels = unpack_map(run["maps"][field])
        values = np.array([line[field] for line in lines]).T
        np.testing.assert_array_equal(steps, [line["step"] for line in lines])
        held = np.clip(values, scale["low"], scale["high"])
        rounding = 1e-6 * np.abs(held)
        assert np.all(
            np.abs(values_of(levels, scale) - held) <= half_a_level(held, scale) + rounding
        )
        if not scale["log"]:
            np.testing.assert_allclose(held, values, rtol=1e-6)  # nothing lies off the scale


def test_curves_are_the_log(twins):
    folders, data, _ = twins
    for folder, run in zip(folders, data["runs"], strict=True):
        lines = read_lines(folder / "metrics.jsonl")
        for field in ("loss", "grad_norm", "grad_writer_attn", "grad_query", "lr"):
            curve = run["series"][field]
            assert curve["stride"] == 1
            np.testing.assert_array_equal(
                unpack_array(curve["step"], "f8"), [line["step"] for line in lines]
            )
            expected = np.array([line[field] for line in lines], dtype=np.float32)
            np.testing.assert_array_equal(unpack_array(curve["mean"], "f4"), expected)


def test_writer_gradients_are_joined_over_depth(twins):
    folders, data, _ = twins
    for folder, run in zip(folders, data["runs"], strict=True):
        for field in ("g_mean_attn", "g_ctr_attn", "g_mean_ffn", "g_ctr_ffn"):
            lines = read_lines(folder / "layers.jsonl")
            expected = [np.linalg.norm(line[field]) for line in lines]
            joined = unpack_array(run["series"][f"depth:{field}"]["mean"], "f4")
            np.testing.assert_allclose(joined, expected, rtol=1e-6)


def test_queries_and_similarity_are_those_of_the_deepest_quarter(tmp_path):
    line = {"step": 0, "grad_query": [9.0] * 6 + [3.0, 4.0], "tcs": [0.0] * 6 + [0.5, 1.0]}
    write_lines(tmp_path / "layers.jsonl", [line])
    (run,) = page_data(write_report([tmp_path], tmp_path / "r.html"))["runs"]
    assert unpack_array(run["series"]["grad_query"]["mean"], "f4") == pytest.approx([5.0])
    assert unpack_array(run["series"]["depth:tcs"]["mean"], "f4") == pytest.approx([0.75])


def test_a_curve_of_the_metrics_is_not_replaced_by_that_of_the_layers(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "grad_query": 7.0}])
    write_lines(tmp_path / "layers.jsonl", [{"step": 0, "grad_query": [1.0]}])
    (run,) = page_data(write_report([tmp_path], tmp_path / "r.html"))["runs"]
    assert unpack_array(run["series"]["grad_query"]["mean"], "f4") == pytest.approx([7.0])


def test_alignment_points_are_those_of_the_log(twins):
    folders, data, _ = twins
    for folder, run in zip(folders, data["runs"], strict=True):
        lines = {line["step"]: line for line in read_lines(folder / "layers.jsonl")}
        points = run["alignment"]["ffn"]
        step, layer = unpack_array(points["step"], "f8"), unpack_array(points["layer"], "f4")
        found = zip(step, layer.astype(int), strict=True)
        a, e = np.array(
            [[lines[s][f"{n}_ffn"][i] for n in ("amplification", "envelope")] for s, i in found]
        ).T
        np.testing.assert_allclose(unpack_array(points["excess"], "f4"), a - 1, atol=1e-5)
        np.testing.assert_allclose(unpack_array(points["envelope"], "f4"), e, rtol=1e-6)
        assert points["of"] == 30 * 48
        assert len(np.unique(np.stack([step, layer]), axis=1).T) == len(step) == 30 * 48


def test_levels_of_what_is_not_finite_or_not_measured():
    values = np.array([[np.nan, np.inf, 0.0, 1.0, 0.5]], dtype=np.float32)
    scale = scale_of("tcs", [LayerMap(np.arange(5), values)])
    assert (scale.low, scale.high, scale.log) == (0.0, 1.0, False)
    np.testing.assert_array_equal(quantise(values, scale), [[255, 254, 0, 253, 126]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-6, 1.0], (pytest.approx(1e-6), 1.0, True)),
        ([1e-20, 1.0], (pytest.approx(1e-9), 1.0, True)),
        ([0.0, 1e-3, 1.0], (pytest.approx(1e-3), 1.0, True)),
        ([0.5, 1.0], (0.5, 1.0, False)),
        ([-1e-3, 1.0], (pytest.approx(-1e-3), 1.0, False)),
        ([3.0, 3.0], (3.0, 3.0, False)),
        ([0.0, 0.0], (0.0, 0.0, False)),
        ([np.nan, np.inf], (0.0, 1.0, False)),
    ],
)
def test_the_scale_of_a_field(values, expected):
    m = LayerMap(np.arange(len(values)), np.array([values], dtype=np.float32))
    scale = scale_of("g_mean_attn", [m])
    assert (scale.low, scale.high, scale.log) == expected
    assert quantise(m.values, scale).shape == m.values.shape


def noise_run(name: str, layers: int, probes: int) -> RunRecord:
    values = np.random.default_rng(0).random((layers, probes), dtype=np.float32)
    return RunRecord(name, maps={"tcs": LayerMap(np.arange(probes), values)})


def test_a_heavy_page_keeps_fewer_probes_and_says_so():
    runs = [noise_run("a", 100, 400), noise_run("b", 100, 200)]
    budget = 30_000
    data = pack_runs(runs, budget)
    assert budget / 2 < len(json.dumps(data)) <= budget + 200  # the scales come on top
    for run, packed in zip(runs, data["runs"], strict=True):
        steps, levels = unpack_map(packed["maps"]["tcs"])
        assert (steps[0], steps[-1]) == (0, len(run.maps["tcs"].steps) - 1)
        kept = run.maps["tcs"].values[:, steps.astype(int)]
        np.testing.assert_allclose(values_of(levels, data["scales"]["tcs"]), kept, atol=0.002)
        assert "of the probes" in packed["notes"][-1]


def test_a_budget_that_nothing_fits_ends_with_two_probes():
    (run,) = pack_runs([noise_run("a", 100, 64)], budget=10)["runs"]
    steps, _ = unpack_map(run["maps"]["tcs"])
    np.testing.assert_array_equal(steps, [0, 63])


def test_a_light_page_keeps_every_probe(twins):
    _, data, page = twins
    assert page.stat().st_size < PAGE_BUDGET
    assert all(not run["notes"] for run in data["runs"])


def test_any_subset_of_the_files_makes_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (run,) = page_data(write_report([tmp_path], tmp_path / "r.html"))["runs"]
    assert (run["series"], run["maps"], run["events"], run["pictures"]) == ({}, {}, [], [])


def test_the_page_says_what_was_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\nnoise\n{"step": 1, "lo')
    (tmp_path / "config.json").write_text("{")
    notes = read_run(tmp_path).notes
    assert notes == [
        "config.json could not be read as JSON and is left out.",
        "metrics.jsonl, lines left out: cut short at the end (1), not a JSON object (1).",
    ]


def test_alarms_are_kept_where_events_are_many(tmp_path):
    events = [{"step": s, "event": "saved"} for s in range(5000)]
    events.append({"step": 5000, "level": "alarm", "verdict": "mean-mode"})
    write_lines(tmp_path / "events.jsonl", events)
    run = read_run(tmp_path)
    assert len(run.events) <= MOST_EVENTS
    assert run.events[-1]["verdict"] == "mean-mode"
    assert run.watched
    assert "4,800 later events" in run.notes[0]


@pytest.mark.parametrize(("event", "watched"), [("watching", True), ("saved", False)])
def test_a_healthy_run_counts_as_watched_where_somebody_said_so(tmp_path, event, watched):
    write_lines(tmp_path / "events.jsonl", [{"step": 0, "event": event, "level": "info"}])
    (run,) = page_data(write_report([tmp_path], tmp_path / "r.html"))["runs"]
    assert run["watched"] is watched


def test_all_events_of_a_step_are_kept_and_their_numbers_fit_json(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(
        '{"step": 3, "event": "nonfinite", "evidence": {"loss": NaN, "norm": Infinity}}\n'
        '{"step": 3, "event": "stopped"}\n'
    )
    (run,) = page_data(write_report([tmp_path], tmp_path / "r.html"))["runs"]
    assert [event["event"] for event in run["events"]] == ["nonfinite", "stopped"]
    assert run["events"][0]["level"] == "alarm"
    assert run["events"][0]["evidence"] == {"loss": "nan", "norm": "inf"}


def test_settings_are_flat_names(twins):
    _, data, _ = twins
    assert data["runs"][0]["settings"]["model.rule.name"] == "plain"
    assert data["runs"][1]["settings"]["optimiser.lr"] == "0.001"


def test_pictures_are_embedded_evenly_and_in_order(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 1}])
    (tmp_path / "samples" / "step_20_seven").mkdir(parents=True)
    for step in range(15):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(tmp_path / "samples" / f"step_{step}.png")
    Image.new("RGB", (900, 30)).save(tmp_path / "samples" / "step_20_seven" / "grid.png")
    (tmp_path / "samples" / "step_16.png").write_bytes(b"no picture")
    run = read_run(tmp_path)
    names = [picture.name for picture in run.pictures]
    assert names == [*(f"step_{s}" for s in (0, 2, 5, 7, 9, 11, 14)), "step_20_seven"]
    assert all(picture.data.startswith("data:image/png;base64,") for picture in run.pictures)


def test_nothing_of_a_log_becomes_markup(tmp_path):
    attack = '</script><script>alert(1)</script><!--<img src=x onerror="alert(2)">'
    folder = tmp_path / "run<b>&{{data}}"
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", [{"step": 0, "loss": 1, attack: 2}])
    write_lines(folder / "layers.jsonl", [{"step": 0, attack: [1.0]}])
    write_lines(folder / "events.jsonl", [{"step": 0, "event": attack, attack: attack}])
    (folder / "config.json").write_text(json.dumps({attack: attack}))
    page = write_report([folder], tmp_path / "r.html")
    html = page.read_text()
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "<title>run&lt;b&gt;&amp;{{data}}</title>" in html
    assert page_data(page)["runs"][0]["events"][0]["event"] == attack


class _Addresses(HTMLParser):
    """What the elements of a page name to load or to lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_names_no_other_address(twins):
    addresses = _Addresses()
    addresses.feed(twins[2].read_text())
    assert addresses.found == ["data:,"]


@pytest.mark.parametrize("runs", [[], ["absent"], ["empty"]])
def test_what_is_no_run_is_one_line(tmp_path, monkeypatch, runs, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", *runs]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mvsplit: run")
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, "loss": 1}])
    with pytest.raises(UserError, match=r"nowhere.*cannot be written: No such file"):
        write_report([tmp_path], tmp_path / "nowhere" / "r.html")


def test_the_command_writes_into_the_first_run_or_where_it_is_told(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "metrics.jsonl", [{"step": 0, "loss": 1}])
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(["report", *runs]) == 0
    assert [run["name"] for run in page_data(tmp_path / "a" / "report.html")["runs"]] == ["a", "b"]
    assert cli.main(["report", runs[1], "--out", str(tmp_path / "x.html")]) == 0
    assert str(tmp_path / "x.html") in capsys.readouterr().out
    assert [run["name"] for run in page_data(tmp_path / "x.html")["runs"]] == ["b"]
