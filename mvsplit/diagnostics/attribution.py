"""From the same step run again under other conditions to what caused its gradient spike.

Pure functions of numbers. The size of a spike is measured on a logarithmic scale: of a gradient
norm g that stands at r in calm, a trial that brings it to g' removes the share

    s = 1 − log(g'/r) / log(g/r),   cut to [0, 1]

so that 1 is all of it and 0 nothing. Of a norm that is not finite, any finite one removes all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Verdict = Literal[
    "not-reproduced", "no-spike", "data-outlier", "precision", "mean-mode", "unexplained"
]

SPIKE = 2.0  # a gradient norm this many times the calm one is a spike
REMOVED = 0.75  # share of a spike from which on a trial is said to remove it

CENTERED = {  # trials of `CenteredAdjoints`, the smallest first
    "centered-attn": "attention",
    "centered-ffn": "the FFN",
    "centered-both": "attention and the FFN",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The step once more.

    Attributes:
        name: "as-it-was", "without-samples", "fp32" or a key of `CENTERED`.
        label: what was changed, for a reader.
        loss, grad_norm: before clipping.
        writer_attn, writer_ffn: gradient norms of W_O and W_2 over all layers.
    """

    name: str
    label: str
    loss: float
    grad_norm: float
    writer_attn: float
    writer_ffn: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample of the batch: its row, its place in the data set, and its own loss."""

    row: int
    index: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class ModeSplit:
    """Where the mean-coherent writer gradient is largest: G_mean and G_ctr (Eq. 5) there."""

    writer: str  # "W_O" or "W_2"
    layer: int
    g_mean: float
    g_ctr: float


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What made the spike vanish: the verdict and its sentences."""

    verdict: Verdict
    removed_by: tuple[str, ...]  # names of trials
    sentences: tuple[str, ...]


def calm_norm(earlier: Sequence[float]) -> float | None:
    """r, the median of the finite gradient norms of earlier steps; None if there is none."""
    finite = [norm for norm in earlier if math.isfinite(norm)]
    return median(finite) if finite else None


def removed_share(observed: float, trial: float, calm: float | None) -> float | None:
    """s of this file's docstring; None where there is no spike to remove."""
    if not math.isfinite(trial):
        return 0.0
    if not math.isfinite(observed):
        return 1.0
    if not is_spike(observed, calm) or calm is None:
        return None
    left = math.log(max(trial, calm) / calm) / math.log(observed / calm)
    return min(max(1 - left, 0.0), 1.0)


def is_spike(observed: float, calm: float | None) -> bool:
    """Whether there is something to explain."""
    if not math.isfinite(observed):
        return True
    return calm is not None and calm > 0 and observed >= SPIKE * calm


def conclude(
    trials: Sequence[Trial],
    *,
    calm: float | None,
    reproduced: bool,
    dropped: Sequence[Sample],
    split: ModeSplit | None,
) -> Conclusion:
    """Names what removes the spike; where several do, the narrowest: samples before precision,
    precision before a branch, one branch before both.

    Args:
        trials: "as-it-was" first.
        calm: what the gradient norm was before.
        reproduced: whether the step as it was gave the numbers that were recorded.
        dropped: the samples that "without-samples" left out.
        split: None where nothing finite was measured.
    """
    observed = trials[0].grad_norm
    shares = {t.name: removed_share(observed, t.grad_norm, calm) for t in trials[1:]}
    removed_by = tuple(name for name, share in shares.items() if share and share >= REMOVED)
    verdict = _verdict(observed, calm, reproduced, removed_by)
    by_name = {t.name: t for t in trials}
    first = _first_sentence(verdict, by_name, removed_by, calm, dropped)
    second = _second_sentence(verdict, by_name, removed_by, split)
    return Conclusion(verdict=verdict, removed_by=removed_by, sentences=(first, *second))


def _verdict(
    observed: float, calm: float | None, reproduced: bool, removed_by: Sequence[str]
) -> Verdict:
    if not reproduced:
        return "not-reproduced"
    if not is_spike(observed, calm):
        return "no-spike"
    if "without-samples" in removed_by:
        return "data-outlier"
    if "fp32" in removed_by:
        return "precision"
    return "mean-mode" if removed_by else "unexplained"


def _first_sentence(
    verdict: Verdict,
    trials: dict[str, Trial],
    removed_by: Sequence[str],
    calm: float | None,
    dropped: Sequence[Sample],
) -> str:
    observed = trials["as-it-was"].grad_norm
    spike = f"the gradient norm {observed:.3g}"
    if calm is not None:
        spike += f" ({observed / calm:.3g} times the {calm:.3g} of the steps before)"
    if verdict == "not-reproduced":
        return "The step was not reproduced, so what was tried on it explains nothing."
    if verdict == "no-spike":
        known = "there is no earlier step to compare with" if calm is None else "it is no spike"
        return f"Nothing to explain in {spike}: {known}."
    if verdict == "unexplained":
        return f"Nothing that was tried removes {spike}: it is spread over the whole step."
    how, trial = {
        "data-outlier": (f"Without {_samples(dropped)}", "without-samples"),
        "precision": ("In fp32", "fp32"),
        "mean-mode": (_branches(removed_by), removed_by[0]),
    }[verdict]
    return f"{how}, {spike} falls to {trials[trial].grad_norm:.3g}."


def _second_sentence(
    verdict: Verdict, trials: dict[str, Trial], removed_by: Sequence[str], split: ModeSplit | None
) -> tuple[str, ...]:
    if verdict == "data-outlier" and len(removed_by) > 1:
        others = " and ".join(_short(name) for name in removed_by if name != "without-samples")
        return (f"{others} would hide it too, but the cause is in the data.",)
    if verdict not in ("mean-mode", "unexplained") or split is None:
        return ()
    side = "mean" if split.g_mean > split.g_ctr else "centered"
    return (
        f"{split.writer} of layer {split.layer} carries the largest mean-coherent gradient, "
        f"G_mean {split.g_mean:.3g} against G_ctr {split.g_ctr:.3g}: its {side} part dominates.",
    )


def _samples(dropped: Sequence[Sample]) -> str:
    rows = [f"sample {s.index} (row {s.row} of the batch, loss {s.loss:.3g})" for s in dropped]
    return " and ".join(rows)


def _branches(removed_by: Sequence[str]) -> str:
    return f"With MV-Split on {CENTERED[removed_by[0]]} (the mean adjoint shut off)"


def _short(name: str) -> str:
    return "fp32" if name == "fp32" else f"MV-Split on {CENTERED[name]}"
