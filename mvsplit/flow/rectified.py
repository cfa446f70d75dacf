"""Rectified flow: the straight path between data and noise, and the loss that learns it.

The time convention of the project is written here and nowhere else: t = 0 is data, t = 1 is noise,
and the velocity points from noise to data, so that a sampler walks from t = 1 down to t = 0.

Shapes: x0 data and x1 noise [B, ...], t [B].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvsplit.errors import UserError


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 − t)·x0 + t·x1, a point of the path (paper §4). x0, x1 [B, ...], t [B] or scalar."""
    t = t.reshape(t.shape + (1,) * (x0.ndim - 1)) if t.ndim else t
    return (1 - t) * x0 + t * x1


def velocity_target(x0: Tensor, x1: Tensor) -> Tensor:
    """v = x0 − x1 = −dz/dt, the same at every time of the path (paper §4)."""
    return x0 - x1


def flow_losses(velocity: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """‖v̂ − (x0 − x1)‖² of each sample, averaged over its elements (Eq. 2), in fp32 or better.
    [B, ...] → [B]."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    error = velocity.to(dtype) - velocity_target(x0.to(dtype), x1.to(dtype))
    return error.square().flatten(1).mean(1)


def flow_loss(velocity: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """E‖v̂ − (x0 − x1)‖², averaged over every element (Eq. 2), in fp32 or better. → scalar."""
    return flow_losses(velocity, x0, x1).mean()


def advance(z: Tensor, velocity: Tensor, t: Tensor | float, t_next: Tensor | float) -> Tensor:
    """z at `t_next` from z at `t` along a constant velocity: z + (t − t')·v (paper §5).

    With t' = 0 it is the data that the velocity points at, with t' = 1 the noise it comes from.
    """
    return z + (t - t_next) * velocity


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = t·a / (1 + (a − 1)·t): a > 1 moves times towards noise, 0 and 1 stay (paper §5).

    Raises:
        UserError: `shift` is not a positive number.
    """
    if not 0 < shift < math.inf:
        raise UserError(f"shift={shift}: must be greater than 0; 1 leaves time as it is")
    return t * shift / (1 + (shift - 1) * t)


def sample_times(
    batch: int,
    *,
    shift: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times in [0, 1): uniform, then shifted. [B] in fp32.

    They are drawn where the generator lives and then moved to `device`, so that a CPU generator
    gives the same times on every device.
    """
    source = "cpu" if generator is None else generator.device
    uniform = torch.rand(batch, generator=generator, device=source)
    return shift_time(uniform, shift).to(source if device is None else device)


def log_snr(t: float) -> float:
    """λ = log(α/σ) = log((1 − t)/t) of the path, half the logarithm of its signal-to-noise ratio:
    −∞ at noise, ∞ at data."""
    if t <= 0:
        return math.inf
    return -math.inf if t >= 1 else math.log((1 - t) / t)


def schedule(steps: int, shift: float = 1.0, start: float = 1.0) -> Tensor:
    """Sampling times from `start` down to exactly 0. [N + 1], fp64.

    From noise they are i/N for i = N…0, shifted (paper §5). From a later point of the path they are
    just as many, i/N times the time that the shift sends to `start`, shifted.

    Raises:
        UserError: fewer than one step, a `shift` that is not positive, a start outside (0, 1].
    """
    if steps < 1:
        raise UserError(f"steps={steps}: must be at least 1")
    if not 0 < start <= 1:
        raise UserError(f"start={start}: must be greater than 0 and at most 1; 1 is noise")
    uniform = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    if start == 1:
        return shift_time(uniform, shift)
    times = shift_time(uniform * (start / (shift - (shift - 1) * start)), shift)
    times[0] = start
    return times
