"""A curve of any length in a bounded number of points that keeps every spike."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from mvsplit.diagnostics.logs import Record, as_number

MOST_POINTS = 2000
_PENDING = 8192  # values gathered before they are merged, so that numpy does the work


@dataclass(frozen=True)
class Series:
    """One field over steps, N points. A point covers `stride` steps; with stride 1 it is a line of
    the log, and `low`, `mean` and `high` are the same."""

    step: np.ndarray  # [N] the first step that the point covers and that the log has
    mean: np.ndarray  # [N] of the finite values, NaN where there is none
    low: np.ndarray  # [N]
    high: np.ndarray  # [N]
    broken: np.ndarray  # [N] how many values were NaN or infinite
    stride: int


class SeriesBuilder:
    """Takes the values of one field in any order, in memory that does not grow with their number.

    Points are buckets of `stride` steps. When there are more than `most`, the stride doubles and
    neighbours merge. A bucket keeps its smallest and largest value, so no spike is averaged away.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._stride = 1
        self._steps, self._values = array("q"), array("d")
        self._buckets = _Buckets.of(np.empty(0, dtype=np.int64), np.empty(0))

    def add(self, step: int, value: float) -> None:
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) >= _PENDING:
            self._merge_pending()

    def build(self) -> Series:
        self._merge_pending()
        b = self._buckets
        finite = np.maximum(b.count, 1)
        mean = np.where(b.count > 0, b.total / finite, np.nan)
        return Series(b.step, mean, b.low, b.high, b.broken, self._stride)

    def _merge_pending(self) -> None:
        new = _Buckets.of(np.array(self._steps, dtype=np.int64), np.array(self._values))
        self._steps, self._values = array("q"), array("d")
        self._buckets = self._buckets.joined(new).merged(self._stride)
        while len(self._buckets.step) > self._most:
            self._stride *= 2
            self._buckets = self._buckets.merged(self._stride)


@dataclass(frozen=True)
class _Buckets:
    """Parallel arrays [N] over buckets, in the order of their steps once merged."""

    step: np.ndarray
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    count: np.ndarray
    broken: np.ndarray

    @classmethod
    def of(cls, step: np.ndarray, value: np.ndarray) -> _Buckets:
        """A bucket for each value."""
        finite = np.isfinite(value)
        known = np.where(finite, value, np.nan)
        total = np.where(finite, value, 0.0)
        return cls(step, known, known, total, finite.astype(np.int64), (~finite).astype(np.int64))

    def joined(self, other: _Buckets) -> _Buckets:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Buckets(*(np.concatenate(pair) for pair in pairs))

    def merged(self, stride: int) -> _Buckets:
        """Buckets of the same `step // stride` become one."""
        if not len(self.step):
            return self
        order = np.argsort(self.step, kind="stable")
        places = (self.step // stride)[order]
        first = np.flatnonzero(np.concatenate(([True], np.diff(places) > 0)))
        reductions = (np.minimum, np.fmin, np.fmax, np.add, np.add, np.add)  # fmin passes over NaN
        columns = zip(reductions, vars(self).values(), strict=True)
        return _Buckets(*(reduce.reduceat(column[order], first) for reduce, column in columns))


class SeriesTable:
    """A `Series` for each numeric field of a log."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._builders: dict[str, SeriesBuilder] = {}
        self.lines = 0

    def add(self, record: Record) -> None:
        self.lines += 1
        for name, value in record.items():
            number = None if name == "step" else as_number(value)
            if number is None:
                continue
            if name not in self._builders:
                self._builders[name] = SeriesBuilder(self._most)
            self._builders[name].add(record["step"], number)

    def build(self) -> dict[str, Series]:
        return {name: builder.build() for name, builder in self._builders.items()}
