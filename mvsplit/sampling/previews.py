"""Pictures to look at while one waits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.flow import advance, schedule


class Previews:
    """A `preview` of `generate` that shows, every few steps, where the path leads: the data that
    the velocity of the step just done points at, z + t·v, rather than latents that are still noise.

    It works for every sampler, reads nothing back from the device, and costs a few small kernels.

    Args:
        show: told the indices of a batch, the number of steps done and the latents [B, C, H, W].
        every: steps between two previews; the first step of a batch has none.
        steps, shift, start: those of the sampler.

    Raises:
        UserError: `every` is less than one step.
    """

    def __init__(
        self,
        show: Callable[[list[int], int, Tensor], None],
        *,
        every: int,
        steps: int,
        shift: float,
        start: float = 1.0,
    ) -> None:
        if every < 1:
            raise UserError(f"every={every}: must be at least 1 step")
        self._show, self._every = show, every
        self._times = schedule(steps, shift, start).tolist()
        self._before: Tensor | None = None

    def __call__(self, indices: list[int], done: int, z: Tensor) -> None:
        if done > 1 and done % self._every == 0 and self._before is not None:
            t_before, t = self._times[done - 1], self._times[done]
            velocity = (z - self._before) / (t_before - t)
            self._show(indices, done, advance(z, velocity, t, 0.0))
        self._before = z
