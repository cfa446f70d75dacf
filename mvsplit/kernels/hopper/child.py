"""The process in which a kernel is tried that may fault: a fault takes the GPU from its process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


class ChildError(RuntimeError):
    """No such process can be begun."""


def python() -> str:
    """The interpreter. A program that is frozen would begin itself anew instead.

    Raises:
        ChildError: there is none.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise ChildError("this program is no Python that could begin another")
    return sys.executable


def begin(command: Sequence[str]) -> subprocess.Popen[str]:
    """Begins a process that finds the modules which this one finds, with pipes for what it says.

    Raises:
        ChildError: it cannot be started.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.Popen(
            command, env=environment, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise ChildError(f"a process for them cannot be started: {error}") from error
