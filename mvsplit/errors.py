"""The one exception a user is meant to read, and the spelling help that goes with it.

This module imports nothing of the package, so that every folder may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NEAR = 0.6  # difflib's ratio; at 0.5 "nonsense" is near "finetune"


class UserError(Exception):
    """Something the caller can put right: the message names the field, the value and the remedy.

    The command line prints it as one line, without a traceback, and exits with status 2. It is no
    ValueError: tyro prints those itself, in a box of several lines.
    """


def nearest(
    name: str,
    known: Iterable[str],
    *,
    listed: Iterable[str] | None = None,
    cutoff: float = _NEAR,
) -> str:
    """Says which known names are closest to `name`, for the end of an error message.

    Args:
        name: what was given.
        known: what could have been.
        listed: what is named where nothing is close, if `known` is too long for that.
        cutoff: difflib's ratio from which on a name is close.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of: {', '.join(known if listed is None else sorted(listed))}"


def nearest_of_all(name: str, known: Iterable[str]) -> str:
    """`nearest`, and all of the known names also where some are close."""
    known = sorted(known)
    near = nearest(name, known)
    return f"{near} known: {', '.join(known)}" if near.startswith("did you mean") else near


def runs_near(path: Path) -> list[str]:
    """The run folders beside `path` and in runs/: a model of others has a config.json too."""
    logs = [*path.parent.glob("*/metrics.jsonl"), *Path("runs").glob("*/metrics.jsonl")]
    return sorted({str(log.parent) for log in logs if (log.parent / "config.json").exists()})


def nearest_run(path: Path) -> str:
    """Says which run may be meant by a `path` that is none, for the end of an error message."""
    known = runs_near(path)
    return nearest(str(path), known) if known else "train one first: mvsplit train tiny"


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around an import: a missing package becomes a UserError that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; it comes with the extra {extra!r}: "
            f"pip install 'mvsplit[{extra}]'"
        ) from error
