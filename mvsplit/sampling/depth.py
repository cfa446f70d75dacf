"""Depth on demand: a network without the blocks that its pictures miss least.

It is an approximation, off by default. docs/samplers.md has its measured loss, beside that of the
other way to spend less time: fewer steps.

Shapes: L blocks; latents [B, C, H, W], text [B, T, Dc].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.models import DiT


def without_blocks(model: DiT, skipped: Collection[int]) -> DiT:
    """`model` with the blocks `skipped` left out; all weights are shared, `model` stays as it is.

    Raises:
        UserError: there is no such block, or none would be left.
    """
    depth = len(model.blocks)
    wrong = [block for block in skipped if not 0 <= block < depth]
    if wrong:
        raise UserError(f"skipped block {wrong[0]}: the network has the blocks 0 … {depth - 1}")
    kept = [block for i, block in enumerate(model.blocks) if i not in set(skipped)]
    if not kept:
        raise UserError(f"skipping all {depth} blocks leaves no network; leave at least one")
    with torch.device("meta"):  # the parts are those of `model`
        shallow = DiT(replace(model.config, depth=len(kept)))
    for name, part in model.named_children():
        setattr(shallow, name, part)
    shallow.blocks = nn.ModuleList(kept)
    return shallow.train(model.training)


def mean_changes(model: DiT, draw: Callable[[nn.Module], Any]) -> Tensor:
    """‖X_{l+1} − X_l‖/‖X_l‖ of the trunk X by each block, a mean over all evaluations that `draw`
    makes of the network it is given: this one, as no engine for CUDA runs it. [L] fp64, on the CPU.

    Raises:
        UserError: `draw` did not evaluate that network.
    """
    with _recorded_changes(model) as changes:
        draw(_Eager(model))
    if not all(changes):
        raise UserError("depth: the network was not evaluated; evaluate the one that draw is given")
    return torch.stack([torch.stack(of_block).double().mean().cpu() for of_block in changes])


class _Eager(nn.Module):
    """A network whose blocks are called one by one, as hooks on them need it."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, text: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.model(latents, text, valid)


@contextmanager
def _recorded_changes(model: DiT) -> Iterator[list[list[Tensor]]]:
    changes: list[list[Tensor]] = [[] for _ in model.blocks]

    def record(index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = inputs[0].float()
            changes[index].append((output.float() - x).norm() / x.norm())

        return hook

    handles = [b.register_forward_hook(record(i)) for i, b in enumerate(model.blocks)]
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def skip_effects(model: DiT, latents: Tensor, text: Tensor, valid: Tensor | None = None) -> Tensor:
    """‖v − v_l‖/‖v‖, v_l the velocity without block l alone. [L] fp64, on the CPU.

    Costs L/2 evaluations: what lies before the missing block is computed once.
    """
    states: list[tuple[Any, ...]] = []
    handles = [
        block.register_forward_pre_hook(lambda block, inputs: states.append(inputs))
        for block in model.blocks
    ]
    try:
        whole = model(latents, text, valid)
    finally:
        for handle in handles:
            handle.remove()
    effects = []
    for index, (x, *rest) in enumerate(states):
        for block in model.blocks[index + 1 :]:
            x = block(x, *rest)
        velocity = model.read_out(x, latents.shape[2:])
        effects.append((velocity - whole).double().norm() / whole.double().norm())
    return torch.stack(effects).cpu()


def skip_least(model: DiT, count: int, draw: Callable[[nn.Module], Any]) -> tuple[DiT, list[int]]:
    """`model` without the `count` blocks that change the trunk least while `draw` runs, and these.

    Raises:
        UserError: a count that is negative or leaves no block.
    """
    if not count:
        return model, []
    least(torch.zeros(len(model.blocks)), count)  # what is wrong with the count is said first
    skipped = least(mean_changes(model, draw), count)
    return without_blocks(model, skipped), skipped


def least(scores: Tensor, count: int) -> list[int]:
    """The `count` blocks with the lowest scores [L], in order of depth.

    Raises:
        UserError: a count that is negative, or leaves no block.
    """
    if not 0 <= count < len(scores):
        raise UserError(
            f"skip_blocks={count}: must be at least 0 and less than the {len(scores)} blocks"
        )
    return sorted(scores.argsort(stable=True)[:count].tolist())
