"""The progress of commands that take long: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mvsplit.training.progress import PLAIN_INTERVAL


class _PlainLines(Progress):
    """A line every `PLAIN_INTERVAL` seconds, for where no bar can be drawn: none of what takes
    less."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, **options, disable=True)
        self._printed = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        now = time.monotonic()
        if now - self._printed < PLAIN_INTERVAL:
            return
        self._printed = now
        task = self._tasks[task_id]
        seconds = task.time_remaining
        left = "" if seconds is None else f", {TimeRemainingColumn().render(task)} left"
        done = f"{task.completed:,.0f}" if task.total is None else f"{task.percentage:.0f}%"
        line = f"{task.description}: {done}{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_bar(console: Console, how_far: ProgressColumn, *, transient: bool = False) -> Progress:
    """What is done, a bar, `how_far` in numbers, and the time left; where the output is no
    terminal, plain lines. A transient bar goes when it is full."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        how_far,
        TimeRemainingColumn(),
    )
    if not console.is_terminal:
        return _PlainLines(*columns, console=console)
    return Progress(*columns, console=console, transient=transient)
