"""Worker processes that end with the process that started them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from types import FrameType

LOOK = 1.0  # seconds between looks for the parent


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; what has not begun when something fails is not begun.

    SIGTERM goes on to the workers, whose runs save themselves and stop, and ends this process with
    status 143. Workers whose parent was killed end within seconds, so that none is left on a GPU.
    """
    parent = (os.getpid(),)
    context = get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_follow, initargs=parent)
    before = _on_sigterm(_pass_on)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        _on_sigterm(before)


def _on_sigterm(handler: object) -> object:
    """Sets what SIGTERM does and gives what it did; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return handler
    return signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in active_children():
        child.terminate()
    raise SystemExit(128 + number)


def _follow(parent: int) -> None:
    """Ends this process, whatever it does, once its parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
