"""Claims about the states of a network: the front of App. B, the time in the token mean, App. H."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mvsplit.reproduce import understood
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
    passages=understood.FRONT,
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
    passages=understood.TIMESTEP,
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
