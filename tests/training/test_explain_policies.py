"""Steps of runs that a policy altered: explained as they were, or said not to be reproduced."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mvsplit.diagnostics.events import Event
from mvsplit.errors import UserError
from mvsplit.training import train
from mvsplit.training.config import ReactionConfig
from mvsplit.training.explanation import explain
from mvsplit.training.flight import flight_of_run, read_flight
from tests.training import runs

ALARM = 5  # saved are steps 3 and 6


class Alarming:
    """A detector that raises one alarm, at step `ALARM`."""

    stirred = False

    def __init__(self) -> None:
        self.left = [ALARM]

    def update(self, record: dict[str, Any]) -> list[Event]:
        if "layer" in record or record["step"] not in self.left:
            return []
        self.left.remove(record["step"])
        return [Event(step=ALARM, level="alarm", verdict="mean-mode", message="as told")]


@pytest.mark.parametrize(
    ("policy", "lost", "words"),
    [
        ("record", [], ""),
        ("skip", [6], "step 5: its update was left out"),
        ("rollback", [4, 5, 6], "step 5: back to step 3"),
        ("protect", [4, 5, 6], "network of step 3 is an MV-Split network"),
    ],
)
def test_only_what_lies_behind_an_alteration_cannot_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, lost: list[int], words: str
) -> None:
    monkeypatch.setattr("mvsplit.training.watch.Detector", Alarming)
    numbers = ReactionConfig(margin=1, gain=0.25, anneal=3)
    train(runs.experiment(on_alarm=policy, reaction=numbers, keep=3), tmp_path)
    for step in range(2, 9):
        found = explain(flight_of_run(tmp_path, step))
        assert found.reproduction.exact is (step not in lost)
        assert (found.conclusion.verdict == "not-reproduced") is (step in lost)
        assert (found.altered is not None) is (step in lost)
        assert words in (found.altered or words)


@pytest.mark.parametrize("policy", ["record", "skip", "rollback", "protect"])
def test_the_flight_of_the_alarm_is_exact_whatever_was_done_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setattr("mvsplit.training.watch.Detector", Alarming)
    train(runs.experiment(on_alarm=policy, reaction=ReactionConfig(margin=1)), tmp_path)
    found = explain(read_flight(tmp_path / "flights" / f"step_{ALARM:08d}"))
    assert (found.step, found.state_step) == (ALARM, ALARM - 1)
    assert found.reproduction.exact


@pytest.mark.parametrize("policy", ["record", "stop", "rollback"])
def test_of_a_run_the_step_of_its_alarm_is_taken_from_its_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setattr("mvsplit.training.watch.Detector", Alarming)
    with suppress(SystemExit, UserError):
        train(runs.experiment(on_alarm=policy, reaction=ReactionConfig(margin=1)), tmp_path)
    found = explain(flight_of_run(tmp_path))
    assert (found.step, found.reason) == (ALARM, "the run's first alarm. as told")
    assert found.reproduction.exact
    if policy == "record":
        assert flight_of_run(tmp_path, ALARM).reason == "as asked; as told"
        assert flight_of_run(tmp_path, 3).reason == "as asked"
        (tmp_path / "flights").rename(tmp_path / "gone")
        again = flight_of_run(tmp_path)  # from a checkpoint
        assert (again.step, again.path) == (ALARM, tmp_path)


def test_a_flight_reaches_the_steps_since_the_checkpoint_that_no_policy_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvsplit.training.watch.Detector", Alarming)
    train(runs.experiment(on_alarm="record"), tmp_path)
    path = tmp_path / "flights" / f"step_{ALARM:08d}"
    (tmp_path / "checkpoints").rename(tmp_path / "gone")  # the links outlive it
    for step in (4, 5):
        found = explain(read_flight(path, step))
        assert found.reproduction.exact
        assert found.state_step == (3 if step == 4 else 4)
    log = tmp_path / "events.jsonl"
    log.write_text('{"event": "skipped", "step": 4, "message": "left out"}\n')
    assert read_flight(path, 4).step == 4  # before it
    log.write_text('{"event": "rolled-back", "step": 3, "to_step": 3, "message": "back"}\n')
    with pytest.raises(UserError, match="reaches 5;"):
        read_flight(path, 4)
