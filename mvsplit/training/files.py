"""Files that appear whole or not at all, and logs that survive a kill at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvsplit.data.atomic import fsync, write_atomically
from mvsplit.errors import UserError

__all__ = ["JsonLines", "NoLines", "fsync", "keep_lines", "read_lines", "write_atomically"]


class JsonLines:
    """A log of one JSON object a line, each line handed to the system before `append` returns.

    Numbers are written so that they read back to the same bits; NaN and infinities appear under
    these names, as Python's json reads them.

    Args:
        path: created if it does not exist.
        lines: how many it holds; `lines` counts on from there.
    """

    def __init__(self, path: Path, lines: int = 0) -> None:
        self.path, self.lines = path, lines
        # Unbuffered: what a full disk refused is not tried again, and refused again, by `close`.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed below

    def append(self, line: dict[str, Any]) -> None:
        """Raises UserError where the disk is full."""
        left = (json.dumps(line) + "\n").encode()
        try:
            while left:  # the last bytes of a disk take a part of a line
                left = left[self._file.write(left) :]
            self.lines += 1
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free some space, then give the same "
                f"command again"
            ) from error

    def close(self) -> None:
        self._file.close()


class NoLines(JsonLines):
    """A log that somebody else writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, 0

    def append(self, line: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a last line that a kill cut off is left out, as is a log that
    does not exist yet.

    Raises:
        UserError: a line before the last is not a JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    parsed = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is cut off
        try:
            parsed.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is not a JSON object; remove the line or the file"
            ) from error
    return parsed


def keep_lines(path: Path, count: int | None) -> int:
    """Rewrites a log, in one step, with its first `count` lines, or all that are complete if None;
    says how many it has then."""
    if not path.exists():
        return 0
    kept = read_lines(path)[:count]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return len(kept)
