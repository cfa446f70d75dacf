"""Samplers: pure functions of a velocity function and a point of the path, and their registry.

All solve dz/dt = −v(z, t) from `start` down to t = 0 on the shifted schedule (paper §5), in fp32 or
better. N is the number of steps, t and t' the two ends of a step.

| name | order | evaluations of v | source |
|---|---|---|---|
| `euler` | 1 | N | the paper's |
| `heun` | 2 | 2N − 1 | Karras et al. 2022, arXiv 2206.00364, Algorithm 1 |
| `ab2` | 2 | N | Adams and Bashforth's two-step formula for uneven steps |
| `dpmpp-2m` | 2 but for a logarithm | N | DPM-Solver++(2M), Lu et al., arXiv 2211.01095, Alg. 2 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mvsplit.errors import UserError, nearest
from mvsplit.flow import advance, log_snr, schedule

Velocity = Callable[[Tensor, float], Tensor]  # (z [B, ...], t) → v [B, ...]
Callback = Callable[[int, Tensor], None]  # after a step: the number of steps done, the new z
_Step = Callable[[Tensor, float, float], Tensor]  # (z, t, t') → z'


class Sample(Protocol):
    """What a sampler is called like.

    Args:
        velocity: v(z, t), in any dtype.
        noise: z at `start`, [B, ...].
        steps: N.
        shift: a of the schedule; the paper uses 4 for 256-token latents, 1 is uniform.
        start: the time at which z stands; 1 is noise.
        callback: called after each step with the number of steps done and the new z.

    Returns:
        z at t = 0, [B, ...].

    Raises:
        UserError: fewer than one step, a shift that is not positive, a start outside (0, 1].
    """

    def __call__(
        self,
        velocity: Velocity,
        noise: Tensor,
        *,
        steps: int,
        shift: float,
        start: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor: ...


def euler(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    shift: float,
    start: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method: z' = z + (t − t')·v(z, t) (paper §5). See `Sample`."""

    def step(z: Tensor, t: float, t_next: float) -> Tensor:
        return advance(z, velocity(z, t).to(z.dtype), t, t_next)

    return _walk(step, noise, schedule(steps, shift, start), callback)


def heun(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    shift: float,
    start: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method: z' = z + (t − t')·(v + v')/2, v' = v(z + (t − t')·v, t'). See `Sample`.

    The last step is Euler's, as in Karras et al.: at t' = 0 a velocity is not defined by the data
    (v = (x̂₀ − z)/t), and one step of a lower order costs no order of the whole.
    """

    def step(z: Tensor, t: float, t_next: float) -> Tensor:
        v = velocity(z, t).to(z.dtype)
        ahead = advance(z, v, t, t_next)
        if t_next == 0:
            return ahead
        return advance(z, (v + velocity(ahead, t_next).to(z.dtype)) / 2, t, t_next)

    return _walk(step, noise, schedule(steps, shift, start), callback)


def ab2(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    shift: float,
    start: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Adams–Bashforth, two steps: z' = z + (t − t')·(v + r/2·(v − v₋)) with the velocity v₋ of the
    step before, from t₋, and r = (t − t')/(t₋ − t); the first step is Euler's. See `Sample`.

    Source: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, III.5.
    """
    before: tuple[float, Tensor] | None = None

    def step(z: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal before
        v = velocity(z, t).to(z.dtype)
        slope = v
        if before is not None:
            t_before, v_before = before
            slope = v + (t - t_next) / (t_before - t) / 2 * (v - v_before)
        before = (t, v)
        return advance(z, slope, t, t_next)

    return _walk(step, noise, schedule(steps, shift, start), callback)


def dpmpp_2m(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    shift: float,
    start: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) on the straight path, α = 1 − t and σ = t. See `Sample`.

    It extrapolates the predicted data x̂ = z + t·v in λ = log(α/σ): with h = λ' − λ and the step
    before, D = x̂ + h/(2h₋)·(x̂ − x̂₋), and z' = (σ'/σ)·z + α'·(1 − e^(−h))·D. On this path the two
    factors are t'/t and 1 − t'/t, so that z' = z + (t − t')·(D − z)/t: Euler's step where D = x̂.
    So are the first step, the second from noise and the last, where h₋ or h is infinite.
    """
    before: tuple[float, Tensor] | None = None

    def step(z: Tensor, t: float, t_next: float) -> Tensor:
        nonlocal before
        v = velocity(z, t).to(z.dtype)
        data = advance(z, v, t, 0.0)
        slope = v
        if before is not None and t_next > 0:
            t_before, data_before = before
            now = log_snr(t)
            ratio = (log_snr(t_next) - now) / (now - log_snr(t_before)) / 2  # 0 from noise
            slope = v + ratio / t * (data - data_before)
        before = (t, data)
        return advance(z, slope, t, t_next)

    return _walk(step, noise, schedule(steps, shift, start), callback)


def _walk(step: _Step, z: Tensor, times: Tensor, callback: Callback | None) -> Tensor:
    """From the first of `times` to the last, in fp32 or better."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    for done, (t, t_next) in enumerate(pairwise(times.tolist()), start=1):
        z = step(z, t, t_next)
        if callback is not None:
            callback(done, z)
    return z


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A row of the registry.

    Attributes:
        sample: the function.
        order: k of its error O(N⁻ᵏ); for `dpmpp-2m` times log N.
        evaluations: of the velocity in N steps; with guidance each is two of the network.
    """

    sample: Sample
    order: int
    evaluations: Callable[[int], int]


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(sample=euler, order=1, evaluations=lambda steps: steps),
    "heun": Sampler(sample=heun, order=2, evaluations=lambda steps: 2 * steps - 1),
    "ab2": Sampler(sample=ab2, order=2, evaluations=lambda steps: steps),
    "dpmpp-2m": Sampler(sample=dpmpp_2m, order=2, evaluations=lambda steps: steps),
}


def get_sampler(name: str) -> Sampler:
    """The sampler called `name`. Raises UserError for an unknown one."""
    if name not in SAMPLERS:
        raise UserError(f"sampler={name!r} is unknown; {nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
