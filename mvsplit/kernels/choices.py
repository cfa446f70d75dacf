"""Choices made by measurement, kept on the disk: a machine that has chosen chooses the same again,
so a run that goes on in another process computes by the same kernels.

$MVSPLIT_CACHE, or `mvsplit` in the user's cache folder, holds a JSON file for each kind of choice.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$MVSPLIT_CACHE, or `mvsplit` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("MVSPLIT_CACHE", Path(home) / "mvsplit"))


def choice_file(kind: str) -> Path:
    """Where choices of a kind are kept."""
    return cache_folder() / f"{kind}.json"


def recall(kind: str, key: str) -> str | None:
    """What was chosen for `key`; None if nothing was, or if the file cannot be read."""
    return read_choices(choice_file(kind), of=str).get(key)


def remember(kind: str, key: str, choice: str) -> None:
    """Keeps a choice for later processes."""
    keep_choice(choice_file(kind), key, choice, of=str)


def read_choices(path: Path, of: type = object) -> dict[str, Any]:
    """Choices by key, each an instance of `of`; none, which is said, where the file holds anything
    else."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(v, of) for v in found.values()):
            raise ValueError("it holds something else than choices by key")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning(
            "%s cannot be read: it is not read, choices are made anew (%s)", path, error
        )
        return {}


def keep_choice(path: Path, key: str, choice: Any, of: type = object) -> None:
    """Adds a choice to a file, which is written whole or not at all. Where it cannot be written,
    that is said and the choice serves this process only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**read_choices(path, of), key: choice}, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        _logger.warning("%s: the choice is not kept for the next process: %s", path, error)
