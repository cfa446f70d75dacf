"""`mvsplit train` on several processes of this machine, as torchrun would start them.

Like torchrun's agent, this process keeps the store through which they meet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.training import runs

_stores: list[TCPStore] = []  # which live as long as this process


def start(
    arguments: list[str], world: int, hook: Any = None, log: Path | None = None
) -> list[BaseProcess]:
    """Begins `mvsplit ARGUMENTS` on `world` processes, each of which first calls `hook(rank)`; what
    they say is added to `log`."""
    return _start(world, _run_rank, arguments, hook, log)


def call(function: Callable[..., None], world: int, *args: Any) -> None:
    """Calls `function(*args)` on `world` processes, all of which have to end well."""
    assert finish(_start(world, _call, function, args)) == [0] * world


def _start(world: int, target: Callable[..., None], *args: Any) -> list[BaseProcess]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    processes: list[BaseProcess] = [
        runs.PROCESSES.Process(target=target, args=(rank, world, store.port, *args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], within: float = 120) -> list[int | None]:
    """The exit statuses of the processes; what still runs after so many seconds is killed."""
    for process in processes:
        process.join(within)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{process} was still running")
    return [process.exitcode for process in processes]


def train(arguments: list[str], world: int, **options: Any) -> list[int | None]:
    """`mvsplit train tiny ARGUMENTS` to its end; the exit status of each process."""
    return finish(start(["train", "tiny", *arguments], world, **options))


def _call(
    rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    _join(rank, world, port)
    torch.set_num_threads(1)
    function(*args)


def _run_rank(
    rank: int, world: int, port: int, arguments: list[str], hook: Any, log: Path | None
) -> None:
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
    _join(rank, world, port)
    if hook is not None:
        hook(rank)
    runs.run_command(arguments)


def _join(rank: int, world: int, port: int) -> None:
    """What torchrun tells its processes."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
