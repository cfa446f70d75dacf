"""What is usual in a series: the median and spread of its last values, kept as they come."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

_QUARTILES_TO_SIGMA = 1.349  # quartile distance of a normal distribution, in σ


class Baseline:
    """The last `window` finite values, and at hand their median and spread.

    An outlier moves a median by one place, so a spike that passes leaves no trace, and a new level
    becomes the usual one after half a window.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._newest: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def full(self) -> bool:
        return len(self._sorted) == self._window

    def add(self, value: float) -> None:
        """Takes in a finite value; the oldest leaves once the window is full."""
        if self.full:
            oldest = self._newest.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
        self._newest.append(value)
        insort(self._sorted, value)

    def clear(self) -> None:
        self._newest.clear()
        self._sorted.clear()

    @property
    def median(self) -> float:
        """The (upper) median; there must be a value."""
        return self._sorted[len(self._sorted) // 2]

    @property
    def sigma(self) -> float:
        """The standard deviation of a normal distribution with the same quartiles."""
        n = len(self._sorted)
        return (self._sorted[3 * n // 4] - self._sorted[n // 4]) / _QUARTILES_TO_SIGMA

    def times(self, value: float) -> float:
        """How many times the median `value` is; 1 while there is none or it is not positive."""
        if not self._sorted or self.median <= 0:
            return 1.0
        return value / self.median
