"""What `parallel_step.py` measures beside steps: the exchange between GPUs, and saves."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_parts import Trainer, seconds, synchronise
from torch import distributed

from mvsplit.training.checkpoint import Snapshot, list_checkpoints, load_latest
from mvsplit.training.checkpoint_saver import Saver
from mvsplit.training.distributed import from_each, rank, world
from mvsplit.training.pieces import Piece
from mvsplit.training.replicas import Replicas

TARGET = 0.02  # of the time of the steps between two saves
SAVES_EVERY = 1000  # steps, as `TrainConfig.save_every`


def exchange_errors(device: str) -> dict[str, Any]:
    """The mean over the ranks of numbers that each draws, beside that in fp64, in units of what the
    sum in fp32 and, of bf16 numbers, one rounding may be off."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        grads = drawn(rank(), dtype, device)
        Replicas().average_(grads)
        each = torch.stack([drawn(r, dtype, device).double() for r in range(world())])
        allowed = torch.finfo(torch.float32).eps / 2 * each.abs().sum(0)
        if dtype == torch.bfloat16:
            allowed += torch.finfo(dtype).eps / 2 * each.mean(0).abs()
        found[str(dtype)] = float(((grads.double() - each.mean(0)).abs() / allowed).max())
    return {"in_roundings": found, "passed": all(error <= 1 for error in found.values())}


def drawn(number: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(number)
    length = 1000 * 1009 * world()
    return torch.randn(length, generator=generator, device=device).to(dtype)


def link_rates(device: str, size: int = 2**30) -> dict[str, Any]:
    """Bytes a second that each GPU sends, for messages of a gibibyte: of all-reduce, 2 (R − 1) / R
    of the bytes, and so for an average in bf16 by the way of `Replicas`."""
    if world() == 1 or device == "cpu":
        return {}
    replicas, there = Replicas(), (world() - 1) / world()
    full = torch.ones(size // 4, device=device)
    low = torch.ones(size // 2, device=device, dtype=torch.bfloat16)
    runs: dict[str, tuple[float, Callable[[], Any]]] = {
        "all-reduce fp32": (2, lambda: replicas.average_(full)),
        "all-reduce bf16": (2, lambda: distributed.all_reduce(low)),
        "average bf16": (2, lambda: replicas.average_(low)),
        "all-gather": (1, lambda: replicas.gather_(low)),
    }
    found = {}
    for name, (ways, run) in runs.items():
        took = statistics.median([seconds(run) for _ in range(7)][2:])
        found[name] = ways * there * size / took
    return found


def snapshot_of(trainer: Trainer, step: int) -> Snapshot:
    """What a run saves of its tensors."""
    optimizer = trainer.optimizer
    tensors = {
        "model": optimizer.mine(trainer.model.state_dict()),
        "optimizer": optimizer.moments(),
    }
    values = {"updates": optimizer.updates(), "sums": sums(trainer)}
    return Snapshot(step=step, tensors=tensors, values=values, sharded=world() > 1)


def sums(trainer: Trainer) -> dict[str, float]:
    """Of the bits of all weights and of all moments, as whole numbers: exact in any order."""
    weights = sum(_sum(v.data) for v in trainer.model.state_dict().values())
    moments = sum(from_each(sum(_sum(v) for v in trainer.optimizer.moments().values())))
    return {"weights": weights, "moments": moments}


def _sum(tensor: torch.Tensor) -> int:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return int(tensor.contiguous().view(bits).sum(dtype=torch.int64))


def save_and_step(
    trainer: Trainer, parts: list[Piece], folder: Path, window: int
) -> dict[str, Any]:
    """Windows of steps without and with a save that begins with them. Learning, so that a save
    that is not of its moment is found out when it is read."""
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    from_each(None)
    for _ in range(2):
        trainer.step(parts, lr=1e-4)

    def steps() -> None:
        for _ in range(window):
            trainer.step(parts, lr=1e-4)

    with Saver(folder, keep=1) as saver:
        first = seconds(lambda: saver.begin(snapshot_of(trainer, 1)))  # takes its memory
        began = time.perf_counter()
        from_each(saver.wait())
        wrote = time.perf_counter() - began
        without = seconds(steps)
        snapshot = snapshot_of(trainer, 2)
        began = time.perf_counter()
        synchronise()
        saver.begin(snapshot)
        copied = time.perf_counter() - began
        steps()
        synchronise()
        within = time.perf_counter() - began
        from_each(saver.wait())
        written = time.perf_counter() - began
    path = list_checkpoints(folder)[-1]
    each = without / window
    return {
        "checkpoint_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "processes": world(),
        "layers": len(trainer.model.blocks),
        "steps_in_a_window": window,
        "seconds_without": without,
        "seconds_with": within,
        "seconds_of_the_copy": copied,
        "seconds_of_the_first_copy": first,
        "seconds_of_the_first_write": wrote,
        "seconds_until_written": written,
        "cost_of_a_save_in_steps": (within - without) / each,
        "by_the_clock": within / without - 1,
        "by_the_clock_if_every_1000": (within - without) / each / SAVES_EVERY,
        "target": TARGET,
    }


def saved_again(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Reads a checkpoint that any number of processes wrote; its bits must be those of then."""
    began = time.perf_counter()
    snapshot, _ = load_latest(folder)
    assert snapshot is not None
    verified = time.perf_counter() - began
    snapshot.copy_to("model", dict(trainer.model.state_dict()))
    snapshot.copy_to("optimizer", trainer.optimizer.moments())
    trainer.optimizer.set_updates(snapshot.values["updates"])
    same = sums(trainer) == snapshot.values["sums"]
    took = time.perf_counter() - began
    loss, norm = trainer.step([trainer.piece(2, rank())])
    return {
        "processes": world(),
        "seconds": took,
        "seconds_of_the_checksums": verified,
        "same_bits": same,
        "loss": statistics.fmean(from_each(loss)),
        "norm": norm,
        "passed": same,
    }
