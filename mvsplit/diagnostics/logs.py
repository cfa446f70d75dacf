"""Reads the JSONL logs of a run, whatever a crash, a rollback or another program left in them.

A line is a JSON object with a `step`. A line that is not one is left out and counted, never
repaired: the last line after kill −9, a line two processes wrote at once, a block of zero bytes.
NaN and infinity are values like any other and come through.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from mvsplit.errors import UserError

Record = dict[str, Any]

_TAIL = 2**20
_LONGEST = 2**26  # bytes of a line; a thousand layers in every field take half a mebibyte
_LARGEST_STEP = 2**53  # above it, neither a float nor JavaScript tells neighbouring steps apart


@dataclass
class Dropped:
    """How many lines of a log were left out, by reason."""

    truncated: int = 0  # the last line, cut short
    malformed: int = 0  # not a JSON object
    stepless: int = 0  # no `step`, or one that is no whole number ≥ 0
    superseded: int = 0  # a later line holds the same step

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(*map(add, vars(self).values(), vars(other).values()))

    @property
    def total(self) -> int:
        return self.truncated + self.malformed + self.stepless + self.superseded

    def __str__(self) -> str:
        """One sentence, "" where nothing was dropped."""
        reasons = {
            "cut short at the end": self.truncated,
            "not a JSON object": self.malformed,
            "without a valid step": self.stepless,
            "replaced by a later line of the same step": self.superseded,
        }
        return ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items() if count)


class JsonLines:
    """The records of one log. Each iteration reads the file anew, a line at a time.

    Args:
        path, latest: as of `read_jsonl`.
        start, end: the bytes to read, at the borders of lines; None: to the end of the file.

    Attributes:
        path: the file.
        dropped: what the latest iteration left out; complete once it has ended.
    """

    def __init__(self, path: Path, *, latest: bool, start: int = 0, end: int | None = None) -> None:
        self.path = path
        self.latest = latest
        self.start, self.end = start, end
        self.dropped = Dropped()

    def __iter__(self) -> Iterator[Record]:
        superseded = self._superseded_lines() if self.latest else None
        self.dropped = Dropped()
        for line, record in enumerate(self._parse()):
            if superseded is None:
                yield record
            elif line < len(superseded) and superseded[line]:
                self.dropped.superseded += 1
            elif line < len(superseded):  # what was written since is left to the next iteration
                yield record

    def _superseded_lines(self) -> np.ndarray | None:
        """True for each valid line whose step a later line repeats; None where there is none.

        Sixteen bytes a line while the steps increase, about fifty where they have to be sorted.
        """
        steps = array("q", (record["step"] for record in self._parse()))
        step_of_line = np.array(steps, dtype=np.int64)
        if np.all(np.diff(step_of_line) > 0):
            return None
        lines = np.argsort(step_of_line, kind="stable")  # equal steps stay in the file's order
        repeated = np.diff(step_of_line[lines]) == 0
        superseded = np.zeros(len(lines), dtype=bool)
        superseded[lines[:-1][repeated]] = True
        return superseded

    def _parse(self) -> Iterator[Record]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            position, too_long = self.start, False
            for line in iter(partial(file.readline, _LONGEST), b""):
                position += len(line)
                if self.end is not None and position > self.end:
                    return
                goes_on, too_long = too_long, _is_cut(line)
                if goes_on or too_long:  # counted once, with its last piece
                    self.dropped.malformed += not too_long
                    continue
                record = parse_line(line)
                if record is None:
                    self._count_unreadable(line)
                elif not _has_step(record):
                    self.dropped.stepless += 1
                else:
                    record["step"] = int(record["step"])
                    yield record

    def _count_unreadable(self, line: bytes) -> None:
        if not line.strip():
            return  # an empty line holds nothing that could be lost
        if line.endswith(b"\n"):
            self.dropped.malformed += 1
        else:
            self.dropped.truncated += 1


def read_jsonl(path: Path | str, *, latest: bool = True) -> JsonLines:
    """Opens a log as a stream of records, each a dict with a whole `step` ≥ 0.

    Args:
        path: metrics.jsonl, layers.jsonl, events.jsonl, or any JSONL that has steps.
        latest: of several lines with one step only the last comes, in its place; this reads the
            file twice. False: all come, in the order in which they were written, as a detector or
            a list of events needs them.

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no log {str(path)!r}; name a run's folder or a JSONL log")
    return JsonLines(path, latest=latest)


def last_record(path: Path | str) -> Record | None:
    """The last whole record of a log that may still be written to; None where there is none yet.

    Reads the file's last mebibyte only, so that it can be called several times a second.
    """
    path = Path(path)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().splitlines(keepends=True)
    whole = (parse_line(line) for line in reversed(lines) if line.endswith(b"\n"))
    return next((record for record in whole if record is not None and _has_step(record)), None)


def _is_cut(line: bytes) -> bool:
    """Whether it is a piece of what is too long to be a line of a log."""
    return len(line) == _LONGEST and not line.endswith(b"\n")


def as_number(value: Any) -> float | None:
    """A JSON number as a float (non-finite ones included), None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond 1e308
        return float("inf") if value > 0 else float("-inf")


def parse_line(line: bytes) -> Record | None:
    """The JSON object that a line holds, None where it holds none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
        return None
    return record if isinstance(record, dict) else None


def _has_step(record: Record) -> bool:
    step = as_number(record.get("step"))
    return step is not None and 0 <= step <= _LARGEST_STEP and step == int(step)
