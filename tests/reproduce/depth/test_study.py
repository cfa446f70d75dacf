"""The bench as a whole, with runs that take no time: what runs, what not again, what fails."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mvsplit.errors import UserError
from mvsplit.reproduce.depth import run as run_module
from mvsplit.reproduce.depth import study as module
from mvsplit.reproduce.depth.order import in_order
from mvsplit.reproduce.depth.plan import get_run
from mvsplit.reproduce.depth.run import read_rows, write_row
from mvsplit.reproduce.depth.study import DepthStudy, stopped_with_rows
from mvsplit.reproduce.workers import Stopped
from mvsplit.training.run_folder import FolderInUse
from tests.reproduce.depth.tiny import TINY, entry, row

ENTRIES = [entry("plain"), entry("mvsplit-root")]


class Runs:
    """Stands in for `run_bench`: smallest loss at 3.2e-3, plain networks dead above it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.broken: set[str] = set()

    def __call__(self, run, size, out: Path, end: float, scratch) -> bool:
        self.names.append(run.name)
        if run.name in self.broken:
            raise RuntimeError("out of memory")
        loss = 0.5 + abs(run.rate - 3.2e-3)
        dead = run.entry.name == "plain" and run.rate > 3.2e-3
        shape = {"depth": run.depth, "width": run.width, "seed": run.seed}
        write_row(row(run.rate, None if dead else loss, name=run.entry.name, **shape), out)
        return True


