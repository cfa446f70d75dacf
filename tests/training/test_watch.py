"""The watch over a run of ours: what it is shown, when, and what it tells."""

from __future__ import annotations

import math
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mvsplit.diagnostics.detector import Detector
from mvsplit.training import NonFiniteError, Observer, train
from mvsplit.training.progress import ProgressLine
from mvsplit.training.watch import Watch
from tests.training.runs import experiment, lines


def calm(step: int) -> Any:
    metrics = {"loss": 1.0 + 0.01 * (step % 5), "grad_norm": 1.0 + 0.1 * (step % 3)}
    return SimpleNamespace(step=step, metrics=metrics)


def test_an_alarm_is_told_before_the_update_with_its_own_step():
    told = []
    watch = Watch(lambda name, message, **fields: told.append((name, message, fields)))
    for step in range(1, 40):
        watch.on_gradients(SimpleNamespace(step=step - 1), calm(step))
    broken = SimpleNamespace(step=40, metrics={"loss": math.nan, "grad_norm": 1.0})
    watch.on_gradients(SimpleNamespace(step=39), broken)
    ((name, message, fields),) = told
    assert (name, message) == ("alarm", "Not finite: loss.")
    assert fields == {
        "at_step": 40,
        "level": "alarm",
        "verdict": "non-finite",
        "layer": None,
        "evidence": {"loss": "NaN"},
    }


def test_it_asks_for_looks_while_something_stirs_but_not_for_ever():
    watch = Watch(lambda *_, **__: None, burst=3)
    asked = []
    for step in range(1, 60):
        gradients = calm(step)
        if step >= 40:
            gradients.metrics["grad_norm"] *= 3.0  # a stir, no spike
        watch.on_gradients(SimpleNamespace(step=step - 1), gradients)
        asked.append(watch.stirred)
        if watch.stirred:
            watch.on_probe(SimpleNamespace(step=step), {"step": step, "layer": [0], "tcs": [0.1]})
    assert asked.count(True) == 3
    assert asked.index(True) == 39


class Restless(Detector):
    """Something always stirs."""

    stirred = property(lambda self: True, lambda self, value: None)


@pytest.mark.parametrize(("burst", "looked"), [(0, [4, 8]), (2, [1, 2, 4, 8])])
def test_a_run_says_how_many_looks_the_watch_may_ask_for(tmp_path, monkeypatch, burst, looked):
    monkeypatch.setattr("mvsplit.training.watch.Detector", Restless)
    train(experiment(probe_every=4, probe_burst=burst, device="cpu"), tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run" / "layers.jsonl")] == looked


def test_a_run_that_breaks_has_the_alarm_in_its_events_and_a_flight(tmp_path):
    class Break(Observer):
        """Puts NaN into the weights before step 4, as a broken update would."""

        def on_step(self, state, metrics):
            if state.step == 3:
                with torch.no_grad():
                    next(state.model.parameters()).fill_(math.nan)

    with pytest.raises(NonFiniteError):
        train(experiment(device="cpu"), tmp_path / "run", observers=[Break()])
    events = lines(tmp_path / "run" / "events.jsonl")
    (alarm,) = [event for event in events if event.get("level") == "alarm"]
    assert (alarm["event"], alarm["verdict"], alarm["at_step"]) == ("alarm", "non-finite", 4)
    assert [path.name for path in (tmp_path / "run" / "flights").iterdir()] == ["step_00000004"]


def test_a_verdict_is_printed_with_its_step_its_level_and_its_name() -> None:
    text = StringIO()
    line = ProgressLine(Console(file=text, width=200))
    event = {"event": "alarm", "level": "alarm", "step": 21, "at_step": 22, "verdict": "mean-mode"}
    line.on_event(event | {"layer": 53, "message": "The tokens are alike."})
    line.on_event({"event": "resumed", "step": 3, "message": "resumed runs/x at step 3"})
    assert text.getvalue().splitlines() == [
        "step 22: ALARM mean-mode, layer 53: The tokens are alike.",
        "resumed runs/x at step 3",
    ]
