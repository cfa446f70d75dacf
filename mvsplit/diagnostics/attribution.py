"""From the same step run again under other conditions to what caused its gradient spike.

Pure functions of numbers. The size of a spike is measured on a logarithmic scale: of a gradient
norm g that stands at r in calm, a trial that brings it to g' removes the share

    s = 1 − log(g'/r) / log(g/r),   cut to [0, 1]

so that 1 is all of it and 0 nothing. Of a norm that is not finite, any finite one removes all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Verdict = Literal[
    "not-reproduced", "no-spike", "data-outlier", "precision", "mean-mode", "unexplained"
]

SPIKE = 2.0  # a gradient norm this many times the calm one is a spike
REMOVED = 0.75  # share of a spike from which on a trial is said to remove it
HISTORY = 32  # steps before one, of which what is usual is the median
UNUSUAL = 5.0  # times the batch's median, a sample's loss or input stands out

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
    """A sample of the batch.

    Attributes:
        row, index: its place in the batch and in the data set.
        loss: its own.
        unusual: its loss or the RMS of its data over the median of the batch, the larger of both.
        beside: whether it is one of those that come beside the batch; its places are there.
    """

    row: int
    index: int
    loss: float
    unusual: float
    beside: bool = False

    @property
    def name(self) -> str:
        """Which it is."""
        return f"{self.index} of what comes beside" if self.beside else f"{self.index}"


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


def most_unusual(norms: Sequence[float]) -> int:
    """The place of the gradient norm that is the largest multiple of the median of up to `HISTORY`
    before it; the first that is not finite, where one is.

    Args:
        norms: of successive steps, at least one.
    """

    def unusual(i: int) -> float:
        if not math.isfinite(norms[i]):
            return math.inf
        calm = calm_norm(norms[max(0, i - HISTORY) : i])
        return norms[i] / calm if calm else 0.0

    return max(range(len(norms)), key=unusual)


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

    A collapse that begins is often carried by a single sample of a small batch, and to drop it
    removes the spike too. So samples that are not unusual are to blame only where nothing else
    removes it.

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
    if not any(sample.unusual >= UNUSUAL for sample in dropped):
        removed_by = tuple(sorted(removed_by, key="without-samples".__eq__))  # the samples last
    verdict = _verdict(observed, calm, reproduced, removed_by)
    by_name = {t.name: t for t in trials}
    first = _first_sentence(verdict, by_name, removed_by, shares, calm, dropped)
    further = _further_sentences(verdict, removed_by, dropped, split)
    return Conclusion(verdict=verdict, removed_by=removed_by, sentences=(first, *further))


def _verdict(
    observed: float, calm: float | None, reproduced: bool, removed_by: Sequence[str]
) -> Verdict:
    if not reproduced:
        return "not-reproduced"
    if not is_spike(observed, calm):
        return "no-spike"
    if not removed_by:
        return "unexplained"
    return _CAUSES.get(removed_by[0], "mean-mode")


_CAUSES: dict[str, Verdict] = {"without-samples": "data-outlier", "fp32": "precision"}


def _first_sentence(
    verdict: Verdict,
    trials: dict[str, Trial],
    removed_by: Sequence[str],
    shares: dict[str, float | None],
    calm: float | None,
    dropped: Sequence[Sample],
) -> str:
    observed = trials["as-it-was"].grad_norm
    spike = f"the gradient norm {observed:.3g}"
    if calm:
        spike += f" ({observed / calm:.3g} times the {calm:.3g} of the steps before)"
    if verdict == "not-reproduced":
        return "The step was not reproduced, so what was tried on it explains nothing."
    if verdict == "no-spike":
        known = "there is no earlier step to compare with" if calm is None else "it is no spike"
        return f"Nothing to explain in {spike}: {known}."
    if verdict == "unexplained" and not math.isfinite(observed):
        return "Nothing that was tried makes the gradient norm finite."
    best = removed_by[0] if removed_by else max(shares, key=lambda name: shares[name] or 0.0)
    falls = f"{_how(best, dropped)}, {spike} falls to {trials[best].grad_norm:.3g}"
    if verdict != "unexplained":
        return f"{falls}."
    share = f"{shares[best] or 0.0:.0%}"  # as the table has it
    if share == "0%":
        return f"Nothing that was tried removes any of {spike}."
    return (
        f"Nothing that was tried removes the spike. {falls} at best: {share} of it on a "
        f"logarithmic scale, where {REMOVED:.0%} would name a cause."
    )


def _further_sentences(
    verdict: Verdict, removed_by: Sequence[str], dropped: Sequence[Sample], split: ModeSplit | None
) -> Iterator[str]:
    if verdict in ("data-outlier", "precision", "mean-mode") and len(removed_by) > 1:
        others = [_short(name, dropped) for name in removed_by[1:]]
        yield f"So it does {', '.join(others)}."
    measured = split is not None and max(split.g_mean, split.g_ctr) > 0
    if verdict in ("mean-mode", "unexplained") and split is not None and measured:
        side = "mean" if split.g_mean > split.g_ctr else "centered"
        yield (
            f"{split.writer} of layer {split.layer} carries the largest mean-coherent gradient, "
            f"G_mean {split.g_mean:.3g} against G_ctr {split.g_ctr:.3g}: its {side} part dominates."
        )


def _samples(dropped: Sequence[Sample]) -> str:
    rows = [
        f"sample {s.name} (row {s.row} of the batch, loss {s.loss:.3g}, {s.unusual:.3g} times as "
        f"large as usual)"
        for s in dropped
    ]
    return " and ".join(rows)


def _how(trial: str, dropped: Sequence[Sample]) -> str:
    if trial == "without-samples":
        return f"Without {_samples(dropped)}"
    if trial == "fp32":
        return "In fp32"
    return f"With MV-Split on {CENTERED[trial]} (the mean adjoint shut off)"


def _short(name: str, dropped: Sequence[Sample]) -> str:
    if name == "without-samples":
        samples = " and ".join(sample.name for sample in dropped)
        return f"without sample {samples} alone, though it is not unusual"
    return "in fp32" if name == "fp32" else f"with MV-Split on {CENTERED[name]}"
