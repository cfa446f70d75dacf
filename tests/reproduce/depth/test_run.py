"""One run of the bench: what a row says, against its logs and an independent reading of them."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch

from mvsplit.data import Shapes
from mvsplit.errors import UserError
from mvsplit.evaluation.held_out import SERIES
from mvsplit.models import DiT
from mvsplit.reproduce.depth import run as run_module
from mvsplit.reproduce.depth.plan import BenchRun
from mvsplit.reproduce.depth.run import (
    check_row,
    collapse,
    draw,
    fingerprint,
    first_words,
    read_rows,
    run_bench,
    windows,
)
from mvsplit.reproduce.depth.study import MARGIN, expected
from mvsplit.residuals import RuleConfig
from mvsplit.training import build_state, load_run, train
from mvsplit.training.files import read_lines
from tests.reproduce.depth.tiny import TINY, entry

RUN = BenchRun(entry=entry(), depth=2, width=16, rate=1e-2, seed=0)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run's row and the logs that it was made from."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.shutil, "rmtree", lambda path: None)
        assert run_bench(RUN, TINY, out)
    return out, read_rows(out)[0]


def test_its_numbers_are_those_of_its_logs(done):
    out, row = done
    losses = [line["loss"] for line in read_lines(out / "runs" / RUN.name / "metrics.jsonl")]
    assert len(losses) == row["steps_taken"] == 20
    assert row["curve"] == pytest.approx([np.mean(losses[:10]), np.mean(losses[10:])], rel=1e-5)
    (look,) = [
        line for line in read_lines(out / "runs" / RUN.name / "layers.jsonl") if line["step"] == 20
    ]
    assert row["similarity"] == pytest.approx(look["tcs"][-1], rel=1e-5)
    assert row["lives"] == (row["validation_loss"] < 0.8 * row["floor"])


def test_the_validation_loss_is_that_of_the_saved_network(done):
    """The formula of the loss at the fixed noise and times, by other means: sample by sample."""
    out, row = done
    loaded = load_run(out / "runs" / RUN.name, ema=False)
    golden, found = (math.sqrt(5) - 1) / 2, []
    examples = Shapes(32, SERIES).fetch(range(TINY.validation))
    text, valid = loaded.embedder.encode(examples.captions)
    from mvsplit.sampling import sample_noise

    for i, x0 in enumerate(examples.latents):
        for part in range(10):
            t = (part + ((i + 0.5) * golden) % 1) / 10
            x1 = sample_noise([10 * i + part], x0.shape, seed=0)[0]
            with torch.no_grad():
                v = loaded.model(((1 - t) * x0 + t * x1)[None], text[i : i + 1], valid[i : i + 1])[
                    0
                ]
            found.append(float((v - (x0 - x1)).square().mean()))
    assert row["validation_loss"] == pytest.approx(np.mean(found), rel=1e-4)


def test_a_row_of_other_settings_is_refused(done):
    out, row = done
    check_row(RUN, TINY, row, out)
    with pytest.raises(UserError, match="other settings; choose another --out"):
        check_row(RUN, dataclasses.replace(TINY, batch_size=8), row, out)


def test_where_a_run_is_and_how_often_it_is_saved_decide_nothing():
    there = RUN.experiment(TINY)
    moved = dataclasses.replace(there.train, device="cuda", save_every=7, keep=9)
    assert fingerprint(dataclasses.replace(there, train=moved)) == fingerprint(there)
    other = dataclasses.replace(there.train, gain_lr=2.0)
    assert fingerprint(dataclasses.replace(there, train=other)) != fingerprint(there)


def test_a_run_that_the_clock_stops_goes_on_to_the_same_row(tmp_path, done):
    stopped = not run_bench(RUN, TINY, tmp_path, end=time.time())
    assert stopped
    assert not read_rows(tmp_path)
    assert list(read_lines(tmp_path / "runs" / RUN.name / "metrics.jsonl"))
    assert run_bench(RUN, TINY, tmp_path)
    (row,) = read_rows(tmp_path)
    assert not (tmp_path / "runs" / RUN.name).exists()
    same = ("curve", "validation_loss", "tasks", "similarity", "fingerprint")
    assert {k: row[k] for k in same} == {k: done[1][k] for k in same}


def test_the_seconds_of_a_row_are_those_of_all_of_its_processes(tmp_path, done):
    """The first process is stopped after a step that took long, by its log."""
    assert not run_bench(RUN, TINY, tmp_path, end=time.time())
    log = tmp_path / "runs" / RUN.name / "metrics.jsonl"
    before = list(read_lines(log))
    before[0]["seconds"] = 1000.0
    log.write_text("".join(json.dumps(line) + "\n" for line in before))
    began = time.perf_counter()
    assert run_bench(RUN, TINY, tmp_path)
    took = time.perf_counter() - began
    (row,), earlier = read_rows(tmp_path), sum(line["seconds"] for line in before)
    assert row["seconds_stepping"] > 1000  # six digits are kept of it
    assert row["seconds_stepping"] <= row["seconds_trained"] + 0.01
    assert earlier < row["seconds_trained"] < row["seconds"] < earlier + took
    assert row["cpu_seconds"] is None
    whole = done[1]
    assert whole["seconds_stepping"] < whole["seconds_trained"] < whole["seconds"]
    assert whole["cpu_seconds"] > 0


def test_a_run_that_is_not_finite_is_a_row(tmp_path):
    run = dataclasses.replace(RUN, rate=1e30)
    assert run_bench(run, TINY, tmp_path)
    (row,) = read_rows(tmp_path)
    assert row["ended"].startswith("non-finite: step 2")
    assert not row["lives"]
    assert row["steps_taken"] < 20
    json.dumps(row, allow_nan=False)


def test_pictures_are_those_of_euler_with_guidance():
    torch.manual_seed(0)
    state = build_state(RUN.experiment(TINY))
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    prompts = ["a red circle", "two blue squares"]
    found = draw(state.model, state.loader.embedder, prompts, 3, like=torch.empty(0))
    from mvsplit.sampling import sample_noise

    for i, prompt in enumerate(prompts):
        z = sample_noise([i], (3, 32, 32), seed=0)
        for _ in range(3):
            v = [velocity(state.model, state.loader.embedder, z, words) for words in (prompt, "")]
            z = z + (v[1] + 2 * (v[0] - v[1])) / 3
        torch.testing.assert_close(found[i], z[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def velocity(model: DiT, embedder, z, prompt):
    text, _ = embedder.encode([prompt])
    return model(z, text)


def test_windows_leave_a_rest_out():
    losses = np.arange(25.0)
    np.testing.assert_array_equal(windows(losses), [4.5, 14.5])
    assert len(windows(losses[:9])) == 0


@pytest.mark.parametrize(
    ("shares", "finite", "expected"),
    [
        ([1.0, 0.7, 0.7, 0.95], True, 3),
        ([1.0, 0.7, 0.95, 0.7], True, None),  # it recovered
        ([1.0, 0.7, 0.7, 0.85], True, None),  # neither dead nor alive
        ([1.0, 1.0, 1.0, 1.0], True, None),  # never learned
        ([1.0, 0.7, 0.7, 0.7], False, 4),
        ([], False, None),
    ],
)
def test_a_collapse_is_the_loss_of_what_was_learned(shares, finite, expected):
    assert collapse(np.array(shares), dead_at_end=not finite) == expected


def test_the_first_alarm_counts_before_any_warning():
    warning = {"level": "warning", "verdict": "spike", "at_step": 3}
    alarm = {"level": "alarm", "verdict": "mean-mode", "at_step": 9}
    assert first_words([{"event": "started"}]) is None
    assert first_words([warning]) == {
        **{"level": "warning", "verdict": "spike", "step": 3, "alarms": 0, "warnings": 1}
    }
    assert first_words([warning, alarm, alarm])["verdict"] == "mean-mode"
    assert first_words([warning, alarm, alarm])["alarms"] == 2


def test_what_a_run_will_take_is_read_off_those_like_it():
    took = [(32, 1.0), (32, 3.0), (32, 2.0), (32, 2.5), (64, 9.0)]
    assert expected(RUN, took) == 3.0  # the longest of the last three
    assert expected(dataclasses.replace(RUN, depth=16), took) == pytest.approx(9.0 * 4)
    assert expected(RUN, []) == 0
    assert MARGIN > 1


def test_the_bench_trains_as_any_run_is_trained(done, tmp_path):
    train(RUN.experiment(TINY), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines]
    assert done[1]["curve"][-1] == pytest.approx(np.mean(losses[10:]), rel=1e-5)


def test_rows_of_before_beta_had_a_default_by_depth_are_still_those_runs():
    """Rules that have no β were configured with β = 1 and α = 0 then; MV-Split without β has 1/√L
    for both, and α = 0 where β is given. Given neither, its writers are standard since."""

    def of(writers="rule", **rule) -> str:
        there = BenchRun(entry=entry("plain"), depth=4, width=16, rate=1e-2, seed=0)
        experiment = there.experiment(TINY)
        model = dataclasses.replace(experiment.model, rule=RuleConfig(**rule), writers=writers)
        return fingerprint(dataclasses.replace(experiment, model=model))

    assert of(name="plain") == of(name="plain", beta=1.0)
    assert of(name="plain") == of(name="plain", beta=1.0, alpha=0.0)
    default = of(name="mvsplit", beta=0.5, alpha=0.5, writers="standard")
    assert of(name="mvsplit") == of(name="mvsplit", writers="standard") == default
    assert of(name="mvsplit") != of(name="mvsplit", beta=0.5, alpha=0.5)
    assert of(name="mvsplit", writers="zero") != of(name="mvsplit")
    assert of(name="mvsplit", beta=0.5) == of(name="mvsplit", beta=0.5, alpha=0.0)
    assert of(name="mvsplit") != of(name="mvsplit", beta=0.5)
    assert of(name="mvsplit", beta=0.5) != of(name="mvsplit", beta=1.0)
