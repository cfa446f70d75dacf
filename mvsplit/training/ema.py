"""Averaged weights: an exponential moving average beside the flat parameters."""

from __future__ import annotations

from torch import Tensor

from mvsplit.training.optimizer import FlatGroup


def decay_at(step: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) at step n, so that a short run does not average its start.

    Source: the warm-up of TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + step) / (10 + step))


_AT_ONCE = 2**26  # elements that are lifted to fp32 at a time


class EMA:
    """One averaged copy of every parameter that this rank updates, in fp32, in which small steps
    count; starts as the parameters themselves."""

    def __init__(self, groups: list[FlatGroup], decay: float) -> None:
        self.groups = [group.mine() for group in groups]
        self.decay = decay
        self._averages = [group.values.clone().float() for group in self.groups]

    def update(self, step: int) -> None:
        """a ← d·a + (1 − d)·w with d of step n, after the weights w of step n are known."""
        weight = 1 - decay_at(step, self.decay)
        for average, group in zip(self._averages, self.groups, strict=True):
            pairs = zip(average.split(_AT_ONCE), group.values.split(_AT_ONCE), strict=True)
            for part, values in pairs:
                part.lerp_(values.to(part.dtype), weight)

    def parameters(self) -> dict[str, Tensor]:
        """The averages as views, by parameter name."""
        return {
            name: part
            for average, group in zip(self._averages, self.groups, strict=True)
            for name, part in group.named(average).items()
        }
