"""Choices made by measurement, kept on the disk: a machine that has chosen chooses the same again,
so a run that goes on in another process computes by the same kernels.

$MVSPLIT_CACHE, or `mvsplit` in the user's cache folder, holds a JSON file for each kind of choice.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$MVSPLIT_CACHE, or `mvsplit` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("MVSPLIT_CACHE", Path(home) / "mvsplit"))


def recall(kind: str, key: str) -> str | None:
    """What was chosen for `key`; None if nothing was, or if the file cannot be read."""
    return _read(cache_folder() / f"{kind}.json").get(key)


def remember(kind: str, key: str, choice: str) -> None:
    """Keeps a choice. Where the folder cannot be written, that is said and the choice serves this
    process only."""
    path = cache_folder() / f"{kind}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(_read(path) | {key: choice}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        _logger.warning("%s: the choice is not kept for the next process: %s", path, error)


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise ValueError("it holds something else than names by key")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be read, choices are made anew: %s", path, error)
        return {}
