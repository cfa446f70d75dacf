"""Files that appear whole or not at all, and logs that survive a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvsplit.errors import UserError


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Puts `text` at `path` in one step: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


class JsonLines:
    """A log of one JSON object a line, each line handed to the system before `append` returns.

    Numbers are written so that they read back to the same bits; NaN and infinities appear under
    these names, as Python's json reads them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115, closed below

    def append(self, line: dict[str, Any]) -> None:
        """Raises UserError where the disk is full."""
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free some space, then give the same "
                f"command again"
            ) from error

    def close(self) -> None:
        self._file.close()


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
            parsed.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is not JSON; remove the line or the file"
            ) from error
    return parsed


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a log, in one step, with its complete lines that are wanted."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_lines(path) if wanted(line)]
        write_atomically(path, "".join(kept))
