"""What is read from the logs of a run, against the definitions on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from mvsplit.data import Digits
from mvsplit.reproduce.runlog import RunLog
from mvsplit.reproduce.timestep import RIDGE, input_statistics, ridge_r2
from mvsplit.reproduce.trial import token_floor
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig
from tests.reproduce.tiny import DEAD, FLOOR, LIVE, TINY, hand_made


@pytest.mark.parametrize(
    ("what", "collapsed", "lives"),
    [
        (DEAD, 1, 0),
        (LIVE, 0, 1),
        ({"loss": 0.85 * FLOOR, "similarity": 0.99}, 0, 0),  # alike, but the loss is not dead
        ({"loss": 1.2 * FLOOR, "similarity": 0.3}, 0, 0),  # a divergence that is not mean-mode
        ({**DEAD, "ended": "non-finite: step 99"}, 0, 0),
        ({**LIVE, "ended": "non-finite: step 99"}, 0, 0),
    ],
)
def test_collapsed_and_alive(what, collapsed, lives):
    log = hand_made("plain", **what)
    assert (log.collapsed, log.lives) == (collapsed, lives)


def test_the_end_is_the_last_fifth_of_the_steps_that_were_asked_for():
    log = hand_made("plain")
    for line in log.metrics:
        line["loss"] = float(line["step"])  # type: ignore[index]
    assert log.end_loss == pytest.approx(np.mean(range(81, 101)) / FLOOR)
    short = RunLog(**{**vars(log), "metrics": log.metrics[:70]})
    assert short.end_loss == math.inf
    assert log.loss_at(0.5) == pytest.approx(np.mean(range(41, 51)) / FLOOR)


def test_the_deepest_quarter_is_rounded_up():
    log = hand_made("plain")
    line = {"step": 100, "layer": list(range(5)), "tcs": [0.0, 0.0, 0.0, 0.4, 0.8]}
    log = RunLog(**{**vars(log), "layers": [line]})
    assert log.end_similarity == pytest.approx(0.6)


def test_rise_and_fall():
    log = hand_made(
        "plain",
        before={"g_mean_attn": 2.0, "grad_key": 3.0},
        after={"g_mean_attn": 8.0, "grad_key": 0.0},
    )
    log.layers[30]["g_mean_attn"][:] = [20.0] * 8  # step 62, a single look
    assert log.rise("g_mean_attn") == pytest.approx(10)
    assert log.peak("g_mean_attn") == pytest.approx(20 * math.sqrt(8))
    assert log.rise("g_mean_ffn") is None
    assert log.fall("grad_key", 50) > 1e30  # to nothing at all, and still a number
    assert log.fall("grad_query", 50) is None


def test_a_run_that_has_not_learned_was_not_healthy_before():
    assert hand_made("plain").healthy_before == 1
    log = hand_made("plain")
    for line in log.layers:
        line["tcs"][:] = [0.97] * 8
    assert log.healthy_before == 0
    log = hand_made("plain")
    for line in log.metrics:
        line["loss"] = FLOOR  # type: ignore[index]
    assert log.healthy_before == 0


def seen(*looks: tuple[int, float]) -> RunLog:
    """A run with a rise of the rate after step 50 and looks at steps, each with a similarity."""
    lines = [{"step": step, "layer": [0], "tcs": [tcs]} for step, tcs in looks]
    return RunLog(**{**vars(hand_made("plain")), "layers": lines})


def test_a_network_has_settled_where_its_tokens_stay_alike():
    log = seen((40, 0.1), (52, 0.97), (54, 0.3), (59, 0.96), (80, 1.0))
    assert (log.settled, log.settled_within) == (59, 5)
    assert seen((40, 0.1), (52, 0.97), (54, 0.3)).settled is None
    assert seen((40, 0.1), (52, 0.97), (54, 0.3)).settled_within is None
    assert seen((40, 1.0), (50, 1.0)).settled == 40
    assert seen().settled is None


def test_the_entry_is_seen_as_finely_as_its_widest_gap():
    assert seen((50, 0.1), (52, 0.5), (58, 0.6), (60, 1.0), (90, 1.0)).entry_gap == 6
    assert seen((50, 0.1), (60, 1.0), (62, 1.0)).entry_gap == 10  # from the rise itself
    assert seen((50, 0.1), (52, 0.5), (54, 0.5)).entry_gap == 36  # to where no peak is looked for
    assert seen((50, 0.1), (95, 1.0)).entry_gap is None
    assert seen().entry_gap is None
    assert hand_made("plain", **DEAD).entry_gap == 2


def test_the_floor_is_what_tokens_alike_can_reach():
    experiment = TINY.experiment(TINY.regimes["start"], RuleConfig(name="plain"), 0)
    x0 = Digits().fetch(range(256)).latents
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    target = (x0 - x1).view(256, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(256, 16, 4)
    best = target.mean(1, keepdim=True)  # the best answer that is one for all tokens
    assert token_floor(experiment) == pytest.approx(
        float((target - best).square().mean()), rel=1e-6
    )
    assert experiment.data == DataConfig(dataset="digits")


def test_ridge_is_that_of_sklearn():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(90, 5)) * [1, 10, 0.1, 3, 1] + 4
    y = x @ [1, 0, 5, -1, 0] + draw.normal(size=90)
    fit = slice(60)
    strength = RIDGE * np.square(x[fit] - x[fit].mean(0)).mean() * 60
    model = Ridge(alpha=strength).fit(x[fit], y[fit])
    assert ridge_r2(x, y) == pytest.approx(r2_score(y[60:], model.predict(x[60:])))
    assert ridge_r2(draw.normal(size=(90, 5)), y) < 0.2


def test_input_statistics():
    noisy = torch.randn(7, 2, 3, 5)
    found = input_statistics(noisy)
    for row, sample in zip(found, noisy.double().numpy().reshape(7, -1), strict=True):
        assert row == pytest.approx([sample.mean(), sample.std(ddof=1), (sample**2).mean()])
