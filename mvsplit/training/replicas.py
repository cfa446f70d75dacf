"""Flat buffers that every rank holds whole: gradients are averaged over the ranks, and of the
update each rank does an equal part and hands it on.

So a step is that of a single process, graphs and all, and two collectives. Moments and averages
exist once over all ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054), in parts that hold
whole parameters; weights and gradients are everywhere, so that whoever looks at a gradient sees
that of the whole batch. What one rank has updated, all have by the same bits.

Precision: fp32 gradients are summed in fp32. Those of bf16 weights are sent as they are, added in
fp32, and rounded once; an all-reduce in bf16 would round after every rank.

N elements of a buffer, R ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, distributed

from mvsplit.training.distributed import from_each, rank, world

STAGING = 2**28  # bytes of bf16 gradients that are on their way at a time


class Replicas:
    """The ranks that hold a buffer each."""

    def __init__(self) -> None:
        self.rank, self.world = rank(), world()

    def part(self, buffer: Tensor) -> Tensor:
        """The part [N / R] of `buffer` [N] that this rank updates."""
        return buffer.view(self.world, -1)[self.rank]

    @torch.no_grad()
    def average_(self, grads: Tensor) -> None:
        """Replaces `grads` [N] by its mean over the ranks."""
        if grads.dtype == torch.bfloat16:
            size = STAGING // grads.element_size() // self.world * self.world
            for chunk in grads.split(size):
                self._average_low_(chunk)
        elif grads.is_cuda:
            distributed.all_reduce(grads, op=distributed.ReduceOp.AVG)
        else:
            distributed.all_reduce(grads)
            grads.div_(self.world)

    def _average_low_(self, chunk: Tensor) -> None:
        """Each rank adds up one part of the chunk, of which the others send theirs."""
        theirs = torch.empty_like(chunk)
        distributed.all_to_all_single(theirs, chunk)
        total = theirs.view(self.world, -1).sum(0, dtype=torch.float32)
        _all_gather(chunk, total.div_(self.world).to(chunk.dtype))

    @torch.no_grad()
    def gather_(self, values: Tensor) -> None:
        """Gives every rank the parts that the others have updated."""
        part = self.part(values)
        _all_gather(values, part if values.is_cuda else part.clone())


def _all_gather(whole: Tensor, part: Tensor) -> None:
    """Under the name that it has had since torch 2.13, or the one before."""
    gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)
    gather(whole, part)


def from_holders(held: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Small tensors by name that this rank wants and another holds, on the CPU. Every rank has to
    call it, with what it holds and what it wants."""
    missing = [name for name in wanted if name not in held]
    asked = {name for names in from_each(missing) for name in names}
    sent = from_each({name: held[name].cpu() for name in asked if name in held})
    return {name: tensor for each in sent for name, tensor in each.items()}


def equal_parts(sizes: Sequence[int], count: int) -> tuple[list[int], int]:
    """Cuts a row of things into `count` runs, the largest as small as possible.

    Returns:
        Where each begins if every run has the room of the largest, and that room.
    """
    low, high = max(max(sizes), -(-sum(sizes) // count)), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if _runs(sizes, middle)[-1][0] < count:
            high = middle
        else:
            low = middle + 1
    return [run * low + start for run, start in _runs(sizes, low)], low


def _runs(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """The run that each belongs to and its place there, where a run is as long as `room` allows."""
    found, run, end = [], 0, 0
    for size in sizes:
        if end + size > room:
            run, end = run + 1, 0
        found.append((run, end))
        end += size
    return found
