"""Diffusion-DPO for a rectified flow: learning from pairs of which one was preferred.

Of a pair of samples under one caption, w is preferred to l. With the flow-matching loss of a
sample, ℓ = ‖v − v̂(z_t)‖² (Eq. 2), under the network that learns, ℓ_θ, and under the frozen one that
it started from, ℓ_ref, the implicit reward of a sample is r = −(β/2)·(ℓ_θ − ℓ_ref), and

    L = −E log σ(r_w − r_l)
      = −E log σ(−(β/2)·[(ℓ_θ(w) − ℓ_ref(w)) − (ℓ_θ(l) − ℓ_ref(l))]).

Source: Diffusion-DPO (Wallace et al., arXiv 2311.12908, Eq. 14) has the same with the error of the
noise, −βT·ω(λ_t) instead of −β/2, and the loss of its code uses β/2 and the mean over elements. On
this path ε̂ − ε = (1 − t)·(v − v̂), so that a constant weight there is β(1 − t)² here; Flow-DPO (Liu
et al., arXiv 2501.13918, §4) found β constant in t to be better for rectified flows. So it is here.
The mean over elements, as everywhere in this project, makes β smaller by their number than a sum.

At first θ = ref: every reward is 0 and L = log 2.

Shapes: B pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mvsplit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """How it is learned from pairs (docs/alignment.md).

    Attributes:
        beta: β, what a change of the loss is worth as a reward: the larger, the closer the network
            stays to the one that it started from.
        anchor: weight of the flow-matching loss of the preferred samples beside it.
        real: weight of the flow-matching loss of as many samples of the data set beside it.
    """

    beta: float = 1000.0
    anchor: float = 0.0
    real: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"train.dpo.beta={self.beta}: must be greater than 0, for example 1000")
        for name in ("anchor", "real"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"train.dpo.{name}={getattr(self, name)}: must not be negative; 0 is none"
                )


def implicit_rewards(losses: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r = −(β/2)·(ℓ_θ − ℓ_ref) of each sample; any shape."""
    return -beta / 2 * (losses - reference)


def preference_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_w − r_l) of each pair (Diffusion-DPO, Eq. 14), from the rewards [B] of both."""
    return functional.softplus(rejected - chosen)
