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
from mvsplit.reproduce.depth.order import in_order
from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, Entry
from mvsplit.reproduce.depth.run import read_rows
from mvsplit.reproduce.depth.study import MARGIN
from mvsplit.reproduce.depth.together import room_for, run_together
from mvsplit.training.builders import resolve_device


def family(run: BenchRun) -> Family:
    """Runs of one family can be trained as one."""
    return Family.named(run.entry.rule(run.depth), width=run.width, depth=run.depth)


def wanted(
    size: BenchSize, entries: Sequence[Entry], rows: Sequence[dict[str, Any]]
) -> list[BenchRun]:
    """What is missing, in order; behind it all seeds of each sweep, which fill up an ensemble."""
    first = in_order(size, entries, rows)
    done = {row["run"] for row in rows}
    return list(dict.fromkeys([*first, *(r for r in _all(size, entries) if r.name not in done)]))


def _all(size: BenchSize, entries: Sequence[Entry]) -> Iterator[BenchRun]:
    for depth in size.depths[:-1]:
        for seed in size.seeds:
            for entry in entries:
                for rate in size.rates:
                    yield BenchRun(entry=entry, depth=depth, width=size.width, rate=rate, seed=seed)


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
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains what is missing in ensembles of up to `most` members and gives all rows of `out`."""
    end = math.inf if minutes is None else time.time() + 60 * minutes
    took: dict[tuple[int, int], float] = {}  # seconds by depth and width

    def left(run: BenchRun, members: int) -> bool:
        work = run.depth * run.width
        known = [s * max(work / (d * w), 0.3) for (d, w), s in took.items()]
        return time.time() + MARGIN * max(known, default=0.0) < end

    while True:
        rows = read_rows(out)
        runs = wanted(size, entries, rows)
        group = next_group(runs, lambda run: _members(run, size, most), left)
        if not group:
            return rows
        began, first = time.time(), group[0]
        if not run_together(group, size, out, end):
            return rows
        took[first.depth, first.width] = time.time() - began
        each = {row["run"]: row for row in read_rows(out)}
        words = [f"{r.name} {_words(each[r.name])}" for r in group]
        say(f"{len(group)} runs in {time.time() - began:.0f} s:\n  " + "\n  ".join(words))
        gc.collect()
        if size.device != "cpu":
            torch.cuda.empty_cache()


def _members(run: BenchRun, size: BenchSize, most: int) -> int:
    """As many as the device has memory for, at most `most`."""
    room = room_for(run.experiment(size), resolve_device(size.device))
    return max(1, int(min(most, room)))


def _words(row: dict[str, Any]) -> str:
    loss = row["validation_loss"]
    return f"{loss:.4g}" if loss is not None and row["ended"] == "finished" else row["ended"]
