"""The memory of a training step by part, before there is a run: the counterpart of `memory_plan`,
which plans from the memory that is free when the first batch arrives.

Units: bytes on one GPU. A part that PyTorch does not count in `max_memory_allocated` is named in
`OUTSIDE`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch

from mvsplit.kernels.block_parts import Recompute
from mvsplit.models import Block, DiT, DiTConfig
from mvsplit.residuals import PostNorm
from mvsplit.training.config import TrainConfig
from mvsplit.training.gpus import Gpu
from mvsplit.training.graphs import NODE_BYTES
from mvsplit.training.memory_plan import (
    PARTS,
    SPARE,
    Plan,
    exchange_bytes,
    kept_bytes,
    make_plan,
)

CONTEXT = 0.5 * 2**30  # of CUDA and its libraries: the process less PyTorch's own and the graph's,
# in the out-of-memory message of benchmarks/results/train_step_h200_2026-11-24.json
OUTSIDE = ("graph", "CUDA context")
# Bytes of optimiser state an element whose weight is bf16 (`kernels/low_adamw`, `split_adamw`).
_LOW_STATE = {"bf16": 1 + 4 / 128 + 1 + 2 / 128, "split": 2 + 4 + 4}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many there are.

    Attributes:
        low: elements of the blocks' matrices, which `train.weights` concerns.
        rest: all others.
    """

    low: int
    rest: int

    @property
    def all(self) -> int:
        return self.low + self.rest


@cache
def count_parameters(config: DiTConfig) -> Parameters:
    """Exact, from networks of one and of two blocks that hold no numbers."""
    one, two = (_counts(config, depth) for depth in (1, 2))
    low, rest = (a + (config.depth - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return Parameters(low=low, rest=rest)


def _counts(config: DiTConfig, depth: int) -> tuple[int, int]:
    with torch.device("meta"):
        model = DiT(replace(config, depth=depth))
    total = sum(p.numel() for p in model.parameters())
    low = sum(
        p.numel() for n, p in model.blocks.named_parameters() if p.ndim == 2 and "rule" not in n
    )
    return low, total - low


@cache
def runs_as_one_node(model: DiTConfig, precision: str) -> bool:
    """Whether the blocks run as one autograd node on a GPU, for which this model is made
    (`Block.runs_as_one_node`)."""
    with torch.device("meta"):
        block = cast(Block, DiT(replace(model, depth=1)).blocks[0])
    rules = (block.rule_attention, block.rule_ffn)
    biased = model.attention_bias or model.ffn_bias
    post = all(isinstance(rule, PostNorm) for rule in rules)
    return precision == "bf16" and post and not biased and model.groups == model.heads


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What a step takes on each GPU.

    Attributes:
        parts: bytes by name, in the order of a table.
        plan: what is computed again.
        as_parts: whether the parts of a block run one by one, of which the figures are rough.
        again: whether such blocks are computed again as a whole.
        available: that the plan may use: all but `SPARE` of the GPU's.
        fits: whether the parts stay within it.
    """

    parts: dict[str, float]
    plan: Plan
    as_parts: bool
    again: bool
    available: float
    fits: bool

    @property
    def levels(self) -> tuple[Recompute, ...]:
        """What the backward of each block computes again."""
        if self.as_parts:
            return ("all" if self.again else "nothing",) * len(self.plan.levels)
        return self.plan.levels

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` will say."""
        return self.total - sum(self.parts.get(name, 0.0) for name in OUTSIDE)


def state_parts(model: DiTConfig, config: TrainConfig, ranks: int = 1) -> dict[str, float]:
    """Weights, gradients, moments and averages: what is there before the first step. Every rank
    has its part of moments and averages; of weights and gradients too, where they are sharded."""
    count = count_parameters(model)
    sharded = ranks > 1 and config.parallel.layout == "shard"
    shards = ranks // config.parallel.replicas
    low = count.low if config.bf16_weights else 0
    full = count.all - low
    copies = 2 if sharded else 1  # the flat buffers hold shards once more (`spread.py`)
    whole = shards if sharded else 1
    return {
        "weights": (2.0 * low + 4.0 * full) * copies / whole,
        "gradients": (2.0 * low + 4.0 * full) / whole,
        "moments": (_LOW_STATE.get(config.weights, 0.0) * low + 8.0 * full) / shards,
        "average (EMA)": 4.0 * count.all / shards if config.ema_decay else 0.0,
    }


def step_memory(
    model: DiTConfig, config: TrainConfig, tokens: int, gpu: Gpu, ranks: int = 1
) -> StepMemory:
    """The memory of a step and its recompute plan.

    Args:
        tokens: of one piece on one GPU, padding included.
        ranks: GPUs that the network lies on, by `train.parallel`; `auto` counts as replicated.
    """
    parts = state_parts(model, config, ranks)
    parts["CUDA context"] = CONTEXT
    parts["exchange"] = float(exchange_bytes(model, config, ranks))
    room = int((1 - SPARE) * gpu.memory - sum(parts.values()))
    plan = make_plan(model, tokens, room)
    if config.recompute != "auto":
        each = kept_bytes(model, config.recompute)
        plan = _fixed(plan, model.depth * tokens * each, config.recompute, room)
    nodes = model.depth * NODE_BYTES
    one_node = runs_as_one_node(model, config.precision)
    kept, again = _kept(model, config, tokens, plan, room, one_node)
    parts["activations"] = kept
    parts["working memory"] = float(plan.working - nodes)
    graphs = ranks == 1 or config.parallel.layout != "shard"
    parts["graph"] = float(nodes if graphs else 0)
    available = (1 - SPARE) * gpu.memory
    return StepMemory(
        parts={name: size for name, size in parts.items() if size},
        plan=plan,
        as_parts=not one_node,
        again=again,
        available=available,
        fits=sum(parts.values()) <= available,
    )


def _fixed(plan: Plan, kept: int, level: Recompute, room: int) -> Plan:
    """The plan of `train.recompute`, the same for every block."""
    fits = kept + plan.working <= room
    return replace(plan, levels=(level,) * len(plan.levels), kept=kept, fits=fits)


def _kept(
    model: DiTConfig, config: TrainConfig, tokens: int, plan: Plan, room: int, one_node: bool
) -> tuple[float, bool]:
    """Bytes of activations, and whether blocks that run by parts are computed again as a whole, as
    `Planner` decides."""
    if one_node:
        return float(plan.kept), False
    bytes_each = 1 if config.precision == "bf16" else 2
    parts = PARTS * tokens * model.depth * kept_bytes(model, "nothing")
    if parts <= room:
        return float(bytes_each * parts), False
    working = PARTS * tokens * kept_bytes(model, "nothing")
    trunk = tokens * model.depth * kept_bytes(model, "all")
    return float(bytes_each * (trunk + working)), True
