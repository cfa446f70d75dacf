"""Trials that are trained as one against the same trials alone: their logs, and the verdicts."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from mvsplit.reproduce import Study, get_claim
from mvsplit.reproduce.depth import together as training
from mvsplit.reproduce.together import REGIMES, groups, run_trials
from mvsplit.reproduce.trial import RECORD, run_trial
from mvsplit.training.files import read_lines
from tests.reproduce.tiny import TINY

CLAIMS = ("collapse", "controls", "delayed", "front", "order", "thousand")


def trials(*names: str):
    return {t.name: t for name in names for t in get_claim(name).trials(TINY)}


def test_groups_are_of_one_regime_and_leave_out_what_needs_more():
    found = groups(trials(*CLAIMS, "modes", "timestep").values(), REGIMES)
    assert len(found) == 3
    for group in found:
        assert len({t.name.partition("-")[0] for t in group}) == 1
    assert {t.name.partition("-")[0] for group in found for t in group} == set(REGIMES)
    assert groups(trials("collapse").values(), ()) == []
    parts = groups(trials(*CLAIMS, "modes", "timestep").values(), REGIMES, 4)
    assert [*chain(*parts)] == [*chain(*found)]
    assert max(map(len, parts)) == 4 < max(map(len, found))


@pytest.mark.parametrize("claim", ["controls", "front", "delayed"])
def test_a_trial_has_the_logs_that_it_has_alone(tmp_path, claim):
    both = {"alone": tmp_path / "alone", "one": tmp_path / "one"}
    mine = [*trials(claim).values()]
    assert run_trials(mine, both["one"])
    for trial in mine[::3]:
        assert run_trial(trial, both["alone"])
        alone, one = (read(folder / trial.name) for folder in both.values())
        assert one[0] == pytest.approx(alone[0], rel=1e-4)
        assert one[1] == pytest.approx(alone[1], rel=1e-3, abs=1e-4)
        assert one[2] | {"seconds": 0, "together": 0} == alone[2] | {"seconds": 0, "together": 0}
        assert one[2]["together"] == len(mine)
        assert trial.finished(both["one"])


def read(run: Path):
    """Every number of the logs that both have, and the record."""
    fields = ("step", "loss", "grad_norm", "lr")
    metrics = [line[f] for line in read_lines(run / "metrics.jsonl") for f in fields]
    looks = [value for line in read_lines(run / "layers.jsonl") for value in line["tcs"]]
    return metrics, looks, json.loads((run / RECORD).read_text())


def test_a_study_judges_both_ways_alike(tmp_path):
    claims = [get_claim("thousand")]
    found = [
        Study(tmp_path / str(len(regimes)), TINY, workers=1, together=regimes).run(claims)[0]
        for regimes in ((), REGIMES)
    ]
    alone, one = found
    assert one["verdict"] == alone["verdict"]
    for name, figure in alone["figures"].items():
        assert one["figures"][name]["values"] == pytest.approx(figure["values"], rel=1e-3, abs=1e-4)
    assert [row["together"] for row in one["runs"]] == [2, 2] if len(one["runs"]) == 2 else [1]


def test_a_trial_that_is_not_finite_ends_where_it_does(tmp_path):
    first, *_ = trials("thousand").values()
    experiment = first.experiment

    broken = replace(
        first,
        name="broken",
        experiment=replace(experiment, train=replace(experiment.train, lr=1e30)),
    )
    assert run_trials([first, broken], tmp_path)
    record = json.loads((tmp_path / "broken" / RECORD).read_text())
    assert record["ended"] == "non-finite: step 2"
    assert len(list(read_lines(tmp_path / "broken" / "metrics.jsonl"))) == 1
    assert len(list(read_lines(tmp_path / first.name / "metrics.jsonl"))) == 8


def test_the_clock_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CLOCK", 2)
    assert not run_trials([*trials("thousand").values()], tmp_path, end=0.0)
    assert not list(tmp_path.iterdir())
