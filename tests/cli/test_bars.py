"""Progress of long commands where the output is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn

from mvsplit.cli import bars, main
from mvsplit.cli.bars import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_where_there_is_no_terminal(clock):
    console = Console(file=io.StringIO())
    with progress_bar(console, MofNCompleteColumn()) as bar:
        bar.get_time = lambda: clock[0]
        task = bar.add_task("drawing [x]", total=50)
        for _ in range(25):
            clock[0] += 1
            bar.advance(task, 2)
    lines = console.file.getvalue().splitlines()
    assert lines == ["drawing [x]: 40%, 0:00:15 left", "drawing [x]: 80%, 0:00:05 left"]


def test_what_is_done_at_once_says_nothing(clock):
    console = Console(file=io.StringIO())
    with progress_bar(console, MofNCompleteColumn()) as bar:
        bar.advance(bar.add_task("drawing", total=1))
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_help_says_that_one_thread_may_be_faster(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "a narrow network is often faster with OMP_NUM_THREADS=1" in shown
