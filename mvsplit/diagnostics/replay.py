"""Runs the detector over logs that were written before, by us or by another program."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from mvsplit.diagnostics.detector import Detector
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.logs import JsonLines, Record, read_jsonl
from mvsplit.diagnostics.order import Order
from mvsplit.errors import UserError


def replay(logs: Sequence[JsonLines], detector: Detector | None = None) -> Iterator[Event]:
    """The events of one run whose lines are spread over `logs`, as they would have come."""
    detector = detector or Detector()
    for record in merged(logs):
        yield from detector.update(record)


def merged(logs: Sequence[JsonLines]) -> Iterator[Record]:
    """The lines of several logs of one run in the order in which they were written.

    Within a log the order is the file's. Between logs it is that of the steps, and each return to
    an earlier step begins a new round, so that a rollback stands at one place in all of them. Of
    one step, the lines come in the order of the logs. Nothing is held in memory but a line a log.
    """
    ordered = [_with_rounds(log, place) for place, log in enumerate(logs)]
    for *_, record in heapq.merge(*ordered, key=lambda item: item[:3]):
        yield record


def _with_rounds(log: JsonLines, place: int) -> Iterator[tuple[int, int, int, Record]]:
    """(round, newest step, place of the log, line); the first three never fall."""
    order, rounds, newest = Order(), 0, 0
    for record in log:
        if order.place(record) == "back":
            rounds, newest = rounds + 1, 0
        newest = max(newest, record["step"])
        yield rounds, newest, place, record


def open_logs(paths: Sequence[Path]) -> list[JsonLines]:
    """The logs to replay: files as they are, of a run folder its metrics and layers.

    Raises:
        UserError: a path that does not exist, or a folder that holds no log.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [path / f"{n}.jsonl" for n in ("metrics", "layers")]
            found = [file for file in found if file.is_file()]
            if not found:
                raise UserError(f"{path} holds no metrics.jsonl or layers.jsonl; name a run folder")
            files += found
        else:
            files.append(path)
    return [read_jsonl(file, latest=False) for file in files]
