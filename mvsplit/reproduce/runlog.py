"""What a finished trial came to, read from its metrics.jsonl, layers.jsonl and trial.json.

L layers, P looks into them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvsplit.errors import UserError
from mvsplit.reproduce.rule import Figure
from mvsplit.reproduce.trial import RECORD, Trial
from mvsplit.training.files import read_lines

Array = NDArray[np.float64]

TAIL = 0.2  # of the steps: the end of a run
ALIKE = 0.95  # token cosine similarity from which tokens count as all alike
APART = 0.9  # token cosine similarity below which they count as different
DEAD_LOSS = 0.9  # of the token floor
LIVING_LOSS = 0.8  # of the token floor
SPIKE = 40  # steps after the rise of the rate in which its peak is looked for
BEFORE = 40  # steps before it that are its baseline


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One run. `record` is its trial.json; `metrics` and `layers` are the lines of its logs."""

    label: str
    seed: int
    steps: int
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    layers: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def non_finite(self) -> bool:
        """Whether the run ended because its loss or gradient was not finite."""
        return self.record["ended"] != "finished"

    def column(self, name: str) -> tuple[Array, Array]:
        """Steps and values of a field of metrics.jsonl."""
        pairs = [(m["step"], m[name]) for m in self.metrics if m.get(name) is not None]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.asarray(steps, float), np.asarray(values, float)

    def looks(self, name: str) -> tuple[Array, Array]:
        """Steps [P] and values [P, L] of a field of layers.jsonl; NaN where it was not measured."""
        found = [line for line in self.layers if name in line]
        values = [[math.nan if v is None else v for v in line[name]] for line in found]
        return np.asarray([line["step"] for line in found], float), np.asarray(values, float)

    def deep(self, name: str) -> tuple[Array, Array]:
        """The same as a mean over the deepest quarter of the layers, [P]."""
        steps, values = self.looks(name)
        if not len(steps):
            return steps, steps
        return steps, values[:, values.shape[1] - -(-values.shape[1] // 4) :].mean(1)

    @property
    def end_loss(self) -> float:
        """Mean over the last fifth of the steps that the run should have taken, over the token
        floor; infinite where it did not get there."""
        steps, losses = self.column("loss")
        tail = losses[steps > (1 - TAIL) * self.steps]
        if self.non_finite or not len(tail):
            return math.inf
        return float(tail.mean()) / self.record["floor"]

    @property
    def end_similarity(self) -> float | None:
        """Token cosine similarity of the deepest quarter over the looks of the last fifth, or in
        the last look if there is none so late."""
        steps, values = self.deep("tcs")
        if not len(steps):
            return None
        late = steps > (1 - TAIL) * self.steps
        return float(values[late].mean() if late.any() else values[-1])

    @property
    def collapsed(self) -> float:
        """1 where the run ended in the paper's state: finite, the deep tokens all alike, and the
        loss that of a network which cannot tell tokens apart; else 0."""
        similarity = self.end_similarity
        alike = similarity is not None and similarity >= ALIKE
        return float(alike and not self.non_finite and self.end_loss >= DEAD_LOSS)

    @property
    def lives(self) -> float:
        """1 where it learns: finite, and the loss well below what a network can do that cannot
        tell tokens apart; else 0."""
        return float(self.end_loss < LIVING_LOSS)

    @property
    def healthy_before(self) -> float:
        """1 where, before the rate rises, the loss is below LIVING_LOSS of the floor and the tokens
        of the deepest quarter differ; else 0."""
        loss = self.loss_at(self.record["jump"] / self.steps)
        steps, similarity = self.deep("tcs")
        before = similarity[steps <= self.record["jump"]]
        apart = len(before) > 0 and before[-1] < APART
        return float(loss is not None and loss < LIVING_LOSS and apart)

    @property
    def settled(self) -> float | None:
        """The step of the look from which on, to the last, the tokens of the deepest quarter are
        alike; None where they are not in the last."""
        steps, _ = self.deep("tcs")
        apart = self._apart
        if not len(steps) or apart[-1]:
            return None
        return float(steps[np.flatnonzero(apart)[-1] + 1] if apart.any() else steps[0])

    @property
    def settled_within(self) -> float | None:
        """How finely `settled` is known: the steps from the look before it to it."""
        steps, _ = self.deep("tcs")
        before = steps[steps < self.settled] if self.settled is not None else steps[:0]
        return None if self.settled is None else self.settled - float(before[-1:].sum())

    @property
    def entry_gap(self) -> float | None:
        """The most steps from one look to the next, from the rise of the rate until tokens are
        alike for good, or until the peak is no longer looked for; None without a look there."""
        steps, _ = self.looks("tcs")
        jump, last = self.record["jump"], self.record["jump"] + SPIKE
        end = last if self.settled is None else min(self.settled, last)
        there = steps[(steps > jump) & (steps < end)]
        if not (steps[(steps > jump) & (steps <= end)]).size:
            return None
        return float(np.diff([jump, *there, end]).max())

    @property
    def _apart(self) -> NDArray[np.bool_]:
        return ~(self.deep("tcs")[1] >= ALIKE)  # NaN counts as apart

    def loss_at(self, share: float) -> float | None:
        """The mean loss of the tenth of the steps that ends at `share` of them, over the floor."""
        steps, losses = self.column("loss")
        near = (steps > (share - 0.1) * self.steps) & (steps <= share * self.steps)
        return float(losses[near].mean()) / self.record["floor"] if near.any() else None

    def peak(self, name: str) -> float | None:
        """The largest value, over the layers together (L2), in the steps after the rise."""
        steps, values = self._total(name)
        after = (steps > self.record["jump"]) & (steps <= self.record["jump"] + SPIKE)
        return float(values[after].max()) if after.any() else None

    def baseline(self, name: str) -> float | None:
        """The median of the same in the steps before the rise."""
        steps, values = self._total(name)
        before = (steps > self.record["jump"] - BEFORE) & (steps <= self.record["jump"])
        return float(np.median(values[before])) if before.any() else None

    def rise(self, name: str) -> float | None:
        """How many times the peak is the baseline."""
        peak, baseline = self.peak(name), self.baseline(name)
        return peak / baseline if peak is not None and baseline else None

    def fall(self, name: str, jump: int) -> float | None:
        """How many times smaller a field of metrics.jsonl is at the end than before step `jump`:
        the median of the steps before over the median of the last fifth."""
        steps, values = self.column(name)
        before = values[(steps > jump - BEFORE) & (steps <= jump)]
        after = values[steps > (1 - TAIL) * self.steps]
        if self.non_finite or not len(before) or not len(after):
            return None
        end = max(float(np.median(after)), float(np.finfo(np.float32).tiny))
        return float(np.median(before)) / end

    def _total(self, name: str) -> tuple[Array, Array]:
        steps, values = self.looks(name)
        return steps, np.sqrt(np.square(values).sum(1)) if len(steps) else steps


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of one claim."""

    logs: Sequence[RunLog]

    def of(self, label: str) -> list[RunLog]:
        """The runs of one of its networks, by seed."""
        return sorted((log for log in self.logs if log.label == label), key=lambda log: log.seed)

    @property
    def labels(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(log.label for log in self.logs))

    def figure(
        self,
        name: str,
        words: str,
        label: str,
        measure: Callable[[RunLog], float | None],
        paper: str = "",
    ) -> Figure:
        """`measure` of each seed of a network."""
        values = {log.seed: measure(log) for log in self.of(label)}
        return Figure(name=name, words=words, values=values, paper=paper)


def read_run(trial: Trial, folder: Path) -> RunLog:
    """Reads a finished trial. Raises UserError where it is not finished."""
    path = folder / trial.name
    if not trial.finished(folder):
        raise UserError(f"{path} is not finished; give the same command again to go on with it")
    by_step = {line["step"]: line for line in read_lines(path / "metrics.jsonl")}
    looks = {line["step"]: line for line in read_lines(path / "layers.jsonl")}
    return RunLog(
        label=trial.label,
        seed=trial.seed,
        steps=trial.experiment.train.steps,
        record=json.loads((path / RECORD).read_text(encoding="utf-8")),
        metrics=[by_step[step] for step in sorted(by_step)],
        layers=[looks[step] for step in sorted(looks)],
    )
