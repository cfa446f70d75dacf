"""What a run has done about alarms so far: a part of its state, saved with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reactions:
    """The standing consequences of the policies (`mvsplit.training.policies`).

    Attributes:
        lr_factor: multiplies the learning rate.
        since: the step after which it rises to that value, over `rewarm` steps.
        rewarm: steps of that rise; 0 for none.
        rollbacks, skips: how often the run went back, and how many updates it left out.
        protected_at: the step after which its network was turned into MV-Split.
    """

    lr_factor: float = 1.0
    since: int = 0
    rewarm: int = 0
    rollbacks: int = 0
    skips: int = 0
    protected_at: int | None = None

    def factor(self, step: int) -> float:
        """What multiplies the learning rate of a step; 1 where there was no alarm."""
        risen = min(1.0, (step - self.since) / self.rewarm) if self.rewarm else 1.0
        return self.lr_factor * risen
