"""Runs the bench: worker processes that share a device take the most telling run that is left."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mvsplit.errors import UserError
from mvsplit.reproduce.depth.order import in_order
from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, Entry, get_entries
from mvsplit.reproduce.depth.run import ROWS, RUNS, check_row, read_rows, run_bench
from mvsplit.reproduce.depth.verdict import note_rule
from mvsplit.reproduce.progress import PATIENCE, read_progress, say_at_once
from mvsplit.reproduce.workers import Stopped, stoppable, worker_pool
from mvsplit.training.checkpoint import list_checkpoints
from mvsplit.training.files import read_lines
from mvsplit.training.run_folder import FolderInUse

RULE_FILE = "rule.json"
RESTARTS = 3  # of the worker processes, after one of them has died
SHAPE = ("depth", "width", "rate", "seed")
MOMENT = 5.0  # seconds until it is seen again whether others have ended
MARGIN = 1.15  # of the time a run like it took, which must be left for a run to begin


class DepthStudy:
    """The bench in one folder. The same folder again goes on: what has a row is not run again.

    Args:
        out: rows, and the folders of runs that are under way.
        workers: runs side by side; those of the size if None.
        scratch: where run folders are while they train; OUT/runs if None.
        only: runs, in order, in place of those that the bench would choose.
        say: is told of each run that has ended.

    Raises:
        UserError: `workers` < 1.
    """

    def __init__(
        self,
        out: Path | str,
        size: BenchSize,
        entries: Sequence[Entry],
        *,
        workers: int | None = None,
        scratch: Path | None = None,
        only: Sequence[BenchRun] | None = None,
        say: Callable[[str], None] = say_at_once,
    ) -> None:
        if workers is not None and workers < 1:
            raise UserError(f"workers={workers}: must be at least 1")
        self.out, self.size, self.entries = Path(out), size, entries
        self.workers, self.say = workers or size.workers, say
        self.scratch, self.only = scratch, only
        self.patience = PATIENCE
        self._rows: list[dict[str, Any]] = []  # as far as this process knows them
        self.failed: dict[str, str] = {}  # runs that gave an error, by name
        self._elsewhere: set[str] = set()  # runs that another process was training a moment ago
        self._told: set[str] = set()

    def rows(self) -> list[dict[str, Any]]:
        """Of the finished runs.

        Raises:
            UserError: one is of another experiment.
        """
        known = {entry.name: entry for entry in self.entries}
        rows = [row for row in read_rows(self.out) if row["entry"] in known]
        for row in rows:
            run = BenchRun(entry=known[row["entry"]], **{k: row[k] for k in SHAPE})
            check_row(run, self.size, row, self.out)
        return rows

    def left(self) -> list[BenchRun]:
        """The runs that are wanted by the rows that are there, and have none; what they give may
        have more wanted.

        Raises:
            UserError: a row is of another experiment.
        """
        self._rows = self.rows()
        return self._left()

    def run(self, *, minutes: float | None = None) -> list[dict[str, Any]]:
        """Trains what is missing and gives all rows. After `minutes` the runs under way are left;
        on a CPU they are saved, and go on with the next call.

        Raises:
            UserError: a row is of another experiment, or worker processes keep dying.
            Stopped: SIGTERM or Ctrl-C stopped it, which is said; the same again goes on.
        """
        end = math.inf if minutes is None else time.time() + 60 * minutes
        with stopped_with_rows(self.out, self.say, self.scratch):
            return self._run(end)

    def _run(self, end: float) -> list[dict[str, Any]]:
        for _ in range(RESTARTS):
            self._rows = self.rows()
            note_rule(self.out / RULE_FILE)
            try:
                self._work(end)
                return self.rows()
            except BrokenProcessPool:
                self.say("a worker process has died; starting them again")
        raise UserError(
            f"worker processes died {RESTARTS} times; run fewer side by side with --workers"
        )

    def _work(self, end: float) -> None:
        busy: dict[Future[bool], BenchRun] = {}
        with worker_pool(self.workers) as pool:
            while True:
                while (run := self._next([*busy.values()], end)) is not None:
                    given = {name: getattr(run, name) for name in SHAPE}
                    where = (self.out, end, self.scratch)
                    job = pool.submit(work, run.entry.name, given, self.size, *where)
                    busy[job] = run
                if not busy:
                    if self._await_others(end):
                        continue
                    return
                done = wait(busy, timeout=self.patience, return_when=FIRST_COMPLETED).done
                for job in done:
                    self._ended(busy.pop(job), job)
                if not done:
                    self._tell_progress(busy.values())

    def _await_others(self, end: float) -> bool:
        """Whether other processes train runs of these, after a moment in which they may have come
        to their end, or have been killed."""
        if not self._elsewhere or time.time() >= end:
            return False
        time.sleep(min(self.patience, MOMENT))
        self._elsewhere.clear()
        self._rows = self.rows()
        return True

    def _tell_progress(self, busy: Iterable[BenchRun]) -> None:
        """How far the runs are, which is all that is known of them if the machine is taken away."""
        for run in busy:
            path = (self.scratch or self.out / RUNS) / run.name
            progress = read_progress(path, steps=self.size.steps, layers=run.depth)
            self.say(progress.line())

    def _next(self, busy: Sequence[BenchRun], end: float) -> BenchRun | None:
        """What may begin: nothing that is running or has failed, nothing that would not come to its
        end in time by what its like have taken, and nothing that the device has no room for."""
        left = end - time.time()
        if left <= 0 or len(busy) >= self.workers:
            return None
        took = [(row["depth"] * row["width"], row["seconds"]) for row in self._rows]
        room = self.size.room - sum(run.depth * run.width for run in busy) if busy else math.inf
        fits = (
            run
            for run in self._left()
            if run not in busy
            and run.name not in self.failed
            and run.name not in self._elsewhere
            and run.depth * run.width <= room
            and expected(run, took) * MARGIN < left
        )
        return next(fits, None)

    def _left(self) -> list[BenchRun]:
        """What is wanted by the rows that are known, in order, and has none."""
        if self.only is None:
            return in_order(self.size, self.entries, self._rows)
        done = {row["run"] for row in self._rows}
        return [run for run in self.only if run.name not in done]

    def _ended(self, run: BenchRun, job: Future[bool]) -> None:
        try:
            whole = job.result()
        except BrokenProcessPool:
            raise
        except FolderInUse:
            if run.name not in self._told:
                self.say(f"{run.name}: another process trains it; its row is waited for")
            self._told.add(run.name)
            self._elsewhere.add(run.name)
            return
        except Exception as error:  # the others are worth having; this one is tried the next time
            self.failed[run.name] = f"{type(error).__name__}: {error}"
            self.say(f"{run.name}: FAILED, {self.failed[run.name][:200]}")
            return
        if not whole:
            self.say(f"{run.name}: left")
            return
        row = json.loads((self.out / ROWS / f"{run.name}.json").read_text("utf-8"))
        self._rows.append(row)
        loss = row.get("validation_loss")
        words = f"loss {loss:.4g}" if loss is not None else row["ended"]
        self.say(f"{run.name}: {words}, {row['seconds']:.0f} s")


@contextmanager
def stopped_with_rows(
    out: Path, say: Callable[[str], None], scratch: Path | None = None
) -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `Stopped` here, and it is said what is kept."""
    try:
        with stoppable():
            yield
    except Stopped as stop:
        finished = {row["run"] for row in read_rows(out)}
        folders = [p for p in (scratch or out / RUNS).glob("*") if p.name not in finished]
        begun = [p for p in folders if list_checkpoints(p / "checkpoints")]
        new = [p for p in folders if not list(read_lines(p / "metrics.jsonl"))]
        kept = f"{len(finished)} runs finished and {len(begun)} begun are kept in {out}"
        say(stop.words(kept + (f", {len(new)} more had taken no step yet" if new else "")))
        raise


def expected(run: BenchRun, took: Sequence[tuple[int, float]]) -> float:
    """Seconds of a run by those that were as deep and wide or nearest to it, 0 before there is any:
    the longest among the last three."""
    if not took:
        return 0.0
    here = run.depth * run.width
    nearest = min((abs(math.log(size / here)), size) for size, _ in took)[1]
    return max([s for size, s in took if size == nearest][-3:]) * max(here / nearest, 0.1)


def work(
    entry: str,
    given: dict[str, Any],
    size: BenchSize,
    out: Path,
    end: float,
    scratch: Path | None,
) -> bool:
    """A run in a worker process, which then lets go of all that it held on the device. Entries go
    by their name, for what they are made of does not travel between processes."""
    run = BenchRun(entry=get_entries([entry])[0], **given)
    try:
        return run_bench(run, size, out, end, scratch)
    finally:
        if size.device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
