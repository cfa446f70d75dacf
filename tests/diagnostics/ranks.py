"""Runs a function on several processes of this machine, which talk by gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def on_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (world, folder, function, arguments), nprocs=world)
        results = (Path(folder) / f"{rank}.pt" for rank in range(world))
        return [torch.load(result, weights_only=False) for result in results]


def _run(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
