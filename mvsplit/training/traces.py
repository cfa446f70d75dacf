"""What a run that ends before its first step takes away again: what it has made itself."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from mvsplit.errors import UserError
from mvsplit.training.nonfinite import NonFiniteError

LOCK = ".lock"
_LOGS = {"metrics.jsonl", "layers.jsonl"}  # empty before the first step
_FILES = {LOCK, "config.json", "environment.json", "events.jsonl", *_LOGS}


class Traces:
    """What is there before a run makes its folder, and the folders above it, at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folders = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._before = self._names()

    def remove_files(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """To be called as the run's folder is left, with its lock still held, by `ExitStack.push`.

        What anybody else may want stays: all of a folder that holds more than a run's beginning, a
        run with a step or a checkpoint, one that was there before, and what an error that is none
        of the user's has left.
        """
        new = self._names() - self._before
        begun = "config.json" in new
        refused = isinstance(exc, UserError) and not isinstance(exc, NonFiniteError)
        if exc is None or (begun and not refused) or "config.json" in self._before:
            return
        if not new - {"checkpoints"} <= _FILES or any(map(self._size, new & _LOGS)):
            return
        try:
            if "checkpoints" in new:
                (self._path / "checkpoints").rmdir()  # fails where one is in it
            for name in new & _FILES:
                (self._path / name).unlink()
        except OSError:
            return

    def remove_folders(self, *error: object) -> None:
        """The same once the lock is free: those that were made and are empty."""
        if error[0] is None:
            return
        try:
            for folder in self._folders:
                folder.rmdir()
        except OSError:
            return

    def _names(self) -> set[str]:
        return {p.name for p in self._path.iterdir()} if self._path.is_dir() else set()

    def _size(self, name: str) -> int:
        return (self._path / name).stat().st_size
