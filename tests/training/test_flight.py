from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvsplit.errors import UserError
from mvsplit.training import TrainState, build_state, train, train_step
from mvsplit.training.checkpoint import list_checkpoints, step_of
from mvsplit.training.flight import Flight, FlightRecorder, flight_of_run, read_flight
from mvsplit.training.loop import Observer
from mvsplit.training.step import Gradients
from tests.training import flights, runs


class Alarms(Observer):
    """Notes the gradients of every step."""

    def __init__(self) -> None:
        self.seen: list[Gradients] = []

    def on_gradients(self, state: TrainState, gradients: Gradients) -> None:
        assert state.step == gradients.step - 1
        self.seen.append(gradients)


def test_what_is_told_before_the_update_is_what_the_step_computes(tmp_path: Path) -> None:
    observer = Alarms()
    experiment = runs.experiment(accumulate=2, steps=3)
    train(experiment, tmp_path / "run", observers=[observer])
    lines = runs.lines(tmp_path / "run" / "metrics.jsonl")
    assert [g.step for g in observer.seen] == [1, 2, 3]
    for gradients, line in zip(observer.seen, lines, strict=True):
        assert gradients.metrics.items() <= line.items()
        assert len(gradients.sample_losses) == 8
        mean = sum(gradients.sample_losses) / 8
        assert mean == pytest.approx(line["loss"], rel=1e-6)
        squares = sum(n * n for norms in gradients.family_norms.values() for n in norms)
        assert squares**0.5 == pytest.approx(line["grad_norm"], rel=1e-5)
        assert gradients.position == 8 * (gradients.step - 1)


def test_a_flight_holds_the_last_steps_and_the_weights_before_the_update(tmp_path: Path) -> None:
    experiment = flights.plain()
    path = flights.fly(tmp_path, experiment, flights.nothing)
    flight = read_flight(path)
    assert (flight.step, flight.reason, flight.experiment) == (5, "a test", experiment)
    assert [record["step"] for record in flight.records] == [1, 2, 3, 4, 5]
    state = build_state(experiment)
    for record in flight.records:
        batch = state.loader.batch_at(state.loader.position)
        assert record["indices"] == batch.indices.tolist()
        before = {n: p.detach().clone() for n, p in state.model.state_dict().items()}
        metrics = train_step(state, experiment.train)
        assert record["loss"] == metrics["loss"]
        assert record["clip_factor"] == min(1, experiment.train.clip / metrics["grad_norm"])
    assert torch.equal(flight.batch.latents, batch.latents)
    (saved,) = flight.checkpoints
    assert step_of(saved) == 4
    weights = load_file(saved / "model.safetensors")
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_an_alarm_after_the_update_links_the_checkpoint_before_the_step(tmp_path: Path) -> None:
    class Late(Observer):
        def on_start(self, state: TrainState, experiment: Any) -> None:
            self.recorder = FlightRecorder(tmp_path / "run")
            self.recorder.on_start(state, experiment)

        def on_gradients(self, state: TrainState, gradients: Gradients) -> None:
            self.recorder.on_gradients(state, gradients)

        def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 5:
                saved = tmp_path / "run" / "checkpoints" / "step_00000003"
                while not saved.exists():  # the run saves while it goes on
                    time.sleep(0.01)
                self.recorder.on_event(flights.ALARM)

    train(runs.experiment(), tmp_path / "run", observers=[Late()])
    flight = read_flight(tmp_path / "run" / "flights" / "step_00000005", 5)
    assert [step_of(path) for path in flight.checkpoints] == [3]
    assert read_flight(flight.path, 4).records == flight.records[:-1]
    with pytest.raises(UserError, match="reaches 4, 5;"):
        read_flight(flight.path, 3)
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [step_of(path) for path in kept] == [6, 8], "the run itself has dropped step 3"


def test_a_flight_is_of_its_own_step_whichever_stands_out(tmp_path: Path) -> None:
    path = flights.fly(tmp_path, flights.plain(), flights.nothing)
    flight = json.loads((path / "flight.json").read_text())
    for record, norm in zip(flight["records"], (1.0, 1.0, 9.0, 1.0, 1.0), strict=True):
        record["grad_norm"] = norm
    (path / "flight.json").write_text(json.dumps(flight | {"from_start": False}))
    with pytest.raises(UserError, match="reaches 5;"):
        read_flight(path, 3)
    (path / "flight.json").write_text(json.dumps(flight))
    assert (read_flight(path).step, read_flight(path).reason) == (5, "a test")
    assert read_flight(path, 5).reason == "as asked; a test"
    found = read_flight(path, 3)
    assert (found.step, found.batch) == (3, None)
    assert found.reason == "as asked; the flight is of step 5", "what was said is of that step"
    assert [record["step"] for record in found.records] == [1, 2, 3]


