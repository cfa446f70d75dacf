"""What a claim is: what the paper says, the runs that test it, its figures, its rule, its plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mvsplit.reproduce.rule import Condition, Figure, at_least
from mvsplit.reproduce.runlog import Array, RunLog, Runs
from mvsplit.reproduce.sizes import Size
from mvsplit.reproduce.trial import Trial
from mvsplit.reproduce.understood import Passage
from mvsplit.residuals import RuleConfig

POINTS = 160  # of a line of a plot, at most
Values = Mapping[str, Mapping[str, float | None]]  # of figures, by seed


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel, or its points alone."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    points: bool = False
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes of a claim's plot."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper.

    Attributes:
        name: of the command and the page.
        title: one line.
        source: where the paper says it.
        says: what it says.
        expect: what we expect at our sizes, and why.
        limits: what a verdict does not cover.
        cost: by size, in words.
        trials: the runs, at a size.
        measure: the figures, from the runs.
        rule: the bounds that give the verdict.
        passages: what was understood only from the runs; it changes no verdict.
        remarks: sentences that stand beside the figures of a size, from their values by seed.
        panels: the plots.
    """

    name: str
    title: str
    source: str
    says: str
    expect: str
    limits: str
    cost: dict[str, str]
    trials: Callable[[Size], list[Trial]]
    measure: Callable[[Runs], list[Figure]]
    rule: tuple[Condition, ...]
    passages: tuple[Passage, ...] = ()
    remarks: Callable[[Values], list[str]] = field(default=lambda values: [])
    panels: Callable[[Runs], list[Panel]] = field(default=lambda runs: [])


def trial(
    size: Size,
    regime: str,
    label: str,
    rule: RuleConfig,
    seed: int,
    *,
    reads_times: bool = False,
    low: bool = False,
    **changes: Any,
) -> Trial:
    """A run of a regime; claims that ask for the same one share it. `low`: at the lower rate."""
    there = size.regime(regime)
    if low:
        changes["lr_factor"] = there.low
    return Trial(
        name=f"{regime}-{label.replace(',', '').replace(' ', '-')}-seed{seed}",
        label=label,
        seed=seed,
        experiment=size.experiment(there, rule, seed, **changes),
        jump=there.jump,
        factor=there.factor,
        look_every=there.look_every,
        reads_times=reads_times,
    )


def curves(
    runs: Runs, measure: Callable[[RunLog], tuple[Array, Array]], labels: Sequence[str] = ()
) -> list[Line]:
    """A line for each run of `labels` (all if empty), thinned out; seeds of one network look alike
    and are named once."""
    lines = []
    for label in labels or runs.labels:
        for number, log in enumerate(runs.of(label)):
            x, y = measure(log)
            keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
            lines.append(
                Line(label=label, x=rounded(x[keep]), y=rounded(y[keep]), faint=number > 0)
            )
    return lines


def span(values: Mapping[str, float | None]) -> str:
    """A figure over its seeds, in words: "8.2 to 11"; "unknown" where no seed has it."""
    there = sorted(value for value in values.values() if value is not None)
    ends = [f"{value:.3g}" for value in (*there[:1], *there[-1:])]
    return " to ".join(dict.fromkeys(ends)) or "unknown"


def rounded(values: Any) -> list[Any]:
    """To four digits, None for what is not finite."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in np.asarray(values, float)]


def loss_panel(runs: Runs, labels: Sequence[str] = ()) -> Panel:
    """The training loss over the token floor."""

    def share(log: RunLog) -> tuple[Array, Array]:
        steps, losses = log.column("loss")
        return steps, losses / log.record["floor"]

    return Panel(
        title="training loss / token floor",
        x="step",
        y="above 0.9: no better than with all tokens alike",
        lines=curves(runs, share, labels),
    )


def similarity_panel(runs: Runs, labels: Sequence[str] = ()) -> Panel:
    """Token cosine similarity of the deepest quarter."""
    return Panel(
        title="token similarity, deepest quarter",
        x="step",
        y="mean pairwise cosine",
        lines=curves(runs, lambda log: log.deep("tcs"), labels),
    )


def grouped(runs: Runs, labels: Sequence[str] = ()) -> list[Figure]:
    """For each network: whether it collapsed, whether it lives, and by what."""
    found = []
    for label in labels or runs.labels:
        found += [
            runs.figure(
                f"{label}: collapsed",
                "1: tokens alike and the loss at its floor or above",
                label,
                lambda log: log.collapsed,
            ),
            runs.figure(
                f"{label}: lives", "1: loss below 0.8 of the floor", label, lambda log: log.lives
            ),
            runs.figure(
                f"{label}: end loss",
                "last fifth, over the token floor",
                label,
                lambda log: log.end_loss,
            ),
            runs.figure(
                f"{label}: end similarity",
                "of tokens, deepest quarter, last fifth",
                label,
                lambda log: log.end_similarity,
            ),
        ]
    return found


def healthy(runs: Runs) -> Figure:
    """Whether the plain network was well before its learning rate rose."""
    return runs.figure(
        "plain: healthy before the rise",
        "1: loss below 0.8 of the floor and deep tokens apart",
        "plain",
        lambda log: log.healthy_before,
    )


HEALTHY = at_least(
    "plain: healthy before the rise",
    1,
    1,
    "Only what was well can collapse; a network that has not learned yet looks dead, too.",
    needed=True,
)
PLAIN = RuleConfig(name="plain")
MVSPLIT = RuleConfig(name="mvsplit", beta=1.0)
ATTENTION_ONLY = RuleConfig(name="mvsplit-attention-only", beta=1.0)


def by_depth(size: Size, regime: str) -> RuleConfig:
    """MV-Split with β = 1/√L, as the paper starts it at 1000 layers."""
    return RuleConfig(name="mvsplit", beta=round(size.regime(regime).depth ** -0.5, 4))
