"""Batches made ahead of time by a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mvsplit.data.types import Batch


class Prefetch:
    """Hands out batches, and has a thread make those that will be asked for next.

    A batch is a pure function of its position, so whoever asks for another position, as a run does
    that goes back to a checkpoint, simply waits for it once.

    Args:
        make: gives the batch at a position.
        stride: from one position to the next.
        depth: batches that are ready or in the making.
    """

    def __init__(self, make: Callable[[int], Batch], stride: int, depth: int) -> None:
        self._make, self._stride, self._depth = make, stride, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mvsplit-prefetch")
        self._ahead: dict[int, Future[Batch]] = {}

    def take(self, position: int) -> Batch:
        """The batch at `position`; raises what making it raised."""
        wanted = [position + k * self._stride for k in range(self._depth + 1)]
        for other in self._ahead.keys() - set(wanted):
            self._ahead.pop(other).cancel()
        for place in wanted:
            if place not in self._ahead:
                self._ahead[place] = self._pool.submit(self._make, place)
        return self._ahead.pop(position).result()
