"""Processes that are sent signals, and what is left of them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 120.0  # seconds; what is waited for comes in a few, unless the machine is very busy


def wait_until(holds: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Fails where it does not come to hold, or the process ends before."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


class Begun:
    """A process, begun in a group of its own as a terminal begins it."""

    def __init__(self, command: Sequence[str | Path], **environment: str) -> None:
        token = secrets.token_hex(8)
        self._token = f"TOKEN={token}".encode()
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | {"TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def wait_until(self, holds: Callable[[], object]) -> None:
        wait_until(holds, self.process)

    def send(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def insist(self, number: int) -> None:
        """Sends it that until it ends. Two signals at a time would be one."""
        while self.process.poll() is None:
            self.send(number)
            time.sleep(0.1)

    def end(self) -> tuple[int, str, str]:
        """Waits for it; its status and what it wrote."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def left(self) -> list[int]:
        """It and all that it has begun, as far as they are there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self._token in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found


@contextmanager
def begun(command: Sequence[str | Path], **environment: str) -> Iterator[Begun]:
    """Leaves nothing behind, whatever fails."""
    it = Begun(command, **environment)
    try:
        yield it
    finally:
        while left := it.left():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        it.process.communicate()
