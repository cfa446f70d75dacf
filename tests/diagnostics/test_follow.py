"""A growing log, followed: at every moment what a reader of the whole file would have."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest

from mvsplit.diagnostics.follow import FollowedRun
from mvsplit.diagnostics.live import LiveReport
from mvsplit.diagnostics.report_pack import pack_map, pack_run, scales_over
from mvsplit.diagnostics.report_run import read_run
from tests.diagnostics.report_reader import unpack_map
from tests.diagnostics.synthetic import write_lines, write_run


def append(path, *records):
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def assert_as_read_whole(followed, folder):
    whole = read_run(folder)
    assert pack_run(followed.record) == pack_run(whole)
    assert set(followed.record.maps) == set(whole.maps)
    for name, m in whole.maps.items():
        np.testing.assert_array_equal(followed.record.maps[name].steps, m.steps)
        np.testing.assert_array_equal(followed.record.maps[name].values, m.values)


def test_a_run_written_piece_by_piece(tmp_path):
    whole = write_run(tmp_path / "whole", collapses=True, steps=120, layers=6)
    growing = tmp_path / "growing" / "whole"  # the same name
    followed = FollowedRun(growing)
    assert (followed.refresh(), followed.status) == (False, "waiting")
    growing.mkdir(parents=True)
    logs = {name: (whole / name).read_bytes() for name in ("metrics.jsonl", "layers.jsonl")}
    rng, written = random.Random(0), dict.fromkeys(logs, 0)
    while any(written[name] < len(data) for name, data in logs.items()):
        for name, data in logs.items():  # pieces end anywhere in a line
            piece = data[written[name] : written[name] + rng.randrange(20_000)]
            written[name] += len(piece)
            with (growing / name).open("ab") as file:
                file.write(piece)
        followed.refresh()
        complete = tmp_path / "complete" / "whole"
        complete.mkdir(parents=True, exist_ok=True)
        for name, data in logs.items():
            (complete / name).write_bytes(data[: data.rfind(b"\n", 0, written[name]) + 1])
        assert_as_read_whole(followed, complete)
    assert followed.status == "live"
    assert followed.refresh() is False


@pytest.mark.parametrize(
    "later",
    [
        [{"step": 5, "loss": 9.0}, {"step": 6, "loss": 8.0}],  # a rollback
        [{"step": 9, "loss": 9.0}],  # the last step once more
        [{"step": 12, "loss": 1.0}, {"step": 11, "loss": 2.0}],  # out of order
    ],
)
def test_repeated_steps_count_as_in_the_whole_file(tmp_path, later):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": s, "loss": float(s)} for s in range(10)])
    followed = FollowedRun(tmp_path)
    followed.refresh()
    append(path, *later)
    assert followed.refresh() is True
    assert_as_read_whole(followed, tmp_path)
    append(path, {"step": 13, "loss": 3.0})
    followed.refresh()
    assert_as_read_whole(followed, tmp_path)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_log_that_was_cut_back_is_read_anew(tmp_path, in_place):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": s, "loss": 1.0} for s in range(50)])
    followed = FollowedRun(tmp_path)
    followed.refresh()
    # Longer than before, so that its size alone says nothing.
    lines = [{"step": s, "loss": 1.0 if s < 10 else 2.5} for s in range(80)]
    if in_place:
        write_lines(path, lines)
    else:
        write_lines(tmp_path / "new", lines)
        os.replace(tmp_path / "new", path)
    assert followed.refresh() is True
    assert_as_read_whole(followed, tmp_path)


def test_what_was_dropped_is_counted_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\nnoise\n')
    followed = FollowedRun(tmp_path)
    followed.refresh()
    with path.open("a") as file:
        file.write('{"loss": 3}\n{"step": 1, "lo')
    followed.refresh()
    followed.refresh()
    assert followed.record.notes == [
        "metrics.jsonl, lines left out: not a JSON object (1), without a valid step (1)."
    ]


def test_a_last_line_without_an_end_counts_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 2')
    followed = FollowedRun(tmp_path)
    followed.refresh()
    np.testing.assert_array_equal(followed.record.series["loss"].step, [0])
    with path.open("a") as file:
        file.write("}")
    followed.refresh()
    np.testing.assert_array_equal(followed.record.series["loss"].step, [0, 1])
    with path.open("a") as file:
        file.write('\n{"step": 2, "loss": 3}\n')
    followed.refresh()
    np.testing.assert_array_equal(followed.record.series["loss"].mean, [1, 2, 3])
    assert followed.record.notes == []


def test_a_log_that_vanishes_leaves_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 0, "loss": 1.0}])
    followed = FollowedRun(tmp_path)
    followed.refresh()
    path.unlink()
    assert followed.refresh() is True
    assert (followed.record.series, followed.status) == ({}, "waiting")


def test_the_end_of_a_run_and_its_resumption(tmp_path):
    path = tmp_path / "events.jsonl"
    seen = []
    followed = FollowedRun(tmp_path)
    for event in ("saved", "nonfinite", "resumed", "finished"):
        append(path, {"step": 3 if event != "resumed" else 1, "event": event})
        followed.refresh()
        seen.append(followed.status)
    assert seen == ["live", "ended", "live", "ended"]


class _Client:
    """Keeps what it was told, as the page does."""

    def __init__(self, report):
        self.report = report
        self.token = None
        self.runs = None
        self.told = 0  # columns of maps

    def ask(self):
        news = self.report.news(self.token)
        if news is None:
            return
        self.runs = self.runs or [{"maps": {}} for _ in news["runs"]]
        self.token, self.scales = news["token"], news["scales"]
        for run, parts in zip(self.runs, news["runs"], strict=True):
            for name, packed in parts.pop("maps").items():
                self._put(run["maps"], name, packed)
            run.update(parts)

    def _put(self, maps, name, packed):
        if packed is None:
            del maps[name]
            return
        steps, levels = unpack_map(packed)
        self.told += len(steps)
        if kept := packed.get("from", 0):
            steps = np.concatenate([maps[name][0][:kept], steps])
            levels = np.concatenate([maps[name][1][:, :kept], levels], axis=1)
        maps[name] = steps, levels


def assert_knows_all(client, folders):
    records = [read_run(folder) for folder in folders]
    scales = scales_over(records)
    for run, record in zip(client.runs, records, strict=True):
        packed = pack_run(record)
        assert {name: run[name] for name in packed} == packed
        assert set(run["maps"]) == set(record.maps)
        for name, m in record.maps.items():
            steps, levels = unpack_map(pack_map(m, scales[name]))
            np.testing.assert_array_equal(run["maps"][name][0], steps)
            np.testing.assert_array_equal(run["maps"][name][1], levels)


def test_news_add_up_to_the_whole(tmp_path):
    """Ordinary growth, a new largest value, a rollback, a deeper probe, a field that vanishes."""
    folders = [tmp_path / "a", tmp_path / "b"]
    report = LiveReport(folders)
    client, sleeper = _Client(report), _Client(report)
    client.ask()
    for folder in folders:
        folder.mkdir()
        write_lines(folder / "metrics.jsonl", [{"step": 0, "loss": 1.0}])
    layers = [folder / "layers.jsonl" for folder in folders]
    growth = [
        [{"step": s, "tcs": [0.1 * s, 0.5], "rho": [2.0, 9.0]} for s in range(5)],
        [{"step": 5, "tcs": [0.3, 0.5], "rho": [2.0, 8.0]}],
        [{"step": 6, "tcs": [0.3, 0.5], "rho": [2.0, 80.0]}],
        [{"step": 4, "tcs": [0.9, 0.9], "rho": [3.0, 3.0]}],
        [{"step": 7, "tcs": [0.1, 0.2, 0.3]}],
    ]
    for i, records in enumerate(growth):
        append(layers[i % 2], *records)
        client.ask()
        if i % 3 == 0:
            sleeper.ask()
        for folder in folders[: min(i + 1, 2)]:
            assert client.runs[folders.index(folder)]["name"] == folder.name
        assert_knows_all(client, folders)
    sleeper.ask()
    assert_knows_all(sleeper, folders)
    write_lines(layers[0], [{"step": 0, "rho": [1.0]}])
    client.ask()
    assert_knows_all(client, folders)


def test_a_new_probe_is_told_alone(tmp_path):
    path = tmp_path / "layers.jsonl"
    write_lines(path, [{"step": s, "tcs": [0.2, 0.5]} for s in range(100)])
    client = _Client(LiveReport([tmp_path]))
    client.ask()
    before = client.told
    append(path, {"step": 100, "tcs": [0.4, 0.3]})
    client.ask()
    assert client.told - before == 1
    assert client.report.news(client.token) is None


def test_many_probes_are_thinned_as_in_the_report(tmp_path):
    path = tmp_path / "layers.jsonl"
    rng = np.random.default_rng(0)
    client = _Client(LiveReport([tmp_path]))
    for start in range(0, 2400, 300):
        values = rng.random((300, 2)).tolist()
        append(path, *({"step": start + i, "tcs": v} for i, v in enumerate(values)))
        client.ask()
        assert_knows_all(client, [tmp_path])


def test_a_token_of_another_server_gets_everything(tmp_path):
    write_lines(tmp_path / "layers.jsonl", [{"step": 0, "tcs": [0.2, 0.5]}])
    client = _Client(LiveReport([tmp_path]))
    client.ask()
    client.report = LiveReport([tmp_path])
    client.ask()
    assert_knows_all(client, [tmp_path])
    assert client.told == 2
