"""Samplers: pure functions of a velocity function and noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from mvsplit.flow import advance, schedule

Velocity = Callable[[Tensor, float], Tensor]  # (z [B, ...], t) → v [B, ...]


def euler(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    shift: float,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Data from noise by Euler's method on the shifted schedule (paper §5), in fp32 or better.

    Args:
        velocity: v(z, t), in any dtype; called once a step.
        noise: z at t = 1, [B, ...].
        steps: calls of `velocity`.
        shift: a of the schedule; the paper uses 4 for 256-token latents, 1 is uniform.
        callback: called after each step with the number of steps done and the new z.

    Returns:
        z at t = 0, [B, ...].

    Raises:
        UserError: fewer than one step, or a shift that is not positive.
    """
    z = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for done, (t, t_next) in enumerate(pairwise(schedule(steps, shift).tolist()), start=1):
        z = advance(z, velocity(z, t).to(z.dtype), t, t_next)
        if callback is not None:
            callback(done, z)
    return z
