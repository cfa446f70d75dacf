"""How far runs are that train in other processes, and what is left of them, from their logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvsplit.training.files import read_lines

PATIENCE = 20.0  # seconds without a run's end after which it is told how far runs are
LATEST = 10  # steps by which the pace of a run is told
ENOUGH = 3  # steps from which on a pace says what is left: the first are slower than the rest


def say_at_once(text: str) -> None:
    """Prints a line that a log and a pipe have at once, too."""
    print(text, flush=True)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Of one run.

    Attributes:
        steps: that it takes in all.
        layers: of its network, to which the time of a step is nearly proportional.
        step: the last that is done; 0 before the first.
        seconds: a step, by the latest; None before the first.
        seen: how many these were.
    """

    name: str
    steps: int
    layers: int
    step: int = 0
    seconds: float | None = None
    seen: int = 0

    @property
    def left(self) -> float | None:
        """Seconds; None while it is too early to say."""
        if self.seconds is None or self.seen < ENOUGH:
            return None
        return (self.steps - self.step) * self.seconds

    def line(self) -> str:
        """In words."""
        if self.seconds is None:
            return f"{self.name}: no step of {self.steps} yet"
        known = f"{self.name}: step {self.step} of {self.steps}, {self.seconds:.3f} s a step"
        return known if self.left is None else f"{known}, {duration(self.left)} left"


def read_progress(path: Path, *, steps: int, layers: int) -> Progress:
    """Of the run in the folder `path`, which need not be there yet."""
    lines = read_lines(path / "metrics.jsonl")[-LATEST:]
    run = Progress(name=path.name, steps=steps, layers=layers)
    if not lines:
        return run
    seconds = sum(line["seconds"] for line in lines) / len(lines)
    return replace(run, step=lines[-1]["step"], seconds=seconds, seen=len(lines))


def time_left(runs: Sequence[Progress], workers: int) -> float | None:
    """Seconds until all of them are done, `workers` side by side; None while it is too early to
    say. A run without a pace takes, a step and layer, what the others do on average."""
    known = [run.seconds / run.layers for run in runs if run.seconds and run.left is not None]
    if not known:
        return None
    pace = sum(known) / len(known)
    each = [
        run.left if run.left is not None else (run.steps - run.step) * run.layers * pace
        for run in runs
    ]
    return max(sum(each) / workers, *each)


def duration(seconds: float) -> str:
    """Roughly: what is left is not known to the second."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
