"""The alignment law, Fig. 4: amplification of a writer gradient against alignment of tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from mvsplit.reproduce import understood
from mvsplit.reproduce.claim import (
    HEALTHY,
    Claim,
    Line,
    Panel,
    Values,
    grouped,
    healthy,
    rounded,
    span,
)
from mvsplit.reproduce.claims_gradients import (
    COLLAPSED,
    COST,
    ON_DEMAND,
    WRITERS,
    plain_trials,
)
from mvsplit.reproduce.rule import Figure, at_least, below
from mvsplit.reproduce.runlog import ALIKE, SPIKE, Array, RunLog, Runs
from mvsplit.reproduce.sizes import Size
from mvsplit.reproduce.trial import Trial

SLACK = 1.25  # magnitudes are not all equal, as the envelope assumes
MARGIN = 0.1


def _points(log: RunLog) -> tuple[Array, Array, Array]:
    """A − 1, (T − 1)κ̂ and the similarity of the layer's tokens, of both writers, every layer and
    every look. [N], [N], [N]."""
    parts = []
    for end in WRITERS.values():
        steps, amplification = log.looks(f"amplification_{end}")
        _, envelope = log.looks(f"envelope_{end}")
        _, similarity = log.looks("tcs")
        if len(steps):
            parts.append(np.stack([amplification - 1, envelope, similarity]).reshape(3, -1))
    joined = np.concatenate(parts, axis=1) if parts else np.empty((3, 0))
    excess, envelope, similarity = joined[:, np.isfinite(joined).all(0)]
    return excess, envelope, similarity


def _under(log: RunLog) -> float | None:
    excess, envelope, _ = _points(log)
    return float((excess <= SLACK * envelope + MARGIN).mean()) if len(excess) else None


def _tightness(log: RunLog) -> float | None:
    excess, envelope, similarity = _points(log)
    alike = (similarity >= ALIKE) & (envelope > 0)
    return float(np.median(excess[alike] / envelope[alike])) if alike.any() else None


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's, ties in order of appearance; None for fewer than three points."""
    if len(x) < 3:
        return None
    first, second = (
        np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (x, y)
    )
    return float(np.corrcoef(first, second)[0, 1])


def _alignment_panel(runs: Runs) -> Panel:
    log = runs.of("plain")[0]
    excess, envelope, similarity = _points(log)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero((excess > 0) & (envelope > 0)))
    lines = []
    for label, mask in (
        ("tokens apart", similarity < ALIKE),
        ("tokens alike", similarity >= ALIKE),
    ):
        some = [i for i in chosen if mask[i]][:400]
        lines.append(
            Line(label=label, x=rounded(envelope[some]), y=rounded(excess[some]), points=True)
        )
    ends = [0.01, 20.0]
    lines.append(Line(label="A − 1 = (T − 1)κ̂", x=ends, y=ends))
    return Panel(
        title=f"alignment law, seed {log.seed}, a sample of its points",
        x="(T − 1)κ̂",
        y="A − 1",
        lines=lines,
        log_x=True,
        log_y=True,
    )


def _alignment_remarks(values: Values) -> list[str]:
    return [
        f"In the last fifth the loss is {span(values['plain: end loss'])} of the floor: 1 is the "
        "least that a network can have whose tokens are all alike."
    ]


ALIGNMENT = Claim(
    name="alignment",
    title="The amplification of a writer gradient follows the alignment of its tokens",
    source="Fig. 4, Eq. 6, C.2",
    says="A − 1 = (T − 1)κ at equal magnitudes, and (T − 1)κ̂ is its upper envelope; on entry into "
    "the collapse A − 1 comes up to the envelope.",
    expect="Points under the envelope up to what unequal magnitudes allow, close to it where "
    "tokens are alike. Eq. 6 itself is an identity; what is tested is its reading.",
    limits=ON_DEMAND + " Two samples a look.",
    passages=understood.ALIGNMENT,
    cost=COST,
    trials=plain_trials,
    remarks=_alignment_remarks,
    measure=lambda runs: [
        runs.figure(
            "points under the envelope",
            "share of A − 1 ≤ 1.25·(T − 1)κ̂ + 0.1 over writers, layers and looks",
            "plain",
            _under,
            "all",
        ),
        runs.figure(
            "A − 1 over the envelope, tokens alike",
            "median over the points with similarity of 0.95 or more",
            "plain",
            _tightness,
            "≈1",
        ),
        runs.figure(
            "rank correlation",
            "Spearman's, of A − 1 with (T − 1)κ̂ over all points",
            "plain",
            lambda log: rank_correlation(*_points(log)[:2]),
        ),
        healthy(runs),
        *grouped(runs),
    ],
    rule=(
        HEALTHY,
        COLLAPSED,
        at_least(
            "points under the envelope",
            0.95,
            0.8,
            "An envelope has nearly everything under it; a quarter is left for magnitudes.",
        ),
        at_least(
            "A − 1 over the envelope, tokens alike",
            0.5,
            0.1,
            "Close to the envelope is within a factor of two, far from it is a tenth.",
        ),
        at_least(
            "rank correlation", 0.7, 0.3, "What follows a quantity is ordered as it is, mostly."
        ),
    ),
    panels=lambda runs: [_alignment_panel(runs)],
)


