"""The detector on the recorded runs, and the rule by which their truth was found."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks():
    """The folder of the benchmarks as a place to import from, as they are scripts."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def quality(benchmarks):
    import detector_quality

    return detector_quality


@pytest.fixture(scope="module")
def rows(quality):
    """What the detector says of each recorded run, all fields."""
    manifest = quality.read_manifest(quality.FOLDER)["runs"]
    return [
        quality.judge(row, quality.read_records(quality.FOLDER / row["file"])) for row in manifest
    ]


def test_there_are_enough_runs_of_each_kind(rows):
    labels = [row["truth"] for row in rows]
    assert labels.count("collapsed") >= 24
    assert labels.count("healthy") + labels.count("diverged") >= 24


def test_every_collapse_is_caught_with_the_right_verdict(rows):
    wrong = [r["run"] for r in rows if r["truth"] == "collapsed" and not r["right"]]
    assert wrong == []


def test_no_healthy_run_gives_an_alarm(rows):
    assert [r["run"] for r in rows if r["truth"] == "healthy" and r["verdict"]] == []


def test_every_divergence_is_an_alarm(rows):
    assert [r["run"] for r in rows if r["truth"] == "diverged" and not r["verdict"]] == []


def test_the_truth_of_a_run_is_a_rule_on_its_end(benchmarks):
    from record_runs import truth

    def run(losses, similarity, attention=0.1):
        for step, loss in enumerate(losses, start=1):
            yield {
                "step": step,
                "loss": loss,
                "grad_writer_attn": 0.3,
                "grad_writer_ffn": 0.4,
                "grad_query": attention if loss > 1.4 else 0.3,
                "grad_key": 0.0,
            }
            if step % 5 == 0:
                yield {"step": step, "tcs": [0.0] * 6 + [similarity] * 2}

    risen = [0.8] * 50 + [1.5] * 50
    assert truth(list(run(risen, 1.0)), 1.5)["label"] == "collapsed"
    assert truth(list(run(risen, 0.5)), 1.5)["label"] == "diverged"
    assert truth(list(run([0.8] * 50 + [math.nan], 1.0)), 1.5)["label"] == "diverged"
    assert truth(list(run([0.8] * 100, 0.5)), 1.5)["label"] == "healthy"
    assert truth(list(run([0.8] * 100, 1.0)), 1.5)["label"] == "recovered"
    assert truth(list(run([1.5] * 100, 0.5)), 1.5)["label"] == "unclear"
    assert truth(list(run(risen, 1.0, attention=1e-3)), 1.5)["lock_in_step"] == 51
    assert truth(list(run(risen, 1.0)), 1.5)["lock_in_step"] is None
