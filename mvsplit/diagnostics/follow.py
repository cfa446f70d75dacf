"""Follows the logs of a run while they are written, reading only what is new."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, Protocol, TypeVar

from mvsplit.diagnostics.logs import Dropped, JsonLines, Record, parse_line
from mvsplit.diagnostics.report_layers import LayerMap, LayerMapsBuilder
from mvsplit.diagnostics.report_run import (
    EventsBuilder,
    RunRecord,
    find_pictures,
    name_of,
    put_events,
    put_layers,
    put_metrics,
    put_pictures,
    put_settings,
)
from mvsplit.diagnostics.report_series import SeriesTable

_BLOCK = 2**16
_REMEMBERED = 256  # bytes before the place read up to, by which a rewritten file is told


class Gatherer(Protocol):
    """Takes the records of a log, one after the other."""

    def add(self, record: Record) -> None: ...


G = TypeVar("G", bound=Gatherer)


@dataclass(frozen=True)
class _Place:
    """How far a file has been read."""

    file: tuple[int, int]  # device and inode
    end: int
    before: bytes  # what stands before `end`

    @classmethod
    def last_line(cls, file: BinaryIO) -> _Place:
        """Behind the last whole line of an open file."""
        status = os.fstat(file.fileno())
        end = _end_of_lines(file)
        return cls((status.st_dev, status.st_ino), end, _bytes_before(file, end))

    def still_there(self, file: BinaryIO, now: _Place) -> bool:
        """Whether the file only grew: a resumed run cuts its log back, by a file put in place."""
        same = self.file == now.file and self.end <= now.end
        return same and _bytes_before(file, self.end) == self.before


class FollowedLog(Generic[G]):
    """One log and what gathers its records.

    Attributes:
        gatherer: holds the records of the log as of the latest `refresh`.
        dropped: the lines that were left out.
        generation: how often the records were gathered anew from the start of the file. Within a
            generation, with `latest`, steps only increase.
    """

    def __init__(self, path: Path, gatherer: Callable[[], G], *, latest: bool) -> None:
        self.path = path
        self.latest = latest
        self._new_gatherer = gatherer
        self.generation = 0
        self._place: _Place | None = None
        self._begin_anew()

    @property
    def begun(self) -> bool:
        return self._place is not None

    def refresh(self) -> bool:
        """Takes in what was written since the last time; False where there was nothing."""
        try:
            with self.path.open("rb") as file:
                now = _Place.last_line(file)
                grew = self._place is not None and self._place.still_there(file, now)
        except FileNotFoundError:
            return self._lose()
        if grew and now == self._place:
            return False
        if not grew:
            self._begin_anew()
        if not self._append(now.end):
            self._begin_anew()
            self._take(JsonLines(self.path, latest=self.latest, end=now.end))
        self._place = now
        return True

    def _lose(self) -> bool:
        if self._place is None:
            return False
        self._begin_anew()
        return True

    def _begin_anew(self) -> None:
        self.gatherer = self._new_gatherer()
        self.dropped = Dropped()
        self.generation += 1
        self._place = None
        self._newest = -1

    def _append(self, end: int) -> bool:
        """Takes the lines up to `end`; False as soon as one repeats or goes before a step, where
        which lines count is only known from the whole file."""
        start = 0 if self._place is None else self._place.end
        return self._take(JsonLines(self.path, latest=False, start=start, end=end), ordered=True)

    def _take(self, lines: JsonLines, *, ordered: bool = False) -> bool:
        for record in lines:
            if ordered and self.latest and record["step"] <= self._newest:
                return False
            self._newest = max(self._newest, record["step"])
            self.gatherer.add(record)
        self.dropped += lines.dropped
        return True


class FollowedRun:
    """A run folder that may not exist yet, may be written to, or may have ended.

    Attributes:
        record: what the report shows of the run, as of the latest `refresh`.
        status: "waiting" before there is a log, "live", or "ended" where the run says so.
        maps_generation: changes when maps may differ in probes that they had before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = RunRecord(name_of(folder))
        self._metrics = FollowedLog(folder / "metrics.jsonl", SeriesTable, latest=True)
        self._layers = FollowedLog(folder / "layers.jsonl", LayerMapsBuilder, latest=True)
        self._events = FollowedLog(folder / "events.jsonl", EventsBuilder, latest=False)
        self._maps: dict[str, LayerMap] = {}
        self._others: dict[Path, int] = {}  # files that are no logs → time of their last change

    @property
    def status(self) -> str:
        if self._events.gatherer.ended:
            return "ended"
        begun = any(log.begun for log in (self._metrics, self._layers, self._events))
        return "live" if begun else "waiting"

    @property
    def maps_generation(self) -> int:
        return self._layers.generation

    def refresh(self) -> bool:
        """Takes in what was written since the last time; False where there was nothing."""
        logs = [self._metrics.refresh(), self._layers.refresh(), self._events.refresh()]
        config, pictures = self.folder / "config.json", find_pictures(self.folder)
        others = dict(filter(None, map(_changed_at, (config, *pictures))))
        if not any(logs) and others == self._others:
            return False
        if logs[1]:
            self._maps = self._layers.gatherer.build()
        record = RunRecord(self.record.name)
        put_settings(record, config)
        put_metrics(record, self._metrics.gatherer, self._metrics.dropped)
        put_layers(record, self._maps, self._layers.gatherer, self._layers.dropped)
        put_events(record, self._events.gatherer, self._events.dropped)
        if others == self._others:
            record.pictures = self.record.pictures
        else:
            put_pictures(record, pictures)
        self.record, self._others = record, others
        return True


def _changed_at(path: Path) -> tuple[Path, int] | None:
    """A file and the time of its last change; None where it is gone, as pictures come to be."""
    try:
        return path, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _bytes_before(file: BinaryIO, end: int) -> bytes:
    start = max(0, end - _REMEMBERED)
    file.seek(start)
    return file.read(end - start)


def _end_of_lines(file: BinaryIO) -> int:
    """The place behind the last line break; the end of the file where the rest is a whole record,
    as in a log whose last line was never ended."""
    size = file.seek(0, os.SEEK_END)
    start, rest = size, b""
    while start > 0 and b"\n" not in rest:
        start = max(0, start - _BLOCK)
        file.seek(start)
        rest = file.read(size - start)
    unended = rest[rest.rfind(b"\n") + 1 :]
    return size if unended and parse_line(unended) else size - len(unended)
