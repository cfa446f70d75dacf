"""A step that ended a run and has no line in metrics.jsonl is found by replay and explain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mvsplit.cli import main
from mvsplit.errors import UserError
from mvsplit.training import Observer, TrainState, train
from mvsplit.training.fatal import fatal_step
from tests.training import runs


class Poison(Observer):
    """Spoils a weight after step 2, so that step 3 is not finite."""

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            with torch.no_grad():
                state.model.head.bias[0] = torch.nan


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run of two lines that its third step ended."""
    with pytest.raises(UserError, match="Final"):
        train(runs.experiment(save_every=100), tmp_path / "run", observers=[Poison()])
    assert [line["step"] for line in runs.lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    return tmp_path / "run"


def test_replay_says_which_step_what_and_where(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", "replay", str(ended), "--json"]) == 0
    out, err = capsys.readouterr()
    (event,) = json.loads(out)["events"]
    assert (event["step"], event["level"], event["verdict"]) == (3, "alarm", "non-finite")
    assert event["evidence"]["loss"] == "NaN"
    assert "step 3 ended the run (not finite: loss, grad_norm" in err
    assert f"its flight is {ended}/flights/step_00000003" in err
    assert main(["monitor", "replay", str(ended)]) == 0
    assert "non-finite" in capsys.readouterr().out


def test_explain_takes_this_step_unless_told_another(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, step in (([], 3), (["--step", "3"], 3), (["--step", "2"], 2)):
        assert main(["explain", str(ended), *more]) == 0
        said = capsys.readouterr().out
        assert "step 3 ended the run (not finite: loss, grad_norm" in said
        assert f"its flight is {ended}/flights/step_00000003" in said
        assert f"\nstep {step} of" in said
        assert json.loads((ended / f"explain_{step:08d}.json").read_text())["step"] == step


def test_without_a_flight_the_events_say_it(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(ended / "flights")
    assert main(["monitor", "replay", str(ended), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [event["step"] for event in json.loads(out)["events"]] == [3]
    assert "no flight of it was written" in err
    assert "the weights of Final are not finite" in err


def test_a_run_that_goes_on_since_has_no_such_step(ended: Path) -> None:
    train(runs.experiment(save_every=100), ended)
    assert fatal_step(ended) is None
    assert fatal_step(ended.parent) is None, "no run at all"
