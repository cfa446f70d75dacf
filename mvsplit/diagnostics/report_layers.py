"""The probes of a run as matrices, depth × probe, with a bounded number of probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvsplit.diagnostics.logs import Record, as_number

MOST_PROBES = 1000
_MOST_LAYERS = 100_000  # more is a corrupt index, not a depth


@dataclass(frozen=True)
class LayerMap:
    """One field over depth and step. NaN: not measured there; +inf: measured and not finite."""

    steps: np.ndarray  # [N] int64, increasing
    values: np.ndarray  # [L, N] float32


class LayerMapsBuilder:
    """Takes probe lines in any order; of one step the later line wins.

    When there are more than `most` probes, the spacing at which they are kept doubles, and the
    latest line of each stretch stands for it.
    """

    def __init__(self, most: int = MOST_PROBES) -> None:
        self._most = most
        self._stride = 1
        self._probes: dict[int, tuple[int, dict[str, _Column]]] = {}  # stretch → step, columns
        self.lines = 0
        self.unfit = 0  # columns that do not fit the layers of their line

    @property
    def thinned(self) -> bool:
        return self._stride > 1

    def add(self, record: Record) -> None:
        self.lines += 1
        columns = self._columns(record)
        step = record["step"]
        self._probes[step // self._stride] = step, columns
        while len(self._probes) > self._most:
            self._stride *= 2
            probes = sorted(self._probes.values(), key=lambda probe: probe[0])
            self._probes = {step // self._stride: (step, kept) for step, kept in probes}

    def build(self) -> dict[str, LayerMap]:
        probes = sorted(self._probes.values(), key=lambda probe: probe[0])
        names = dict.fromkeys(name for _, columns in probes for name in columns)
        maps = {name: _layer_map(name, probes) for name in names}
        return {name: m for name, m in maps.items() if not np.isnan(m.values).all()}

    def _columns(self, record: Record) -> dict[str, _Column]:
        layers = _layer_indices(record.get("layer"))
        columns = {}
        for name, values in record.items():
            if name in ("step", "layer") or not isinstance(values, list) or not values:
                continue
            column = _Column.of(values, layers)
            if column is None:
                self.unfit += 1
            else:
                columns[name] = column
        return columns


@dataclass(frozen=True)
class _Column:
    """What one probe says of one field."""

    layers: np.ndarray  # [n] int32
    values: np.ndarray  # [n] float32

    @classmethod
    def of(cls, values: Sequence[Any], layers: np.ndarray | None) -> _Column | None:
        if layers is None:
            layers = np.arange(min(len(values), _MOST_LAYERS), dtype=np.int32)
        if len(layers) != len(values):
            return None
        return cls(layers, _cells(values))


def _cells(values: Sequence[Any]) -> np.ndarray:
    """float32 [n]: NaN for what is no number, +inf for a number that float32 cannot hold."""
    if set(map(type, values)) == {float}:
        numbers, measured = np.array(values), np.ones(len(values), dtype=bool)
    else:
        known = [as_number(value) for value in values]
        numbers = np.array([np.nan if number is None else number for number in known])
        measured = np.array([number is not None for number in known])
    held = np.abs(numbers) <= np.finfo(np.float32).max  # False for NaN
    cells = np.where(held, numbers, np.inf).astype(np.float32)
    return np.where(measured, cells, np.float32(np.nan))


def _layer_indices(layers: Any) -> np.ndarray | None:
    """The `layer` array of a line; None where it is absent: 0, 1, … then. An array that holds
    anything but layer numbers fits no column."""
    if layers is None:
        return None
    numbers = layers if isinstance(layers, list) else []
    if all(type(n) is int and 0 <= n < _MOST_LAYERS for n in numbers):
        return np.array(numbers, dtype=np.int32)
    return np.empty(0, dtype=np.int32)


def _layer_map(name: str, probes: list[tuple[int, dict[str, _Column]]]) -> LayerMap:
    having = [(step, columns[name]) for step, columns in probes if name in columns]
    depth = 1 + max(int(column.layers.max(initial=0)) for _, column in having)
    values = np.full((depth, len(having)), np.nan, dtype=np.float32)
    for i, (_, column) in enumerate(having):
        values[column.layers, i] = column.values
    return LayerMap(np.array([step for step, _ in having], dtype=np.int64), values)
