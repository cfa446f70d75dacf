"""Where commands print their tables."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_WIDTH = 100  # columns where nothing says how many there are


def table_console(*, highlight: bool = True, markup: bool = True) -> Console:
    """A console on standard output, as wide as COLUMNS says, else as the terminal, else 100."""
    asked = os.environ.get("COLUMNS", "")
    width = int(asked) if asked.isdecimal() else 0
    if not width and not sys.stdout.isatty():
        width = _WIDTH
    return Console(highlight=highlight, markup=markup, width=width or None)
