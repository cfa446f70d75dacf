"""Runs that are trained as one against the same runs alone, by both ways to train."""

import dataclasses
import datetime
import json
import math
import time

import pytest
import torch

from mvsplit.reproduce.depth import gate
from mvsplit.reproduce.depth import together as module
from mvsplit.reproduce.depth.gate import check_together
from mvsplit.reproduce.depth.plan import BenchRun, get_entries
from mvsplit.reproduce.depth.run import check_row, read_rows, run_bench
from mvsplit.reproduce.depth.together import (
    TOKENS,
    Training,
    adamw,
    member_bytes,
    room_for,
    run_together,
)
from mvsplit.reproduce.workers import Stopped
from tests.reproduce.depth.tiny import TINY, entry

SAME = (
    *("curve", "validation_loss", "by_time", "floor", "steps_taken", "ended", "fingerprint"),
    *("tasks",),
)


def runs_of(names, rates=(1e-3, 3.2e-3)) -> list[BenchRun]:
    return [
        BenchRun(entry=each, depth=2, width=16, rate=rate, seed=seed)
        for seed, each in enumerate(get_entries(list(names)))
        for rate in rates
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("mvsplit-root", "alpha", "alpha-standard", "rezero", "gain-lr-10", "warm-3"),
        ("keel",),
        ("sandwich",),
    ],
)
def test_a_run_is_what_it_is_alone(tmp_path, names):
    runs = runs_of(names)
    began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    assert run_together(runs, TINY, tmp_path / "one")
    for run in runs[1::2]:
        run_bench(run, TINY, tmp_path / "alone")
    together = {row["run"]: row for row in read_rows(tmp_path / "one")}
    assert len(together) == len(runs)
    for row in read_rows(tmp_path / "alone"):
        other = together[row["run"]]
        for name in SAME:
            expected = row[name]
            near = expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-4)
            assert other[name] == near, (row["run"], name)
        assert other["similarity"] == pytest.approx(row["similarity"], rel=1e-4)
        assert other["together"] == len(runs)
        for each in (row, other):  # by which one of several rows of a run counts
            made = datetime.datetime.fromisoformat(each["date"])
            assert began <= made <= datetime.datetime.now(datetime.UTC)
        for name in ("peak_gib", "seconds_a_step", "collapse_seconds", "watch"):
            assert other[name] is None
        assert other.keys() >= row.keys() - {"cpu_seconds", "graphs"} - {
            *("seconds_curve", "seconds_stepping")
        }
    run = runs[0]
    check_row(run, TINY, together[run.name], tmp_path)


def test_a_run_that_is_not_finite_is_a_row_and_the_others_go_on(tmp_path):
    runs = runs_of(["plain"], (1e-3, 1e30))
    assert run_together(runs, TINY, tmp_path)
    calm, broken = (next(r for r in read_rows(tmp_path) if r["run"] == run.name) for run in runs)
    assert broken["ended"] == "non-finite: step 2"
    assert (broken["steps_taken"], broken["lives"], broken["curve"]) == (1, False, [])
    assert broken["tasks"] is None
    assert calm["tasks"] is not None
    assert calm["ended"] == "finished"
    json.dumps([calm, broken], allow_nan=False)


def test_the_clock_stops_all_of_them_and_leaves_no_row(tmp_path, monkeypatch):
    assert not run_together(runs_of(["plain"]), TINY, tmp_path, end=time.time())
    assert not read_rows(tmp_path)


@pytest.mark.parametrize(("end", "steps"), [(19.9, 4), (20.1, 20)])
def test_what_would_not_end_in_time_stops_at_once(monkeypatch, end, steps):
    """Steps of a second each, the first two of five."""
    training = Training([run.experiment(TINY) for run in runs_of(["plain"])])

    class Clock:
        @staticmethod
        def time() -> float:
            return training.step + 8.0 * (training.step > 0)

        perf_counter = time

    assert training.config.steps == TINY.steps == 20
    monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(module, "CLOCK", 4)
    assert training.run(end + 8) is (steps == 20)
    assert training.step == steps


