"""Which run comes next: what tells most comes first, and what was found decides what follows.

1. a sweep of the learning rate with one seed, at every depth but the last
2. rates beyond the sweep, where the best one lies at its end
3. the other seeds at each entry's best rate
4. the last depth at the best rate of the depth before it, the best entries first; the sweep of
   candidates at the smallest depth
5. candidates at the depths after it, the best first, and their seeds
6. the last depth at the rates beside, and its seeds
7. shapes with as many parameters
8. the other seeds at the neighbours of the best rates
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, Entry, neighbour, place

BEYOND = 2  # rates that a sweep goes beyond its ends, at most
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Wish:
    """A run, when it comes, and the loss that the entry reached where the wish comes from."""

    phase: int
    run: BenchRun
    loss: float = 0.0


def in_order(size: BenchSize, entries: Sequence[Entry], rows: Rows) -> list[BenchRun]:
    """The runs that are wanted and have no row yet, in order. What is wanted later depends on the
    rows: ask again when there are more."""
    done = {row["run"] for row in rows}
    wishes = [
        wish
        for entry in entries
        for wish in _Wishes(size, entry, [row for row in rows if row["entry"] == entry.name]).all()
    ]
    runs = dict.fromkeys(wish.run for wish in sorted(wishes, key=_weight(size)))
    return [run for run in runs if run.name not in done]


def _weight(size: BenchSize) -> Callable[[_Wish], Any]:
    """Within a phase: the best entries first, then rates near the middle of the sweep, then shallow
    networks, whose rows are there soon, then the lower of two rates."""
    middle = sum(map(place, size.rates)) / len(size.rates)

    def weight(wish: _Wish) -> Any:
        run = wish.run
        return wish.phase, run.seed, wish.loss, abs(place(run.rate) - middle), run.depth, run.rate

    return weight


def swept(depths: Sequence[int]) -> Sequence[int]:
    """Those whose sweep is whole: all but the last, or the only one."""
    return depths[:-1] or depths


class _Wishes:
    """What one entry wants, by its rows."""

    def __init__(self, size: BenchSize, entry: Entry, rows: Rows) -> None:
        self.size, self.entry, self.rows = size, entry, rows

    def all(self) -> Iterator[_Wish]:
        candidate, whole = self.entry.kind == "candidate", swept(self.size.depths)
        for depth in whole:
            yield from self._candidate(depth, whole[0]) if candidate else self._sweep(depth)
        guess = settled(self.size.rates, self._at(whole[-1]))
        if guess is None:
            return
        loss = _loss(self._at(whole[-1]), guess)
        phases = (9, 9) if self.entry.kind == "control" else (6, 6) if candidate else (4, 6)
        for depth in self.size.depths[len(whole) :]:
            yield from self._around(depth, self.size.width, guess, phases, loss)
        for depth, width in self.size.shapes:
            yield from self._around(depth, width, guess, (7, 7), loss)

    def _sweep(self, depth: int) -> Iterator[_Wish]:
        rates, there = self.size.rates, self._at(depth)
        yield from (_Wish(1, self._run(depth, rate)) for rate in rates)
        yield from (_Wish(2, self._run(depth, rate)) for rate in beyond(rates, there))
        best = settled(rates, there)
        if best is not None:
            yield from (_Wish(3, run) for run in self._seeds(depth, best))
            for rate in (neighbour(best, -1), neighbour(best, 1)):
                yield from (_Wish(8, run) for run in self._seeds(depth, rate))

    def _candidate(self, depth: int, first: int) -> Iterator[_Wish]:
        """At the smallest depth a sweep; deeper only what has one there."""
        rates, there = self.size.rates, self._at(depth)
        before = settled(rates, self._at(first))
        if depth != first and before is None:
            return
        phase = 4 if depth == first else 5
        loss = 0.0 if before is None else _loss(self._at(first), before)
        for rate in (*rates, *beyond(rates, there)):
            yield _Wish(phase, self._run(depth, rate), loss)
        best = settled(rates, there)
        if best is not None:
            yield from (_Wish(phase + 1, run, loss) for run in self._seeds(depth, best))

    def _around(
        self, depth: int, width: int, guess: float, phases: tuple[int, int], loss: float
    ) -> Iterator[_Wish]:
        """A sweep that begins at a guess and goes on where the best lies at its end, then seeds."""
        there, (first, later) = self._at(depth, width), phases
        yield _Wish(first, self._run(depth, guess, width=width), loss)
        rates = (neighbour(guess, -1), guess, neighbour(guess, 1))
        for rate in (*rates, *beyond(rates, there)):
            yield _Wish(later, self._run(depth, rate, width=width), loss)
        best = settled(rates, there)
        if best is not None:
            yield from (_Wish(later, run, loss) for run in self._seeds(depth, best, width))

    def _run(self, depth: int, rate: float, width: int = 0, seed: int | None = None) -> BenchRun:
        return BenchRun(
            entry=self.entry,
            depth=depth,
            width=width or self.size.width,
            rate=rate,
            seed=self.size.seeds[0] if seed is None else seed,
        )

    def _seeds(self, depth: int, rate: float, width: int = 0) -> Iterator[BenchRun]:
        return (self._run(depth, rate, width, seed) for seed in self.size.seeds[1:])

    def _at(self, depth: int, width: int = 0) -> Rows:
        shape = (depth, width or self.size.width)
        return [row for row in self.rows if (row["depth"], row["width"]) == shape]


def _loss(rows: Rows, rate: float) -> float:
    """The mean validation loss at a rate at which every run lives."""
    losses = [row["validation_loss"] for row in rows if row["rate"] == rate]
    return sum(losses) / len(losses)


def beyond(rates: Sequence[float], rows: Rows) -> list[float]:
    """The next rate where the best so far lies at an end of what was tried, at most BEYOND past the
    ends of `rates`; nothing before all of `rates` were tried. Where nothing lives, the next lower
    one."""
    tried = sorted({row["rate"] for row in rows})
    if not tried or not set(rates) <= set(tried):
        return []
    low = [neighbour(min(rates), -k) for k in range(1, BEYOND + 1)]
    high = [neighbour(max(rates), k) for k in range(1, BEYOND + 1)]
    best = best_rate(rows)
    if best is None or best == tried[0]:
        return [rate for rate in low if rate < tried[0]][:1]
    if best == tried[-1]:
        return [rate for rate in high if rate > tried[-1]][:1]
    return []


def settled(rates: Sequence[float], rows: Rows) -> float | None:
    """The best rate, once all of `rates` were tried and the best does not lie at an end."""
    whole = set(rates) <= {row["rate"] for row in rows}
    return best_rate(rows) if whole and not beyond(rates, rows) else None


def best_rate(rows: Rows) -> float | None:
    """The rate with the smallest mean validation loss, among those with the most seeds of which
    every one lives; None where nothing lives."""
    by_rate: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_rate[row["rate"]].append(row)
    alive = {rate: found for rate, found in by_rate.items() if all(r["lives"] for r in found)}
    if not alive:
        return None
    most = max(len(found) for found in alive.values())
    means = {
        rate: sum(r["validation_loss"] for r in found) / len(found)
        for rate, found in alive.items()
        if len(found) == most
    }
    return min(means, key=lambda rate: (means[rate], rate))