def test_a_run_that_stops_on_a_non_finite_value_leaves_a_flight(tmp_path: Path) -> None:
    class Poison(Observer):
        def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 2:
                with torch.no_grad():
                    state.model.head.bias[0] = torch.nan

    with pytest.raises(UserError, match="Final"):
        train(runs.experiment(), tmp_path / "run", observers=[Poison()])
    flight = read_flight(tmp_path / "run" / "flights" / "step_00000003")
    assert "not finite" in flight.reason.lower()
    events = runs.lines(tmp_path / "run" / "events.jsonl")
    (told,) = [event for event in events if event["event"] == "flight"]
    assert str(flight.path) in told["message"]


def test_one_flight_for_one_alarm_that_lasts(tmp_path: Path) -> None:
    experiment = flights.plain(steps=40)
    state = build_state(experiment)
    recorder = FlightRecorder(tmp_path, steps=3, limit=2)
    recorder.on_start(state, experiment)

    def alarm(gradients: Gradients) -> None:
        recorder.on_gradients(state, gradients)
        recorder.on_event(flights.ALARM)

    for _ in range(9):
        train_step(state, experiment.train, before_update=alarm)
    assert [step_of(p) for p in list_checkpoints(recorder.folder)] == [1, 4]
    assert [r["step"] for r in read_flight(recorder.folder / "step_00000004", 4).records] == [
        2,
        3,
        4,
    ]


class Killed(BaseException):
    """Ends the process where it is raised: nothing in the program catches it."""


def die_before_change(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], bool]:
    """Every change of the disk from the `number`-th on raises; says whether one did."""
    left = number

    def dying(change: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    return lambda: left < 0


def test_a_kill_while_writing_leaves_no_half_flight(tmp_path: Path) -> None:
    experiment = flights.plain()
    state = build_state(experiment)
    seen: list[Gradients] = []
    train_step(state, experiment.train, before_update=seen.append)
    deaths, number, died = 0, 0, True
    while died:
        run = tmp_path / str(number)
        run.mkdir()
        recorder = FlightRecorder(run)
        recorder.on_start(state, experiment)
        recorder.on_gradients(state, seen[0])
        state.step = 0  # as it was before the update
        with pytest.MonkeyPatch.context() as patch:
            has_died = die_before_change(patch, number)
            try:
                recorder.write("a test")
            except Killed:
                deaths += 1
            died = has_died()
        for path in list_checkpoints(recorder.folder):
            assert read_flight(path).step == 1
        FlightRecorder(run).on_start(state, experiment)
        assert all(not path.name.startswith(".") for path in recorder.folder.glob("*"))
        number += 1
    assert deaths == number - 1 > 12
    assert list_checkpoints(recorder.folder)


def test_a_flight_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    experiment = flights.plain()
    state = build_state(experiment)
    recorder = FlightRecorder(tmp_path, tell=lambda name, message: told.append((name, message)))
    with pytest.raises(UserError, match="no step yet"):
        recorder.write("too early")
    recorder.on_start(state, experiment)
    train_step(state, experiment.train, before_update=lambda g: recorder.on_gradients(state, g))
    (tmp_path / "flights").write_text("a file is in the way")
    assert recorder.write("a test") is None
    assert told[0][0] == "flight"
    assert "cannot write the flight of step 1" in told[0][1]


def damaged(kind: str, path: Path) -> None:
    if kind == "missing":
        (path / "flight.json").unlink()
    elif kind == "cut off":
        text = (path / "flight.json").read_text()
        (path / "flight.json").write_text(text[: len(text) // 2])
    elif kind == "batch":
        (path / "batch.safetensors").write_bytes(b"123")
    else:
        flight = json.loads((path / "flight.json").read_text())
        (path / "flight.json").write_text(json.dumps(flight | {"version": 99}))


@pytest.mark.parametrize("kind", ["missing", "cut off", "batch", "version"])
def test_what_is_no_flight_is_said(tmp_path: Path, kind: str) -> None:
    path = flights.fly(tmp_path, flights.plain(), flights.nothing, calm=1)
    damaged(kind, path)
    with pytest.raises(UserError, match="flight"):
        read_flight(path)


def test_a_step_of_a_run(whole_run: Path, tmp_path: Path) -> None:
    flight = flight_of_run(whole_run, 8)
    assert isinstance(flight, Flight)
    assert [r["step"] for r in flight.records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step_of(path) for path in flight.checkpoints] == [6]
    with pytest.raises(UserError, match="steps 1 to 8"):
        flight_of_run(whole_run, 9)
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    norms = [1.0, 2.0, 1.5, 30.0, 20.0, 80.0, 1.0, 1.0]
    lines = [{"step": n, "loss": 1, "grad_norm": g} for n, g in enumerate(norms, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = flight_of_run(run)  # 80 over the median 2; 30 over 1.5
    assert (found.step, found.reason) == (6, "chosen by its gradient norm, for there is no verdict")
    assert flight_of_run(run, 4).reason == "as asked"
    assert replace(flight, path=run).path == run
