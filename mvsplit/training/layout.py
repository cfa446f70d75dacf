"""How a run lies on its processes, where `train.parallel.layout` leaves it open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from mvsplit.models import DiTConfig
from mvsplit.training.config import TrainConfig
from mvsplit.training.distributed import from_each, world
from mvsplit.training.gpus import GIB, GPUS, Gpu
from mvsplit.training.step_memory import step_memory

Name = Literal["replicate", "shard"]
_WORDS: dict[Name, str] = {
    "replicate": "every process holds the whole network and updates a part of it",
    "shard": "every process holds a part of each parameter (FSDP2)",
}


@dataclass(frozen=True)
class Layout:
    """What was chosen, and why in a sentence; None where one process is alone."""

    name: Name
    reason: str | None


def choose_layout(
    model: DiTConfig, config: TrainConfig, device: torch.device, tokens: int
) -> Layout:
    """The layout of a run, the same on every rank.

    Args:
        tokens: of the largest piece of a batch on one process, padding included.
    """
    gpu = None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        gpu = replace(GPUS["h200"], memory=total)  # of which only the memory counts
    found = from_each(layout_of(model, config, tokens, gpu, world()))
    return next((layout for layout in found if layout.name == "shard"), found[0])


def layout_of(
    model: DiTConfig, config: TrainConfig, tokens: int, gpu: Gpu | None, ranks: int
) -> Layout:
    """The layout on `ranks` processes with a GPU each, or on a CPU whose memory nobody asks for."""
    parallel = config.parallel
    if ranks == 1:
        return Layout("replicate", None)
    if parallel.layout != "auto":
        return _layout(parallel.layout, "as asked for")
    if parallel.replicas > 1:
        return _layout("shard", f"train.parallel.replicas={parallel.replicas} divides them")
    if gpu is None:
        return _layout("replicate", "which is faster")
    memory = step_memory(model, with_layout(config, "replicate"), tokens, gpu, ranks)
    needs = f"which takes {memory.total / GIB:.0f} of {gpu.memory / GIB:.0f} GiB"
    if memory.fits:
        return _layout("replicate", f"{needs} and is faster")
    return _layout("shard", f"the whole of it, {needs}, does not fit")


def with_layout(config: TrainConfig, name: Name) -> TrainConfig:
    """The configuration with its layout decided; only shards are held in several replicas."""
    replicas = config.parallel.replicas if name == "shard" else 1
    return replace(config, parallel=replace(config.parallel, layout=name, replicas=replicas))


def _layout(name: Name, why: str) -> Layout:
    return Layout(name, f"layout {name}: {_WORDS[name]} ({why})")
