"""The bench by ensembles: which runs are trained as one, and how long that may take."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mvsplit.reproduce.depth.ensemble import Family
from mvsplit.reproduce.depth.order import best_rate, beyond, in_order, swept
from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, Entry, place
from mvsplit.reproduce.depth.run import read_rows
from mvsplit.reproduce.depth.study import MARGIN, stopped_with_rows
from mvsplit.reproduce.depth.together import room_for, run_together
from mvsplit.training.builders import resolve_device

_FAR = 99  # places of a rate from the best one, where nothing lives


def family(run: BenchRun) -> Family:
    """Runs of one family can be trained as one."""
    return Family.named(run.entry.rule(run.depth), width=run.width, depth=run.depth)


def wanted(
    size: BenchSize, entries: Sequence[Entry], rows: Sequence[dict[str, Any]]
) -> list[BenchRun]:
    """What is missing, in order; behind it, to fill up an ensemble, all seeds of each sweep and of
    the rate beyond it, those first that lie next to the best rate so far."""
    first = in_order(size, entries, rows)
    done = {row["run"] for row in rows}
    filling = sorted(_all(size, entries, rows), key=lambda each: each[0])
    return list(dict.fromkeys([*first, *(r for _, r in filling if r.name not in done)]))


def missing(
    size: BenchSize,
    entries: Sequence[Entry],
    rows: Sequence[dict[str, Any]],
    only: Sequence[BenchRun] | None = None,
) -> list[BenchRun]:
    """What would be run by these rows: of `only`, if given, else of what is wanted."""
    done = {row["run"] for row in rows}
    chosen = wanted(size, entries, rows) if only is None else only
    return [run for run in chosen if run.name not in done]


def _all(
    size: BenchSize, entries: Sequence[Entry], rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, BenchRun]]:
    """Each with the places of its rate from the best one of its entry and depth so far."""
    for depth in swept(size.depths):
        for seed in size.seeds:
            for entry in entries:
                of_entry = [row for row in rows if row["entry"] == entry.name]
                there = [r for r in of_entry if (r["depth"], r["width"]) == (depth, size.width)]
                best = best_rate(there)
                for rate in (*size.rates, *beyond(size.rates, there)):
                    run = BenchRun(entry=entry, depth=depth, width=size.width, rate=rate, seed=seed)
                    yield (_FAR if best is None else abs(place(rate) - place(best))), run


def next_group(
    runs: Sequence[BenchRun], room: Callable[[BenchRun], int], left: Callable[[BenchRun, int], bool]
) -> list[BenchRun]:
    """The first of `runs` and those behind it that can be trained with it, as many as there is
    room for; of another shape or family where there is no time left for the first's.

    Args:
        room: members that an ensemble may have.
        left: whether there is time for an ensemble of so many.
    """
    tried = set()
    for run in runs:
        kind = (run.depth, run.width, family(run))
        if kind in tried:
            continue
        tried.add(kind)
        same = [r for r in runs if (r.depth, r.width, family(r)) == kind][: room(run)]
        if same and left(run, len(same)):
            return same
    return []


def study_together(
    out: Path,
    size: BenchSize,
    entries: Sequence[Entry],
    *,
    most: int,
    minutes: float | None = None,
    only: Sequence[BenchRun] | None = None,
    recompute: bool | None = None,
    graph_or_nothing: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains what is missing in ensembles of up to `most` members and gives all rows of `out`.

    Args:
        only: runs, in order, in place of those that the bench would choose.
        recompute, graph_or_nothing: see `Training`.

    Raises:
        Stopped: SIGTERM or Ctrl-C stopped it, which is said; the same again goes on.
    """
    how: dict[str, Any] = {"recompute": recompute, "graph_or_nothing": graph_or_nothing}
    end = math.inf if minutes is None else time.time() + 60 * minutes
    took: dict[tuple[int, int], float] = {}  # seconds by depth and width
    fit: dict[tuple[int, int], int] = {}  # members that had room where more had not

    def left(run: BenchRun, members: int) -> bool:
        work = run.depth * run.width
        known = [s * max(work / (d * w), 0.3) for (d, w), s in took.items()]
        seconds = took.get((run.depth, run.width), max(known, default=0.0))
        return time.time() + MARGIN * seconds < end

    def room(run: BenchRun) -> int:
        members = _members(run, size, most, bool(recompute))
        return min(members, fit.get((run.depth, run.width), members))

    with stopped_with_rows(out, say):
        while True:
            rows = read_rows(out)
            group = next_group(missing(size, entries, rows, only), room, left)
            if not group:
                return rows
            began, first = time.time(), group[0]
            try:
                ended, short = run_together(group, size, out, end, **how), False
            except torch.OutOfMemoryError:
                if len(group) == 1:
                    raise
                ended, short = True, True
            _free(size)  # after the error is gone, whose traceback holds the networks
            if short:
                fit[first.depth, first.width] = fewer = len(group) // 2
                say(f"no memory for {len(group)} of {first.depth} layers as one; {fewer} at a time")
                continue
            if not ended:
                return rows
            took[first.depth, first.width] = time.time() - began
            each = {row["run"]: row for row in read_rows(out)}
            words = [f"{r.name} {_words(each[r.name])}" for r in group]
            say(f"{len(group)} runs in {time.time() - began:.0f} s:\n  " + "\n  ".join(words))


def _free(size: BenchSize) -> None:
    gc.collect()
    if size.device != "cpu":
        torch.cuda.empty_cache()


def _members(run: BenchRun, size: BenchSize, most: int, recompute: bool) -> int:
    """As many as the device has memory for, at most `most`."""
    device = resolve_device(size.device)
    room = room_for(run.experiment(size), device, recompute=recompute)
    return max(1, int(min(most, room)))


def _words(row: dict[str, Any]) -> str:
    loss = row["validation_loss"]
    return f"{loss:.4g}" if loss is not None and row["ended"] == "finished" else row["ended"]