def test_memory_decides_how_many_fit_and_whether_blocks_are_computed_again(monkeypatch):
    experiment = runs_of(["plain"])[0].experiment(TINY)
    assert room_for(experiment, torch.device("cpu")) == math.inf
    each = member_bytes(experiment.model, TINY.batch_size * TOKENS, recompute=False)
    monkeypatch.setattr(module, "allowed_bytes", lambda device: 10 * each)
    assert room_for(experiment, torch.device("cuda")) == 8  # of 10, of which two stay free
    for room, again in ((1, True), (2, False)):
        monkeypatch.setattr(module, "room_for", lambda experiment, device, room=room: room)
        assert Training([experiment] * 2).recompute is again


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_update_is_that_of_torch(decay):
    torch.manual_seed(0)
    values = torch.randn(2, 5, dtype=torch.float64)
    rate = torch.tensor([[1e-2], [3e-3]], dtype=torch.float64)
    mine, first, second = values.clone(), torch.zeros_like(values), torch.zeros_like(values)
    theirs = [v.clone().requires_grad_() for v in values]
    settings = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": decay}
    optimizers = [
        torch.optim.AdamW([p], lr=float(r), **settings) for p, r in zip(theirs, rate, strict=True)
    ]
    for step in range(1, 6):
        grads = torch.randn_like(values)
        corrections = torch.tensor([1 - 0.9**step, 1 - 0.99**step], dtype=torch.float64)
        scale = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
        adamw(mine, grads, first, second, rate, scale, decay, corrections, (0.9, 0.99), 1e-6)
        for parameter, grad, s, optimizer in zip(theirs, grads, scale, optimizers, strict=True):
            parameter.grad = grad * s
            optimizer.step()
    torch.testing.assert_close(mine, torch.stack([p.detach() for p in theirs]))


def test_the_gate_takes_what_is_alike(tmp_path, monkeypatch, capsys):
    """One run of each kind of merge is trained alone, whatever the family: α = 0, another α, a free
    λ, standard writers; settings that differ in β alone are one kind."""
    alone: list[str] = []

    def counted(run, size, out):
        alone.append(run.name)
        return run_bench(run, size, out)

    monkeypatch.setattr(gate, "run_bench", counted)
    monkeypatch.setattr(gate, "STEPS", 10)
    monkeypatch.setattr(gate, "DEPTH", 2)
    names = ["mvsplit-root", "plain", "alpha", "alpha-free", "standard", "keel", "sandwich"]
    entries = get_entries([*names, "beta-4", "mvsplit-1"])
    check_together(TINY, entries, tmp_path / "gate.json")
    kept = json.loads((tmp_path / "gate.json").read_text("utf-8"))
    assert (kept["passed"], kept["wanted"]) == (True, 7)
    assert [each["run"] for each in kept["runs"]] == alone
    assert "check: 7 runs as one are what they are alone" in capsys.readouterr().out
    assert [name.partition("-2x16")[0] for name in alone] == names
    assert {name.partition("-lr")[2] for name in alone} == {"3.2e-04-seed0", "1.0e-03-seed1"}


def test_the_gate_adds_to_what_it_found_on_the_same_device(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "STEPS", 10)
    monkeypatch.setattr(gate, "DEPTH", 2)
    path = tmp_path / "gate.json"
    for names in (["plain", "mvsplit-root"], ["alpha", "plain"]):
        check_together(TINY, get_entries(names), path)
    kept = json.loads(path.read_text("utf-8"))
    assert (kept["passed"], kept["wanted"]) == (True, 3)
    names = [each["run"].partition("-2x16")[0] for each in kept["runs"]]
    assert names == ["mvsplit-root", "alpha", "plain"]
    path.write_text(json.dumps(kept | {"device": "another"}), "utf-8")
    check_together(TINY, get_entries(["plain"]), path)
    assert len(json.loads(path.read_text("utf-8"))["runs"]) == 1


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_the_gate_refuses_what_differs(tmp_path, monkeypatch, factor):
    """A way to train that gives other losses, in place of the ensemble."""

    def other(runs, size, out):
        for run in runs:
            run_bench(run, size, out)
        for path in (out / "rows").iterdir():
            row = json.loads(path.read_text("utf-8"))
            row["validation_loss"] *= factor
            path.write_text(json.dumps(row), "utf-8")

    monkeypatch.setattr(gate, "STEPS", 10)
    monkeypatch.setattr(gate, "DEPTH", 2)
    monkeypatch.setattr(gate, "run_together", other)
    size = dataclasses.replace(TINY, validation=4)
    with pytest.raises(RuntimeError, match="differ from those alone"):
        check_together(size, get_entries(["plain"]), tmp_path / "gate.json")
    assert json.loads((tmp_path / "gate.json").read_text("utf-8"))["passed"] is False


def test_the_gate_stops_where_a_training_heard_a_signal(monkeypatch):
    """Which is a stop after a step, as that of the clock."""

    def stopped(run, size, out):
        return run_bench(run, size, out, end=0.0)

    monkeypatch.setattr(gate, "DEPTH", 2)
    monkeypatch.setattr(gate, "STEPS", 10)
    monkeypatch.setattr(gate, "run_bench", stopped)
    with pytest.raises(Stopped):
        check_together(TINY, get_entries(["plain"]))


def test_entries_of_one_name_are_one_network():
    assert runs_of(["plain"])[0].entry is entry("plain")
