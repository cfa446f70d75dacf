"""Which run comes next: what tells most comes first, and what was found decides what follows.

1. a sweep of the learning rate with one seed, at every depth but the last
2. rates beyond the sweep, where the best one lies at its end
3. the other seeds at each entry's best rate
4. the last depth around the best rate of the depth before it, then its seeds
5. shapes with as many parameters
6. the other seeds at the neighbours of the best rates
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, Entry, neighbour, place

BEYOND = 2  # rates that a sweep goes beyond its ends, at most
Rows = Sequence[Mapping[str, Any]]


def in_order(size: BenchSize, entries: Sequence[Entry], rows: Rows) -> list[BenchRun]:
    """The runs that are wanted and have no row yet, in order. What is wanted later depends on the
    rows: ask again when there are more."""
    done = {row["run"] for row in rows}
    found: dict[int, list[BenchRun]] = defaultdict(list)
    for entry in entries:
        mine = [row for row in rows if row["entry"] == entry.name]
        for phase, run in _wanted(size, entry, mine):
            found[phase].append(run)
    ordered = [run for phase in sorted(found) for run in sorted(found[phase], key=_weight(size))]
    return [run for run in dict.fromkeys(ordered) if run.name not in done]


def _weight(size: BenchSize) -> Any:
    """Within a phase: rates near the middle of the sweep first, then deep networks, for what runs
    long should not begin last."""
    middle = sum(map(place, size.rates)) / len(size.rates)
    return lambda run: (run.seed, abs(place(run.rate) - middle), -run.depth)


def _wanted(size: BenchSize, entry: Entry, rows: Rows) -> Iterator[tuple[int, BenchRun]]:
    first, *others = size.seeds
    *swept, last = size.depths

    def run(depth: int, rate: float, seed: int = first, width: int = size.width) -> BenchRun:
        return BenchRun(entry=entry, depth=depth, width=width, rate=rate, seed=seed)

    def at(depth: int, width: int = size.width) -> Rows:
        return [row for row in rows if (row["depth"], row["width"]) == (depth, width)]

    for depth in swept:
        yield from ((1, run(depth, rate)) for rate in size.rates)
        yield from ((2, run(depth, rate)) for rate in beyond(size.rates, at(depth)))
        best = settled(size.rates, at(depth))
        if best is None:
            continue
        yield from ((3, run(depth, best, seed)) for seed in others)
        near = (neighbour(best, -1), neighbour(best, 1))
        yield from ((6, run(depth, rate, seed)) for rate in near for seed in others)
    guess = settled(size.rates, at(swept[-1]))
    if guess is None:
        return
    yield from _around(run, at, last, size.width, guess, size.seeds, 4)
    if entry.kind == "control":
        return
    for depth, width in size.shapes:
        yield from _around(run, at, depth, width, guess, size.seeds, 5)


def _around(
    run: Any, at: Any, depth: int, width: int, guess: float, seeds: Sequence[int], phase: int
) -> Iterator[tuple[int, BenchRun]]:
    """A sweep that begins at a guess and goes on where the best lies at its end, then its seeds."""
    there = at(depth, width)
    start = (neighbour(guess, -1), guess, neighbour(guess, 1))
    yield from ((phase, run(depth, rate, width=width)) for rate in start)
    yield from ((phase, run(depth, rate, width=width)) for rate in beyond(start, there))
    best = settled(start, there)
    if best is not None:
        yield from ((phase, run(depth, best, seed, width)) for seed in seeds[1:])


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