@pytest.fixture
def runs(monkeypatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(module, "run_bench", found)
    # Without waiting for the disk.
    monkeypatch.setattr(run_module, "write_atomically", lambda path, text: path.write_text(text))
    monkeypatch.setattr(module, "worker_pool", ThreadPoolExecutor)
    return found


def study(out: Path, **options) -> DepthStudy:
    return DepthStudy(out, TINY, ENTRIES, workers=2, say=lambda text: None, **options)


def test_it_goes_on_until_nothing_is_left(tmp_path, runs):
    rows = study(tmp_path).run()
    assert len(runs.names) == len(set(runs.names)) == len(rows)
    assert in_order(TINY, ENTRIES, rows) == []
    # Every entry has all seeds at its best rate, at every depth.
    best = [r for r in rows if r["rate"] == 3.2e-3 and r["width"] == 16]
    assert {(r["entry"], r["depth"], r["seed"]) for r in best} >= {
        (e.name, depth, seed) for e in ENTRIES for depth in TINY.depths for seed in TINY.seeds
    }


def test_finished_runs_are_not_run_again(tmp_path, runs):
    study(tmp_path).run()
    before, runs.names = read_rows(tmp_path), []
    assert study(tmp_path).run() == before
    assert runs.names == []


def test_it_goes_on_from_half(tmp_path, runs):
    whole = {r["run"] for r in study(tmp_path / "a").run()}
    some = read_rows(tmp_path / "a")[::2]
    for each in some:
        write_row(each, tmp_path / "b")
    runs.names = []
    assert {r["run"] for r in study(tmp_path / "b").run()} == whole
    assert set(runs.names) == whole - {r["run"] for r in some}


def test_a_run_that_fails_stops_no_other_and_is_tried_the_next_time(tmp_path, runs):
    name = "plain-3x16-lr3.2e-03-seed0"
    runs.broken = {name}
    first = study(tmp_path)
    rows = first.run()
    assert first.failed == {name: "RuntimeError: out of memory"}
    assert runs.names.count(name) == 1
    assert len([r for r in rows if r["entry"] == "mvsplit-root"]) > 10
    runs.broken, runs.names = set(), []
    assert name in {r["run"] for r in study(tmp_path).run()}
    assert runs.names[0] == name


def test_no_run_begins_that_would_not_end_in_time(tmp_path, runs):
    write_row(row(1e-3, 0.5, depth=3, seconds=1e6), tmp_path)  # a run as deep takes 12 days
    study(tmp_path).run(minutes=1)
    assert not [name for name in runs.names if "-3x16-" in name]
    assert not runs.names or "-2x16-" in runs.names[0]
    assert study(tmp_path / "over").run(minutes=0) == []


def test_named_runs_are_run_and_no_others(tmp_path, runs):
    names = ["plain-3x16-lr1.0e-02-seed7", "mvsplit-root-2x16-lr1.0e-03-seed0"]
    only = [get_run(name) for name in names]
    rows = study(tmp_path, only=only).run()
    assert sorted(runs.names) == sorted(names) == sorted(r["run"] for r in rows)
    assert len(study(tmp_path, only=only).run()) == len(runs.names) == 2  # nor any of them twice


def test_what_is_left_is_what_runs_next(tmp_path, runs):
    one = study(tmp_path)
    assert [run.name for run in one.left()] == [r.name for r in in_order(TINY, ENTRIES, [])]
    one.run()
    assert one.left() == []
    names = ["plain-3x16-lr1.0e-02-seed7", "plain-2x16-lr1.0e-03-seed0"]  # the latter is there
    only = study(tmp_path, only=[get_run(name) for name in names]).left()
    assert [run.name for run in only] == names[:1]


def test_a_signal_has_it_said_what_is_kept_and_what_had_not_begun(tmp_path):
    said: list[str] = []
    write_row(row(1e-3, 0.5), tmp_path)
    runs = tmp_path / "runs"
    for name, lines in (("new", ""), ("saved", "{}\n"), ("lost", "{}\n"), ("half", "{")):
        (runs / name).mkdir(parents=True)
        (runs / name / "metrics.jsonl").write_text(lines)
    (runs / "saved" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(Stopped), stopped_with_rows(tmp_path, said.append):
        signal.raise_signal(signal.SIGTERM)
    kept = f"1 runs finished and 1 begun are kept in {tmp_path}, 2 more had taken no step yet"
    assert said == [f"stopped by SIGTERM: {kept}; give the same command again to go on"]


def test_a_folder_of_other_settings_is_refused(tmp_path, runs):
    write_row(row(1e-3, 0.5) | {"fingerprint": "another"}, tmp_path)
    with pytest.raises(UserError, match="other settings"):
        study(tmp_path).run()
    assert runs.names == []


def test_the_rule_is_noted_before_the_first_run(tmp_path, runs, monkeypatch):
    def broken(*given) -> bool:
        assert (tmp_path / module.RULE_FILE).exists()
        raise RuntimeError

    monkeypatch.setattr(module, "run_bench", broken)
    assert study(tmp_path).run() == []


def test_there_is_at_least_one_worker(tmp_path):
    with pytest.raises(UserError, match="workers=0: must be at least 1"):
        DepthStudy(tmp_path, TINY, ENTRIES, workers=0)


def test_what_runs_long_is_heard_of_before_it_ends(tmp_path, runs, monkeypatch):
    heard = threading.Event()

    def long(run, size, out: Path, end: float, scratch) -> bool:
        log = scratch / run.name / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        lines = [{"step": n, "seconds": 9.0 if n == 1 else 0.5} for n in range(1, 13)]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert heard.wait(30)
        return False  # left

    def say(text: str) -> None:
        said.append(text)
        if "step 12 of 20, 0.500 s a step" in text:  # the first steps are not among the last ten
            heard.set()

    said: list[str] = []
    monkeypatch.setattr(module, "run_bench", long)
    one = DepthStudy(tmp_path, TINY, ENTRIES, workers=1, scratch=tmp_path / "scratch", say=say)
    one.patience = 0.05
    monkeypatch.setattr(one, "_ended", lambda run, job: one.failed.setdefault(run.name, "left"))
    one.entries = ENTRIES[:1]
    one.size = replace(TINY, depths=(2, 3), rates=(1e-3,))
    assert one.run() == []
    assert heard.is_set()


def test_a_run_of_another_process_is_waited_for_and_taken_over_if_that_is_gone(
    tmp_path, runs, monkeypatch
):
    """One is finished by the other, one is left by it."""
    names = [f"plain-2x16-lr{rate}-seed0" for rate in ("1.0e-03", "3.2e-03", "1.0e-02")]
    begin, asked, said = module.run_bench, [], []

    def busy(run, size, out, end, scratch) -> bool:
        asked.append(run.name)
        if run.name != names[0] and asked.count(run.name) < 3:
            raise FolderInUse("in use by another process")
        return begin(run, size, out, end, scratch)

    def moment(seconds: float) -> None:
        if asked.count(names[1]) == 2:
            write_row(row(3.2e-3, 0.4, name="plain"), tmp_path)

    monkeypatch.setattr(module, "run_bench", busy)
    monkeypatch.setattr(module.time, "sleep", moment)
    only = [get_run(name) for name in names]
    bench = DepthStudy(tmp_path, TINY, ENTRIES, workers=2, only=only, say=said.append)
    rows = bench.run()
    assert {each["run"] for each in rows} == set(names)
    assert not bench.failed
    assert [asked.count(name) for name in names] == [1, 2, 3]
    waits = [line for line in said if line.endswith("its row is waited for")]
    assert len(waits) == 2
    monkeypatch.setattr(module, "run_bench", lambda *given: _in_use())
    later = [get_run("plain-3x16-lr1.0e-03-seed0")]
    left = DepthStudy(tmp_path, TINY, ENTRIES, only=later, say=said.append)
    clock = [0.0]
    monkeypatch.setattr(module.time, "sleep", lambda seconds: clock.append(1e12))
    monkeypatch.setattr(module.time, "time", lambda: clock[-1])
    assert len(left.run(minutes=1)) == len(rows)  # the time is up before the other ends
    assert [run.name for run in left.left()] == [later[0].name]


def _in_use() -> bool:
    raise FolderInUse("in use by another process")
