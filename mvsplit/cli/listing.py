"""Lists whose entries are sentences, folded to the terminal: a table would squeeze them."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

_WIDEST = 100  # columns; longer lines are hard to read


def listing(entries: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A heading for each entry and paragraphs under it, no line wider than the terminal.

    Args:
        entries: (heading, paragraphs).
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = []
    for heading, paragraphs in entries:
        for indent, text in (("", heading), *(("  ", text) for text in paragraphs)):
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=indent,
                subsequent_indent="  ",
                break_on_hyphens=False,  # names stay whole
            )
    return "\n".join(lines)
