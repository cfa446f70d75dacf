"""How wide the tables of commands are."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mvsplit.cli import main
from mvsplit.cli.tables import table_console
from tests.training import flights


@pytest.mark.parametrize(
    ("columns", "width"), [("140", 140), ("72", 72), (None, 100), ("", 100), ("wide", 100)]
)
def test_columns_says_how_wide_where_there_is_no_terminal(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert table_console().width == width


@pytest.mark.parametrize(("columns", "width"), [(None, 83), ("61", 61)])
def test_a_terminal_is_as_wide_as_it_is_unless_columns_says_otherwise(
    columns: str | None, width: int
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 83, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm"} | ({} if columns is None else {"COLUMNS": columns})
    code = "from mvsplit.cli.tables import table_console as t; import sys; sys.exit(t().width)"
    ended = subprocess.run([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == width


@pytest.mark.parametrize(("columns", "whole"), [("100", False), ("130", True)])
def test_explain_is_as_wide(
    columns: str,
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    flight = flights.fly(tmp_path, flights.plain(), flights.nothing)
    assert main(["explain", str(flight)]) == 0
    said = capsys.readouterr().out
    assert ("MV-Split on attention and the FFN" in said) is whole
