"""Each claim's rule on logs made by hand: it can give every verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from mvsplit.errors import UserError
from mvsplit.reproduce import CLAIMS, SIZES, get_claim
from mvsplit.reproduce.claims_alignment import at_the_peak, rank_correlation
from mvsplit.reproduce.claims_states import crossed, front
from mvsplit.reproduce.rule import FAILS, HOLDS, OPEN, fingerprint, judge
from mvsplit.reproduce.runlog import RunLog, Runs
from tests.reproduce.tiny import DEAD, FLOOR, HALF, JUMP, LAYERS, LIVE, STEPS, TINY, hand_made

SEEDS = (0, 1, 2)
LOW, SMALL = "plain, low rate", "MV-Split, small beta"


def verdict(claim: str, logs: Iterable[RunLog]) -> str:
    chosen = get_claim(claim)
    return judge(chosen.rule, chosen.measure(Runs(logs=list(logs)))).verdict


def seeds(label: str, **what: Any) -> list[RunLog]:
    return [hand_made(label, seed, **what) for seed in SEEDS]


# collapse and order


def starts(
    plain: dict, split: dict, low: dict = LIVE, scales: tuple[dict, ...] = (LIVE, LIVE)
) -> list[RunLog]:
    logs = seeds("plain", **plain) + seeds("MV-Split", **split) + seeds(LOW, **low)
    logs += seeds(SMALL, **LIVE)
    for label, what in zip(("LayerScale 0.01", "LayerScale 0.001"), scales, strict=True):
        logs += seeds(label, **what)
    return logs


def of_collapse(*what: dict) -> list[RunLog]:
    return [log for log in starts(*what) if not log.label.startswith("LayerScale")]


def of_order(plain: dict, split: float, low: float, *scales: float) -> list[RunLog]:
    """Losses over the floor; `low` is that of the plain network half way."""
    logs = starts(
        plain,
        {"loss": split * FLOOR},
        LIVE,
        tuple({"loss": loss * FLOOR} for loss in scales),
    )
    for log in logs:
        if log.label == LOW:
            early = [m for m in log.metrics if m["step"] <= JUMP]
            for line in early:
                line["loss"] = low * FLOOR  # type: ignore[index]
    return [log for log in logs if log.label != SMALL]


# gradients around a rise of the rate


def gradients(
    label: str,
    mean: tuple[float, float] = (1.0, 1.0),
    centered: tuple[float, float] = (1.0, 1.0),
    query: tuple[float, float] = (1.0, 1.0),
    writer: tuple[float, float] = (1.0, 1.0),
    excess: tuple[float, float] = (0.5, 15.0),
    envelope: tuple[float, float] = (4.0, 16.0),
    split: tuple[float, float] | None = None,
    end: dict[str, float] = DEAD,
) -> list[RunLog]:
    """Each pair is (before, after); `split`: G_mean of W_O where it is not that of W_2."""

    def at(i: int) -> dict[str, float]:
        fields = {"grad_query": query[i], "grad_key": query[i], "grad_writer_attn": writer[i]}
        for branch in ("attn", "ffn"):
            own = split if split is not None and branch == "attn" else mean
            fields |= {f"g_mean_{branch}": own[i], f"g_ctr_{branch}": centered[i]}
            fields |= {f"amplification_{branch}": 1 + excess[i]}
            fields |= {f"envelope_{branch}": envelope[i]}
        return fields

    return seeds(label, before=at(0), after=at(1), **end)


def unseen(logs: list[RunLog]) -> list[RunLog]:
    """Without the looks of three steps after the rise of the rate."""
    for log in logs:
        log.layers[:] = [x for x in log.layers if not JUMP < x["step"] <= JUMP + 3]  # type: ignore[index]
    return logs


def jumps(plain: list[RunLog], attention: list[RunLog] | None = None) -> list[RunLog]:
    return plain + (attention or []) + seeds("MV-Split", **LIVE)


# states


def fronts(start: float, end: float, what: dict = DEAD, zero: dict = LIVE) -> list[RunLog]:
    """The front goes from the share `start` of the depth to `end` in the course of the run."""
    logs = seeds("standard writers", **what)
    for log in logs:
        for line in log.layers:
            place = start + (end - start) * line["step"] / STEPS
            alike = np.arange(LAYERS) >= round(place * LAYERS)
            line["tcs"] = np.where(alike, 0.99, 0.1).tolist()  # type: ignore[index]
        for line in log.metrics:
            line["loss"] = what["loss"]  # type: ignore[index]
    return logs + seeds("zero writers", **zero)


def times(worst: float, statistics: float, shuffled: float, what: dict = LIVE) -> list[RunLog]:
    found = {"layers": [0.999, worst], "statistics": statistics, "shuffled": shuffled}
    return seeds("MV-Split", times=found, **what)


def controls(*losses: float, split: float = 0.5) -> list[RunLog]:
    names = ("hard centering", "attention only", "clip 0.1")
    logs = seeds(SMALL, loss=split * FLOOR)
    for name, loss in zip(names, losses, strict=True):
        logs += seeds(name, loss=loss * FLOOR)
    return logs


def thousand(**split: Any) -> list[RunLog]:
    return seeds("MV-Split", **split) + seeds("plain", **DEAD)


CASES: list[tuple[str, str, Callable[[], list[RunLog]]]] = [
    ("collapse", HOLDS, lambda: of_collapse(DEAD, LIVE)),
    ("collapse", FAILS, lambda: of_collapse(LIVE, LIVE)),
    ("collapse", FAILS, lambda: of_collapse(DEAD, DEAD)),
    ("collapse", OPEN, lambda: of_collapse(DEAD, LIVE, DEAD)),  # it never learns
    ("modes", HOLDS, lambda: jumps(gradients("plain", mean=(1, 150)))),
    ("modes", FAILS, lambda: jumps(gradients("plain", mean=(1, 150), centered=(1, 100)))),
    ("modes", FAILS, lambda: jumps(gradients("plain", mean=(1, 3)))),
    ("modes", OPEN, lambda: jumps(gradients("plain", mean=(1, 20)))),
    ("modes", OPEN, lambda: jumps(gradients("plain", mean=(1, 150), end=LIVE))),
    ("modes", OPEN, lambda: jumps(unseen(gradients("plain", mean=(1, 3))))),
    ("alignment", HOLDS, lambda: jumps(gradients("plain"))),
    ("alignment", FAILS, lambda: jumps(gradients("plain", excess=(9.0, 40.0)))),
    ("alignment", FAILS, lambda: jumps(gradients("plain", excess=(0.5, 0.6)))),
    ("alignment", OPEN, lambda: jumps(gradients("plain", excess=(0.5, 4.0)))),
    ("alignment-entry", HOLDS, lambda: jumps(gradients("plain", mean=(1, 20)))),
    ("alignment-entry", FAILS, lambda: jumps(gradients("plain", excess=(0.5, 0.6)))),
    ("alignment-entry", FAILS, lambda: jumps(gradients("plain", excess=(3.0, 15.0)))),
    ("alignment-entry", OPEN, lambda: jumps(gradients("plain", excess=(0.5, 6.0)))),
    ("extinction", HOLDS, lambda: jumps(gradients("plain", query=(1, 1e-4)))),
    ("extinction", FAILS, lambda: jumps(gradients("plain", query=(1, 0.5)))),
    ("extinction", FAILS, lambda: jumps(gradients("plain", query=(1, 1e-4), writer=(1, 1e-4)))),
    ("extinction", OPEN, lambda: jumps(gradients("plain", query=(1, 1e-2)))),
    ("delayed", HOLDS, lambda: jumps(seeds("plain", **DEAD))),
    ("delayed", FAILS, lambda: jumps(seeds("plain", **LIVE))),
    ("delayed", OPEN, lambda: jumps([*seeds("plain", **DEAD)[:2], hand_made("plain", 2)])),
    ("order", HOLDS, lambda: of_order(DEAD, 0.5, 0.6, 0.7, 0.6)),
    ("order", FAILS, lambda: of_order(DEAD, 0.5, 0.6, 0.7, 0.4)),  # the best γ is ahead
    ("order", FAILS, lambda: of_order(DEAD, 0.5, 0.9, 0.7, 0.6)),
    ("order", OPEN, lambda: of_order(DEAD, 0.5, 0.6, 0.7, 0.505)),  # a tie
    ("order", OPEN, lambda: of_order(LIVE, 0.5, 0.6, 0.7, 0.6)),
    (
        "attention-only",
        HOLDS,
        lambda: jumps(
            gradients("plain", mean=(1, 60), split=(1, 150)),
            gradients("attention only", mean=(1, 60), split=(0.01, 0.02)),
        ),
    ),
    (
        "attention-only",
        FAILS,
        lambda: jumps(
            gradients("plain", mean=(1, 60), split=(1, 150)),
            gradients("attention only", mean=(1, 60), split=(1, 150)),
        ),
    ),
    (
        "attention-only",
        OPEN,
        lambda: jumps(gradients("plain"), gradients("attention only", mean=(1, 60))),
    ),
    ("timestep", HOLDS, lambda: times(0.99, 0.4, 0.01)),
    ("timestep", FAILS, lambda: times(0.5, 0.4, 0.01)),
    ("timestep", FAILS, lambda: times(0.99, 0.4, 0.5)),
    ("timestep", OPEN, lambda: times(0.9, 0.4, 0.01)),
    ("timestep", OPEN, lambda: times(0.99, 0.4, 0.01, DEAD)),
    ("front", HOLDS, lambda: fronts(0.6, 0.1)),
    ("front", HOLDS, lambda: fronts(0.1, 0.6)),  # whichever way it moves
    ("front", FAILS, lambda: fronts(0.3, 0.3)),  # it stands still
    ("front", FAILS, lambda: fronts(0.6, 0.1, LIVE)),
    ("front", OPEN, lambda: fronts(0.6, 0.1, DEAD, DEAD)),
    ("controls", HOLDS, lambda: controls(1.1, 1.2, 0.9)),
    ("controls", FAILS, lambda: controls(1.1, 0.5, 0.9)),
    ("controls", OPEN, lambda: controls(1.1, 0.56, 0.9)),
    ("controls", OPEN, lambda: controls(1.1, 1.2, 0.9, split=1.0)),
    ("thousand", HOLDS, lambda: thousand(**LIVE)),
    ("thousand", FAILS, lambda: thousand(**DEAD)),
    ("thousand", FAILS, lambda: thousand(**LIVE, ended="non-finite: step 7")),
    ("thousand", OPEN, lambda: thousand(loss=0.85 * FLOOR, similarity=0.1)),
    ("thousand", OPEN, lambda: thousand(**HALF)),
]


@pytest.mark.parametrize(
    ("claim", "wanted", "logs"),
    CASES,
    ids=[f"{c}-{w.split()[0]}{i}" for i, (c, w, _) in enumerate(CASES)],
)
def test_the_rule_gives_the_verdict(claim, wanted, logs):
    assert verdict(claim, logs()) == wanted


def test_every_claim_can_get_every_verdict():
    found = {name: {wanted for claim, wanted, _ in CASES if claim == name} for name in CLAIMS}
    assert found == {name: {HOLDS, FAILS, OPEN} for name in CLAIMS}


def test_plots_have_the_runs_in_them():
    panels = get_claim("modes").panels(Runs(logs=gradients("plain", mean=(1, 150))))
    by_label = {line.label: line for line in panels[0].lines if not line.faint}
    wanted = [1.0] * 25 + [150.0] * 25
    assert by_label["mean"].y == pytest.approx(np.sqrt(LAYERS) * np.array(wanted), rel=1e-3)
    assert by_label["mean"].x == list(range(2, STEPS + 1, 2))


def test_the_peak_is_where_the_mean_gradient_is_largest():
    (log, *_) = gradients("plain", mean=(9.0, 2.0), excess=(0.5, 4.0), envelope=(5.0, 5.0))
    look = log.layers[26]  # step 54
    look["g_mean_attn"][3] = 3.0
    look["amplification_attn"][3] = 1 + 4.5
    assert at_the_peak(log, "W_O") == pytest.approx(0.9)
    assert at_the_peak(log, "W_2") == pytest.approx(0.8)


def test_the_front_is_the_shallowest_of_the_layers_that_are_alike_to_the_last():
    log = hand_made("standard writers")
    rows = [
        [0.1, 0.99, 0.1, 0.99, 0.99],
        [0.99] * 5,
        [0.99] * 4 + [0.1],
        [0.1, None, 0.99, 0.99, 0.99],
    ]
    for line, row in zip(log.layers[:4], rows, strict=True):
        line["tcs"] = row  # type: ignore[index]
    short = RunLog(**{**vars(log), "layers": log.layers[:4]})
    assert front(short)[1].tolist() == [3, 0, 5, 2]
    assert crossed(short) is None  # too few looks for a start and an end


def test_rank_correlation_is_spearman():
    x, y = np.random.default_rng(0).normal(size=(2, 57))
    y += x
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert rank_correlation(x[:2], y[:2]) is None


def test_runs_of_one_name_are_the_same_run():
    for size in (TINY, *SIZES.values()):
        by_name: dict[str, Any] = {}
        for claim in CLAIMS.values():
            for trial in claim.trials(size):
                known = by_name.setdefault(trial.name, trial)
                assert (known.experiment, known.jump, known.factor) == (
                    trial.experiment,
                    trial.jump,
                    trial.factor,
                )


def test_rules_are_told_apart():
    assert len({fingerprint(claim.rule) for claim in CLAIMS.values()}) == len(CLAIMS)


def test_an_unknown_claim():
    with pytest.raises(UserError, match="did you mean collapse"):
        get_claim("colapse")
