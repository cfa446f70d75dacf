"""What the rows of the bench come to: the best of each sweep with its spread, and comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvsplit.reproduce.depth.order import best_rate
from mvsplit.reproduce.depth.plan import BenchSize, Entry
from mvsplit.reproduce.depth.run import WINDOW
from mvsplit.reproduce.depth.timing import SHARED

Row = Mapping[str, Any]
ENOUGH = 3  # rates of a sweep around a guess


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An entry at one shape.

    Attributes:
        rows: all its runs.
        rate: the best one, None where nothing lives.
        swept: whether the sweep was run whole.
    """

    entry: Entry
    depth: int
    width: int
    rows: Sequence[Row]
    rate: float | None
    swept: bool

    @property
    def best(self) -> list[Row]:
        """The runs at the best rate, by seed."""
        found = [row for row in self.rows if row["rate"] == self.rate]
        return sorted(found, key=lambda row: row["seed"])

    @property
    def losses(self) -> list[float] | None:
        """Validation losses at the best rate, by seed, as the rule takes them."""
        return [row["validation_loss"] for row in self.best] if self.rate or self.swept else None

    @property
    def tried(self) -> list[float]:
        return sorted({row["rate"] for row in self.rows})

    @property
    def living(self) -> list[float]:
        """Rates at which every run lives."""
        dead = {row["rate"] for row in self.rows if not row["lives"]}
        return [rate for rate in self.tried if rate not in dead]

    @property
    def smaller(self) -> tuple[float, list[float]] | None:
        """A rate at which every run lives and the mean is smaller than at the best one, which has
        more seeds, with its losses; of several the one with the smallest."""
        means = {rate: self._at(rate) for rate in self.living if rate != self.rate}
        if self.rate is None or not means:
            return None
        rate = min(means, key=lambda rate: statistics.fmean(means[rate]))
        smaller = statistics.fmean(means[rate]) < statistics.fmean(self._at(self.rate))
        return (rate, means[rate]) if smaller else None

    def _at(self, rate: float) -> list[float]:
        return [row["validation_loss"] for row in self.rows if row["rate"] == rate]

    @property
    def at_end(self) -> bool:
        """Whether the best rate lies at an end of what was tried, beyond which a better one may."""
        return self.rate in (self.tried[0], self.tried[-1])

    def over_seeds(self, *path: str) -> list[float]:
        """A field of the rows at the best rate, or one within it; those that have it."""
        found = []
        for row in self.best:
            value: Any = row
            for name in path:
                value = None if value is None else value.get(name)
            found += [] if value is None else [value]
        return found


def cells(size: BenchSize, entries: Sequence[Entry], rows: Sequence[Row]) -> list[Cell]:
    """Those of which there is a run, entries in the order given, shallow before deep."""
    found = []
    for entry in entries:
        mine = [row for row in rows if row["entry"] == entry.name]
        for depth, width in sorted({(row["depth"], row["width"]) for row in mine}):
            here = [row for row in mine if (row["depth"], row["width"]) == (depth, width)]
            tried = {row["rate"] for row in here}
            swept = set(size.rates) <= tried
            if depth not in size.depths[:-1] or width != size.width:
                swept = len(tried) >= ENOUGH
            found.append(
                Cell(
                    entry=entry,
                    depth=depth,
                    width=width,
                    rows=here,
                    rate=best_rate(here),
                    swept=swept,
                )
            )
    return found


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def seconds_alone(timing: Mapping[str, Any], entry: Entry, depth: int, width: int) -> float | None:
    """Seconds a step of a network that has the device to itself. Entries whose blocks run as one
    node take what `SHARED` takes; the others were timed at one depth, and take as many times what
    `SHARED` takes at other depths as they do there."""
    alone = timing.get("alone", {})
    shared = alone.get(f"{SHARED}-{depth}x{width}")
    own = {name: s for name, s in alone.items() if name.rpartition("-")[0] == entry.name}
    if shared is None or entry.name == SHARED or not own:
        return shared
    (name, seconds), *_ = own.items()
    there = alone.get(f"{SHARED}-{name.rpartition('-')[2]}")
    return None if there is None else shared * seconds / there


def loss_at(row: Row, step: float) -> float | None:
    """The training loss of the last whole window before `step`."""
    window = int(step // WINDOW)
    return row["curve"][window - 1] if 1 <= window <= len(row["curve"]) else None


def at_equal_time(found: Sequence[Cell], timing: Mapping[str, Any]) -> dict[str, list[float]]:
    """The training losses, by seed, once each cell has had the time in which the fastest of them
    takes all its steps; by entry and shape. Cells without a time are left out."""
    known = {}
    for cell in found:
        seconds = seconds_alone(timing, cell.entry, cell.depth, cell.width)
        if seconds is not None and cell.best:
            known[key(cell)] = (cell, seconds, cell.best[0]["steps"])
    if not known:
        return {}
    budget = min(seconds * steps for _, seconds, steps in known.values())
    result = {}
    for name, (cell, seconds, _) in known.items():
        losses = [loss_at(row, budget / seconds + 1e-6) for row in cell.best]
        result[name] = [loss for loss in losses if loss is not None]
    return result


def key(cell: Cell) -> str:
    return f"{cell.entry.name}-{cell.depth}x{cell.width}"


def collapses(rows: Sequence[Row]) -> list[Row]:
    """The runs that lost what they had learned, in the order of entry and depth."""
    lost = [row for row in rows if row.get("collapse_step") is not None]
    return sorted(lost, key=lambda row: (row["entry"], row["depth"], row["rate"], row["seed"]))


@dataclass(frozen=True, kw_only=True)
class WatchCount:
    """What the watch said over many runs: of the dead how many had an alarm, of the living too; of
    those of ensembles it saw nothing."""

    unseen: int
    dead: int
    dead_with_alarm: int
    living: int
    living_with_alarm: int


def watch_count(rows: Sequence[Row]) -> WatchCount:
    """Over all rows; a run is dead that neither lives nor is finite, or never learned."""
    every = len(rows)
    rows = [row for row in rows if "together" not in row]
    alarmed = [bool((row.get("watch") or {}).get("alarms")) for row in rows]
    lives = [bool(row["lives"]) for row in rows]
    pairs = list(zip(lives, alarmed, strict=True))
    return WatchCount(
        unseen=every - len(rows),
        dead=lives.count(False),
        dead_with_alarm=pairs.count((False, True)),
        living=lives.count(True),
        living_with_alarm=pairs.count((True, True)),
    )


def for_verdict(
    found: Sequence[Cell], size: BenchSize, kinds: Sequence[str]
) -> dict[int, dict[str, list[float] | None]]:
    """By depth, the losses of the entries of some kinds at the width of the bench; of the depths
    at which anything was run."""
    here = [cell for cell in found if cell.width == size.width and cell.depth in size.depths]
    depths = sorted({cell.depth for cell in here})
    return {
        depth: {c.entry.name: c.losses for c in here if c.depth == depth and c.entry.kind in kinds}
        for depth in depths
    }
