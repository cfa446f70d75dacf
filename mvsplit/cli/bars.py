"""The progress bar of commands that take long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, how_far: ProgressColumn, *, transient: bool = False) -> Progress:
    """What is done, a bar, `how_far` in numbers, and the time left; nothing where the output is no
    terminal. A transient bar goes when it is full."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        how_far,
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )
