"""Claims about the states of a network: the front of App. B, the time in the token mean, App. H."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mvsplit.reproduce.claim import (
    PLAIN,
    Claim,
    Line,
    Panel,
    by_depth,
    curves,
    grouped,
    loss_panel,
    rounded,
    trial,
)
from mvsplit.reproduce.rule import Figure, at_least, below
from mvsplit.reproduce.runlog import ALIKE, Array, RunLog, Runs
from mvsplit.reproduce.sizes import Size
from mvsplit.reproduce.trial import Trial

STANDARD = "standard writers"
ZERO = "zero writers"


# The front


def _front_trials(size: Size) -> list[Trial]:
    return [
        t
        for seed in size.few
        for t in (
            trial(size, "front", STANDARD, PLAIN, seed, writers="standard"),
            trial(size, "front", ZERO, PLAIN, seed),
        )
    ]


def front(log: RunLog) -> tuple[Array, Array]:
    """At each look the shallowest layer from which on, to the last, all tokens are alike; the depth
    where none is. Steps [P], layers [P]."""
    steps, similarity = log.looks("tcs")
    if not len(steps):
        return steps, steps
    apart = ~(similarity >= ALIKE)  # NaN counts as apart
    depth = similarity.shape[1]
    last_apart = np.where(apart.any(1), depth - 1 - np.argmax(apart[:, ::-1], axis=1), -1)
    return steps, (last_apart + 1).astype(float)


def crossed(log: RunLog) -> float | None:
    """The share of the depth between where the front is in the first three looks and in the last
    three, as medians."""
    steps, place = front(log)
    if len(steps) < 6:
        return None
    depth = log.looks("tcs")[1].shape[1]
    return float(abs(np.median(place[:3]) - np.median(place[-3:]))) / depth


def _first_alike(log: RunLog) -> float | None:
    steps, similarity = log.deep("tcs")
    alike = np.flatnonzero(similarity >= ALIKE)
    return float(steps[alike[0]]) / log.steps if len(alike) else None


FRONT = Claim(
    name="front",
    title="With writers of standard size the collapse comes from the first steps, as a front",
    source="App. B (128 layers)",
    says="With writers initialised at N(0, 0.02²) instead of zero the same state is entered from "
    "the first steps, as a front that moves through depth.",
    expect="Collapsed within the first quarter of a short run, while the same network with zero "
    "writers learns; a front that crosses a good part of the depth.",
    limits="The writers' spread is 1/√(3·fan-in), which is 0.018 at width 1024 and larger at ours. "
    "Which way the front moves is shown and not judged.",
    afterwards="At the small size the share of the run before the deep tokens are alike is met by "
    "the start itself: 0.0125 is step 1 of 80, into which is looked before any update, and there "
    "all tokens are alike from layer 80 of 128 on in seed 0, from layer 65 in seed 1. So what is "
    "shown is that writers of this size begin in that state and training does not leave it, and "
    "not that the first steps bring it about. After some tens of looks rounding decides where the "
    "front stands. In seed 1 the two records of the small size, made on two processors, go "
    "together for so long and then apart. The version of the earlier one, run on the processor of "
    "the later one, gives every loss of the later one in that seed, bit for bit: no change of the "
    "program moved the figure. A spread over two seeds says less of it than the runs taken again. "
    "At the GPU size the first look is at step 5 of 100, so that the start was not seen: all "
    "tokens are alike there from layer 66, 60 and 58 on, by seed, and in the last look from 15, "
    "14 and 16 on. So the front moves towards the first layers, as at the small size, over little "
    "more than the quarter of the depth that the rule asks for, in one seed over exactly that.",
    cost={
        "small": "4 runs of 1 to 1.5 minutes on a core",
        "gpu": "6 runs of 0.05 minutes, trained as one",
    },
    trials=_front_trials,
    measure=lambda runs: [
        runs.figure(
            f"{STANDARD}: share of the run before the deep tokens are alike",
            "similarity of the deepest quarter 0.95 or more",
            STANDARD,
            _first_alike,
            "first steps",
        ),
        runs.figure(
            f"{STANDARD}: share of the depth that the front crosses",
            "from the first looks to the last",
            STANDARD,
            crossed,
        ),
        *grouped(runs),
    ],
    rule=(
        at_least(
            f"{ZERO}: lives",
            1,
            1,
            "It is the writers only if the network learns without them.",
            needed=True,
        ),
        at_least(f"{STANDARD}: collapsed", 1, 1, "The same state, in every seed."),
        below(
            f"{STANDARD}: share of the run before the deep tokens are alike",
            0.25,
            0.75,
            "From the first steps, not late.",
        ),
        at_least(
            f"{STANDARD}: share of the depth that the front crosses",
            0.25,
            0.05,
            "What moves by less than a twentieth of the depth stands still.",
        ),
    ),
    panels=lambda runs: [
        Panel(
            title="the front: all deeper tokens are alike",
            x="step",
            y="layer",
            lines=curves(runs, front, (STANDARD, ZERO)),
        ),
        loss_panel(runs),
    ],
)


# The time in the token mean


def _time_trials(size: Size) -> list[Trial]:
    rule = by_depth(size, "calm")
    return [trial(size, "calm", "MV-Split", rule, seed, reads_times=True) for seed in size.few]


def _layers(log: RunLog) -> Array:
    return np.asarray((log.record["times"] or {}).get("layers", []), float)


def _of_times(log: RunLog, name: str) -> float | None:
    return (log.record["times"] or {}).get(name)


def _worst(log: RunLog) -> float | None:
    return float(_layers(log).min()) if len(_layers(log)) else None


def _gap(log: RunLog) -> float | None:
    worst, statistics = _worst(log), _of_times(log, "statistics")
    return None if worst is None or statistics is None else worst - statistics


def _time_figure(
    runs: Runs,
    name: str,
    words: str,
    measure: Callable[[RunLog], float | None],
    paper: str = "",
) -> Figure:
    return runs.figure(name, words, "MV-Split", measure, paper)


def _time_figures(runs: Runs) -> list[Figure]:
    figure = partial(_time_figure, runs)
    return [
        figure("worst layer", "the smallest R² over the layers", _worst, "≈0.998"),
        figure(
            "median layer",
            "the median R² over the layers",
            lambda log: float(np.median(_layers(log))) if len(_layers(log)) else None,
            "≈0.998",
        ),
        figure(
            "input statistics",
            "R² from mean, spread and mean square of the noisy picture",
            lambda log: _of_times(log, "statistics"),
            "0.41",
        ),
        figure(
            "shuffled times",
            "the best R² over the layers, when the times to fit are shuffled",
            lambda log: _of_times(log, "shuffled"),
            "<0.03",
        ),
        figure(
            "worst layer less input statistics",
            "of the two above",
            _gap,
            "0.59, from the two above",
        ),
        *grouped(runs),
    ]


def _time_panel(runs: Runs) -> Panel:
    lines = []
    for number, log in enumerate(runs.of("MV-Split")):
        r2 = _layers(log)
        x = list(range(len(r2)))
        lines.append(Line(label="token mean", x=x, y=rounded(r2), faint=number > 0))
        statistics = rounded([_of_times(log, "statistics") or np.nan])
        lines.append(Line(label="input statistics", x=x, y=statistics * len(x), faint=number > 0))
    return Panel(title="reading the time from the states", x="layer", y="R²", lines=lines)


TIMESTEP = Claim(
    name="timestep",
    title="The image-token mean carries the time, at every depth",
    source="App. H",
    says="The network has no timestep input, and a ridge probe reads t from the image-token mean "
    "with R² ≈ 0.998 at every depth; scalar statistics of the input give 0.41, shuffled labels "
    "less than 0.03.",
    expect="Above 0.95 at every depth. A small picture says less about its noise than 256 tokens "
    "of 128 channels, so that the bound on R² is itself lower.",
    limits="A pixel network after hundreds of steps. Which scalar statistics the paper used is not "
    "known to us; ours are mean, spread and mean square.",
    afterwards="At the GPU size no layer has it: over the 100 layers R² is 0.732 to 0.815, 0.75 "
    "to 0.79 in the first, and least in the 39th, 25th and 33rd, by seed. The network lives all "
    "the same, at 0.17 of the floor. Mean, spread and mean square of the noisy picture alone give "
    "0.94 on these pictures, 0.72 on the digits, 0.41 in the paper: here the spread of the input "
    "is nearly the time. Tokens are normed before the first layer, which takes the input's size "
    "out of them; that this is why their mean knows less is likely, and was not tested. A probe "
    "of 128 features from 1024 samples fits some noise, as the shuffled times show, −0.10 to "
    "−0.13 where 32 features give −0.02: without it the worst layer would have some 0.03 more.",
    cost={"small": "2 runs of 3.5 minutes on a core", "gpu": "3 runs of 0.7 minutes"},
    trials=_time_trials,
    measure=_time_figures,
    rule=(
        at_least("MV-Split: lives", 1, 1, "The probe is of a trained network.", needed=True),
        at_least(
            "worst layer", 0.95, 0.8, "Nearly all of the variance, at the worst depth as elsewhere."
        ),
        below("shuffled times", 0.05, 0.2, "Or the probe would find a time where there is none."),
        at_least(
            "worst layer less input statistics",
            0.1,
            0.0,
            "The network has found more than what anybody reads off its input.",
        ),
    ),
    panels=lambda runs: [_time_panel(runs), loss_panel(runs)],
)
