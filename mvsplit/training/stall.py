"""Finds the process that has stopped moving, so that the others do not wait for it for ever.

A rank that waits in a collective looks like one that hangs. So each rank counts the places that its
main thread comes to, which are the same on all, and a thread publishes the count. Once it stands
still for too long, the ranks with the lowest count are those that the others wait for. A rank whose
thread is silent too is not running at all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mvsplit.errors import UserError

THE_START, THE_SAVE = "the start", "the save"
_PATIENCE = 10  # times the timeout, at these: reading, checking and writing much take their time

STALLED = 4  # the exit status of every rank of a run in which one has stalled


@dataclass
class Seen:
    """The last word of a rank.

    Attributes:
        count, place: how many places its main thread has come to, and the last of them.
        pulse: how often its thread has published.
        moved, alive: when the count and the pulse changed, on our own clock.
    """

    count: int
    place: str
    pulse: int
    moved: float
    alive: float


class StallWatch:
    """Publishes where this rank is, and ends the process when a rank has stalled.

    Args:
        store: shared by the ranks; nobody else uses this connection.
        rank, world: this rank, and how many there are.
        timeout: seconds without a move.

    Attributes:
        tell: is called with the message before this process ends.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.tell: Callable[[str], object] = lambda message: None
        self._store = store
        self._interval = min(5.0, max(0.05, timeout / 20))
        self._now: tuple[int, str] = (0, THE_START)  # replaced whole, so read whole
        self._seen: dict[int, Seen] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mvsplit-stall", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Says that the main thread has come to `place`."""
        self._now = (self._now[0] + 1, place)

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        pulse = 0
        try:
            while not self._closed.wait(self._interval):
                pulse += 1
                self._store.set(f"at/{self.rank}", json.dumps([*self._now, pulse]))
                self._look()
                if late := stalled(list(self._seen.values()), time.monotonic(), self.timeout):
                    self._end(late)
        except RuntimeError as error:  # the store is gone, and with it torchrun or the first rank
            if not self._closed.is_set():
                reason = str(error).splitlines()[0]
                self._leave(f"rank {self.rank}: lost the other processes of the run ({reason})")

    def _look(self) -> None:
        now = time.monotonic()
        for number in range(self.world):
            key = f"at/{number}"
            known = self._store.check([key])
            count, place, pulse = json.loads(self._store.get(key)) if known else (0, THE_START, 0)
            before = self._seen.get(number)
            moved = now if before is None or before.count != count else before.moved
            alive = now if before is None or before.pulse != pulse else before.alive
            self._seen[number] = Seen(count, place, pulse, moved, alive)

    def _end(self, late: list[int]) -> None:
        message = describe(late, self._seen, time.monotonic())
        try:
            self.tell(message)
        except UserError as error:  # a full disk, say; the process must end all the same
            print(f"mvsplit: {error}", file=sys.stderr, flush=True)
        if self._store.add("stall/said", 1) > 1:
            message = ""
        if self.rank in late:
            faulthandler.dump_traceback(file=sys.stderr)
        if self.rank > 0:  # the first rank writes it down, before it loses us
            time.sleep(3 * self._interval)
        self._leave(message)

    def _leave(self, message: str) -> None:
        if message:
            print(f"mvsplit: {message}", file=sys.stderr, flush=True)
        os._exit(STALLED)  # the main thread may be inside a collective, where no exception reaches


def stalled(seen: list[Seen], now: float, timeout: float) -> list[int]:
    """The ranks that the others wait for, by number; empty while all is well."""
    silent = [n for n, rank in enumerate(seen) if now - rank.alive > timeout]
    if silent:
        return silent
    least = min(seen, key=lambda rank: rank.count)
    patience = _PATIENCE * timeout if least.place in (THE_START, THE_SAVE) else timeout
    if all(now - rank.moved <= patience for rank in seen):
        return []
    return [n for n, rank in enumerate(seen) if rank.count == least.count]


def describe(late: list[int], seen: dict[int, Seen], now: float) -> str:
    """What is said of the ranks `late`."""
    names = ", ".join(f"rank {n}" for n in late)
    first = seen[late[0]]
    if len(late) == len(seen):
        what = f"no rank has moved for {now - first.moved:.0f} s: all are at {first.place}"
    else:
        silent = "" if now - first.alive < now - first.moved else ", nor given a sign of life"
        what = (
            f"{names} of {len(seen)} has not moved for {now - first.moved:.0f} s, at "
            f"{first.place}{silent}"
        )
    return f"{what}; all stop; give the same command again to go on (--parallel.timeout)"
