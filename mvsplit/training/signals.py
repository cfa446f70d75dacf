"""SIGTERM and Ctrl-C: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mvsplit.training.distributed import launched_world


class StopSignal:
    """Notes the first SIGTERM or SIGINT instead of dying of it; a second one has its usual effect.

    Under torchrun a second one has none: a terminal or a cluster signals all processes, and
    torchrun hands on what it got itself. It kills what is not gone after its `--shutdown-timeout`.

    Outside of the main thread, where Python allows no handlers, it notes nothing.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if launched_world() == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