# The same at the entry alone, with a rule that came after the verdict above

NEW_SEEDS = 3  # added to the seeds that had been seen


def _entry_trials(size: Size) -> list[Trial]:
    return plain_trials(replace(size, seeds=tuple(seed + NEW_SEEDS for seed in size.seeds)))


def at_the_peak(log: RunLog, writer: str) -> float | None:
    """(A − 1) over (T − 1)κ̂ where and when G_mean of a writer is largest, in the steps after the
    rise of the rate."""
    end = WRITERS[writer]
    steps, mean = log.looks(f"g_mean_{end}")
    excess, envelope = (log.looks(f"{field}_{end}")[1] for field in ("amplification", "envelope"))
    jump = log.record["jump"]
    after = np.flatnonzero((steps > jump) & (steps <= jump + SPIKE))
    if not len(after):
        return None
    look, layer = np.unravel_index(np.nanargmax(mean[after]), mean[after].shape)
    place = (after[look], layer)
    return float((excess[place] - 1) / envelope[place]) if envelope[place] > 0 else None


def _before(log: RunLog, writer: str) -> float | None:
    """The median of the same over the layers and looks before the rise, in size."""
    end = WRITERS[writer]
    steps, amplification = log.looks(f"amplification_{end}")
    _, envelope = log.looks(f"envelope_{end}")
    before = steps <= log.record["jump"] if len(steps) else steps
    if not np.any(before):
        return None
    return float(np.nanmedian(np.abs(amplification[before] - 1) / envelope[before]))


def _entry_figures(runs: Runs) -> list[Figure]:
    found = []
    for writer in WRITERS:
        found.append(
            runs.figure(
                f"{writer}: A − 1 over the envelope at the peak",
                "at the look and layer where G_mean is largest",
                "plain",
                partial(at_the_peak, writer=writer),
                "≈1",
            )
        )
        found.append(
            runs.figure(
                f"{writer}: |A − 1| over the envelope before",
                "median over the layers and looks before the rise of the rate",
                "plain",
                partial(_before, writer=writer),
            )
        )
    return [*found, healthy(runs), *grouped(runs)]


ENTRY = Claim(
    name="alignment-entry",
    title="At the spike the amplification of a writer gradient comes up to its envelope",
    source="Fig. 4, Eq. 6, C.2",
    says="On entry into the collapse A − 1 comes up to its upper envelope (T − 1)κ̂, from far below "
    "it.",
    expect="Within a factor of two of the envelope where the mean gradient is largest, and below a "
    "quarter of it before. This rule was written after the runs of `alignment` had been seen, and "
    "is tested on other seeds.",
    limits=ON_DEMAND + " Two samples a look; one look and one layer a run.",
    passages=understood.ENTRY,
    cost={
        "small": "3 runs of 4 to 5 minutes on a core",
        "gpu": "3 runs of 3.6 to 3.7 minutes, six at a time",
    },
    trials=_entry_trials,
    measure=_entry_figures,
    rule=(
        HEALTHY,
        COLLAPSED,
        *(
            condition
            for writer in WRITERS
            for condition in (
                at_least(
                    f"{writer}: A − 1 over the envelope at the peak",
                    0.5,
                    0.25,
                    "Up to it is within a factor of two; a quarter is what calm layers have.",
                ),
                below(
                    f"{writer}: |A − 1| over the envelope before",
                    0.25,
                    0.5,
                    "It has to come up from somewhere.",
                ),
            )
        ),
    ),
    panels=lambda runs: [_alignment_panel(runs)],
)
