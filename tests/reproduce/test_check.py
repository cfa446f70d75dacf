"""The check before the runs: what it passes, and what it refuses."""

import pytest

from mvsplit.reproduce import check
from mvsplit.reproduce.check import check_training
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
