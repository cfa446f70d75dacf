"""How much every block keeps between forward and backward, so that a step fits into memory.

A byte that is not kept costs the more time the less a block keeps already (`Recompute`), so the
plan lowers all blocks to one level before it lowers some to the next. Blocks that keep least come
first: when backward reaches them, the others have let go of what they kept.

Units: bytes; a token's share of one block.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch

from mvsplit.kernels.block_parts import RECOMPUTE, Recompute
from mvsplit.models import Block, DiT, DiTConfig
from mvsplit.training.config import TrainConfig
from mvsplit.training.distributed import world
from mvsplit.training.graphs import NODE_BYTES
from mvsplit.training.replicas import STAGING

_logger = logging.getLogger(__name__)
# Of the device's memory, for libraries and for what a graph's own pool takes more: 1000 layers used
# 0.7 GiB more than planned (benchmarks/results/thousand_layers_h200_2026-11-28.json).
SPARE = 0.04
PARTS = 2  # a block that runs part by part, while it is probed, keeps at most so many times more


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the backward of each block computes again, and the bytes that all blocks then keep.

    Attributes:
        levels: a level for each block.
        kept: bytes between forward and backward.
        working: bytes that one block needs in its backward beside them.
        fits: whether both are within what was allowed.
    """

    levels: tuple[Recompute, ...]
    kept: int
    working: int
    fits: bool

    def sentence(self) -> str:
        """What is computed again, for people."""
        counts = Counter(self.levels)
        parts = [f"{counts[level]} × {level}" for level in RECOMPUTE if counts[level]]
        return (
            f"recompute: {', '.join(parts)}; {self.kept / 2**30:.1f} GiB of activations and "
            f"{self.working / 2**30:.1f} GiB to work in"
        )


def kept_bytes(config: DiTConfig, level: Recompute) -> int:
    """Bytes that a block keeps of each token in half precision, its input included
    (`kernels/fused/block.py`)."""
    width, hidden = config.width, config.ffn_width
    heads = config.heads + config.groups
    least = 2 * width + 4  # x, and 1/RMS of the last merge
    more = {
        "all": 0,
        "trunk": 2 * width,  # f of the FFN
        "attention": 2 * width + 4,  # y, and 1/RMS of its merge
        "packed": 2 * 5 * width + 4 * (heads + config.heads),  # q, k, v, mixed, f; statistics
        "nothing": 4 * hidden,
    }
    return least + sum(more[name] for name in RECOMPUTE[RECOMPUTE.index(level) :])


def working_bytes(config: DiTConfig) -> int:
    """Bytes of each token that the backward of one block needs for a while, when it has computed
    everything again."""
    width, hidden = config.width, config.ffn_width
    gradients = 2 * (4 * width + 2 * hidden + hidden + hidden)
    return kept_bytes(config, "nothing") + gradients


def cast_bytes(config: DiTConfig) -> int:
    """Bytes of one block's matrices in half precision."""
    packed = (config.heads + 2 * config.groups) * config.head_width
    return 2 * config.width * (packed + config.width + 3 * config.ffn_width)


def exchange_bytes(model: DiTConfig, config: TrainConfig, ranks: int) -> int:
    """Bytes that the exchange between `ranks` GPUs takes on each during a step, beside the state
    that is there before the first one. Sharded: units that are gathered, their gradients on the
    way, the shards that arrive and, where a batch has several pieces, the gradients that are added
    up until then. Replicated: gradients of bf16 weights on their way, and their sum."""
    if ranks == 1:
        return 0
    if config.parallel.layout != "shard":
        return STAGING + 3 * STAGING // ranks if config.bf16_weights else 0
    parallel, matrices = config.parallel, cast_bytes(model)
    units = 2 + parallel.prefetch if parallel.reshard else -(-model.depth // parallel.unit)
    gathered = units * parallel.unit * matrices
    sent = 2 * parallel.unit * 3 * matrices  # of two units, in half precision and in fp32
    each = 1 if config.bf16_weights else 2
    arrived = each * model.depth * matrices // (ranks // parallel.replicas)
    added_up = 2 * model.depth * matrices if config.accumulate > 1 else 0
    return gathered + sent + arrived + added_up


def make_plan(config: DiTConfig, tokens: int, allowed: int) -> Plan:
    """The plan that computes the least again.

    Args:
        config: the network.
        tokens: of one piece of a batch, padding included.
        allowed: bytes for what is kept and what backward works in.
    """
    depth = config.depth
    each: dict[Recompute, int] = {level: tokens * kept_bytes(config, level) for level in RECOMPUTE}
    ends = tokens * 12 * config.patch_values  # latents, noise, velocity, in fp32
    working = tokens * working_bytes(config) + 2 * cast_bytes(config) + ends + depth * NODE_BYTES
    room = allowed - working - depth * each["all"]
    levels: list[Recompute] = ["all"] * depth
    for less, more in pairwise(RECOMPUTE[::-1]):
        raised = _clamped(room, depth, each[more] - each[less])  # blocks that may keep more
        levels = [less] * (depth - raised) + [more] * raised
        room -= raised * (each[more] - each[less])
        if raised < depth:
            break
    kept = sum(each[level] for level in levels)
    return Plan(
        levels=tuple(levels),
        kept=kept,
        working=working,
        fits=kept + working <= allowed,
    )


def _clamped(room: int, most: int, each: int) -> int:
    return max(0, min(most, room // each))


def allowed_bytes(device: torch.device) -> int:
    """What may still be allocated on a GPU, but for a little."""
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + idle - SPARE * total)


class Planner:
    """Gives the blocks of a model what they may keep, when the first batch shows its shape, and
    again when a larger one comes. On a CPU nothing is computed again."""

    def __init__(self, model: DiT, config: TrainConfig, device: torch.device) -> None:
        self._blocks = cast(Sequence[Block], model.blocks)
        self._config, self._model, self._device = config, model.config, device
        self._tokens = 0

    def before(self, tokens: int) -> None:
        """To be called before the forward pass of a piece of `tokens` tokens."""
        if tokens <= self._tokens or self._device.type != "cuda":
            return
        self._tokens = tokens
        # What was freed while the network was built lies about in pieces that no activation fills:
        # at 1000 layers they cost 4 GiB.
        torch.cuda.empty_cache()
        allowed = allowed_bytes(self._device)
        allowed -= exchange_bytes(self._model, self._config, world())
        if self._config.recompute != "auto":
            levels = [self._config.recompute] * len(self._blocks)
        else:
            plan = make_plan(self._model, tokens, allowed)
            levels = list(plan.levels)
            _logger.info("%s tokens at a time: %s", tokens, plan.sentence())
            if not plan.fits:
                _logger.warning(
                    "%s tokens at a time will hardly fit: raise train.accumulate=%s, or choose "
                    "train.weights=bf16",
                    tokens,
                    self._config.accumulate,
                )
        parts = PARTS * tokens * len(levels) * kept_bytes(self._model, "nothing")
        for block, level in zip(self._blocks, levels, strict=True):
            block.recompute = level
            block.recompute_parts = parts > allowed
