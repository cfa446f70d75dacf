"""N + N steps equal 2N steps bit for bit, however the run was interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvsplit.residuals import RuleConfig
from mvsplit.training import Observer, TrainState, build_state, train
from mvsplit.training.checkpoint import list_checkpoints, step_of
from tests.training import runs


class At(Observer):
    """Calls `action` after step `step`."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if state.step == self.step:
            self.action()


def test_half_and_half_is_the_whole(tmp_path: Path, whole_run: Path) -> None:
    train(runs.experiment(steps=4), tmp_path / "run")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # another process would differ too
    outcome = train(runs.experiment(), tmp_path / "run")
    assert (outcome.step, outcome.signal) == (8, None)
    runs.assert_same_run(tmp_path / "run", whole_run)


def test_steps_change_the_weights_and_seeds_differ(tmp_path: Path, whole_run: Path) -> None:
    train(runs.experiment(seed=1), tmp_path / "run")
    ours, theirs = runs.log_of(tmp_path / "run"), runs.log_of(whole_run)
    assert all(a["loss"] != b["loss"] for a, b in zip(ours, theirs, strict=True))
    assert theirs[-1]["loss"] < theirs[0]["loss"]


def test_finished_run_is_left_as_it_is(tmp_path: Path, whole_run: Path) -> None:
    for _ in range(2):
        train(runs.experiment(), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", whole_run)
    message = runs.lines(tmp_path / "run" / "events.jsonl")[-1]["message"]
    assert (
        "nothing to do: the run is at step 8, and steps=8, which is the preset's where" in message
    )
    assert "give more than 8, for example --steps 16" in message


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    for threads, steps in ((1, 2), (1, 4), (2, 6), (2, 8)):
        torch.set_num_threads(threads)  # put back by the conftest
        train(runs.experiment(steps=steps), run)
        assert json.loads((run / "environment.json").read_text())["threads"] == threads
        said.append([e for e in runs.lines(run / "events.jsonl") if e["event"] == "threads"])
    assert [len(events) for events in said] == [0, 0, 1, 1]
    (event,) = said[-1]
    assert (event["step"], event["before"], event["now"]) == (4, 1, 2)
    assert "2 threads now, 1 before" in event["message"]
    assert "\n" not in event["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_resumes(
    tmp_path: Path, whole_run: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    stop = At(5, lambda: signal.raise_signal(number))
    outcome = train(runs.experiment(), tmp_path / "run", observers=[stop])
    assert (outcome.step, outcome.signal) == (5, number)
    assert signal.getsignal(number) is before
    last = runs.lines(tmp_path / "run" / "events.jsonl")[-1]
    assert last["message"] == (
        f"stopped by {number.name} after step 5 of 8, saved; give the same command again to go on"
    )
    train(runs.experiment(), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", whole_run)


def test_death_between_two_changes_of_the_disk(tmp_path: Path, whole_run: Path) -> None:
    """Kill −9 inside the first save, inside the rewriting of the logs, inside a later save, inside
    the removal of an old checkpoint; each time the same command again."""
    run = tmp_path / "run"
    for crash_at, saved in ((10, []), (12, []), (27, [3]), (35, [6, 8]), (None, [6, 8])):
        process = runs.PROCESSES.Process(target=runs.run_until, args=(run, crash_at))
        process.start()
        process.join(60)
        assert process.exitcode == (0 if crash_at is None else -signal.SIGKILL)
        assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == saved
    runs.assert_same_run(run, whole_run)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step_00000006", "step_00000008"]


def test_kill_at_a_random_moment(tmp_path: Path) -> None:
    """The command line, killed by the clock, and the same command typed again."""
    train_tiny = ["train", "tiny", "--steps", "30", "--seed", "3", "--save-every", "2"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    dice = random.Random(1)
    for _ in range(2):
        process = runs.PROCESSES.Process(
            target=runs.run_command, args=([*train_tiny, "--run-dir", str(killed)],)
        )
        process.start()
        wait_for_steps(killed, 5)
        time.sleep(dice.uniform(0, 0.2))
        process.kill()
        process.join(60)
    for run in (killed, whole):
        process = runs.PROCESSES.Process(
            target=runs.run_command, args=([*train_tiny, "--run-dir", str(run)],)
        )
        process.start()
        process.join(60)
        assert process.exitcode == 0
    runs.assert_same_run(killed, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_command_leaves_with_the_signal_as_status(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    arguments = ["train", "tiny", "--steps", "100000", "--run-dir", str(tmp_path / "run")]
    process = runs.PROCESSES.Process(target=runs.run_command, args=(arguments,))
    process.start()
    wait_for_steps(tmp_path / "run", 2)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    taken = runs.lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step_{taken:08d}"


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = run / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{run} did not take {count} steps")


def test_every_random_state_comes_back() -> None:
    state = build_state(runs.experiment())
    snapshot = state.snapshot()
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    state.restore(snapshot)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_a_folder_of_when_alpha_was_zero_by_default_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json and checkpoint say α = 0 where a rule of today says nothing; no rule is put
    in anew, which a sharded network would refuse."""
    before, now = (
        {"model": replace(runs.MODEL, rule=RuleConfig(name="plain", alpha=alpha))}
        for alpha in (0.0, None)
    )
    train(replace(runs.experiment(steps=4), **before), tmp_path / "run")

    def refuse(*args: Any) -> None:
        raise AssertionError("a rule was put in anew")

    monkeypatch.setattr("mvsplit.training.state.set_rule", refuse)
    assert train(replace(runs.experiment(), **now), tmp_path / "run").step == 8
    train(replace(runs.experiment(), **now), tmp_path / "whole")
    assert runs.log_of(tmp_path / "run") == runs.log_of(tmp_path / "whole")
