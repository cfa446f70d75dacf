"""The check before the runs: what it passes, and what it refuses."""

import signal
from functools import partial

import pytest

from mvsplit.errors import UserError
from mvsplit.reproduce import check
from mvsplit.reproduce.check import check_minutes, check_training
from mvsplit.reproduce.workers import Stopped
from mvsplit.training import Observer, train
from tests.training.runs import experiment


def test_a_run_that_repeats_and_learns_passes():
    words = check_training(experiment(steps=20, lr=3e-2, device="cpu"))
    assert words.startswith("check: loss ")
    assert words.endswith("two runs within 0.0e+00")


def test_a_run_that_learns_nothing_is_refused():
    with pytest.raises(RuntimeError, match="does not learn"):
        check_training(experiment(steps=4, lr=1e-9, device="cpu"))


@pytest.mark.parametrize("other", [1.1, float("nan")])
def test_runs_that_differ_are_refused(monkeypatch, other):
    found = iter([[2.0, 1.0], [2.0, other]])
    monkeypatch.setattr(check, "_losses", lambda given: next(found))
    with pytest.raises(RuntimeError, match="two runs of one seed differ"):
        check_training(experiment())


class Sends(Observer):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_step(self, state, metrics):
        if state.step == 2:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_training_hears_stops_the_check(monkeypatch, number):
    monkeypatch.setattr(check, "train", partial(train, observers=[Sends(number)]))
    with pytest.raises(Stopped) as stopped:
        check_training(experiment(steps=20, lr=3e-2, device="cpu"))
    assert stopped.value.signal == number


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_no_minutes_are_refused(minutes):
    with pytest.raises(UserError, match=f"minutes={minutes:g}: nothing can be run in them"):
        check_minutes(minutes)
    check_minutes(None)
    check_minutes(0.1)
