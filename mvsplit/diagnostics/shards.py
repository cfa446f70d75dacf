"""Gradients that are spread over ranks (FSDP2, tensor parallelism), and their exact norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class GradientPart:
    """What this rank holds of a gradient; the ranks of `groups` hold the rest between them."""

    local: Tensor
    groups: tuple[Any, ...] = ()  # process groups; none where all of it is here


def part_of(gradient: Tensor, start: int = 0, stop: int | None = None) -> GradientPart:
    """The rows `start` to `stop` of a gradient, as far as this rank holds them: a view."""
    if distributed.is_available() and distributed.is_initialized():
        # Imported where it can occur only, for the import takes longer than all of this package.
        from torch.distributed.tensor import DTensor

        if isinstance(gradient, DTensor):
            return _part_of_dtensor(gradient, start, stop)
    if gradient.is_sparse:  # an embedding's, of the rows that were read
        gradient = gradient.coalesce().values()
    return GradientPart(gradient[start:stop])


def norms(parts: Sequence[GradientPart]) -> Sequence[Tensor]:
    """The L2 norm of each gradient, half precision in fp32, by few kernels and without waiting.

    Gradients in parts take one all-reduce together, of one number each; every rank of their groups
    has to take part.
    """
    if not parts:
        return ()
    half = any(part.local.dtype in (torch.bfloat16, torch.float16) for part in parts)
    found = list(
        torch._foreach_norm([part.local for part in parts], 2, torch.float32 if half else None)
    )
    spread: dict[tuple[Any, ...], list[int]] = {}
    for i, part in enumerate(parts):
        if part.groups:
            spread.setdefault(part.groups, []).append(i)
    for groups, places in spread.items():
        # fp64, in which the square of no fp32 number overflows.
        squares = torch.stack([found[i].double().square() for i in places])
        for group in groups:
            distributed.all_reduce(squares, group=group)
        for i, norm in zip(places, squares.sqrt().to(found[places[0]].dtype), strict=True):
            found[i] = norm
    return found


def _part_of_dtensor(gradient: Any, start: int, stop: int | None) -> GradientPart:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = gradient.device_mesh, gradient.placements
    if not all(type(placement) in (Shard, Replicate) for placement in placements):
        # Sums that are still to be made, or rows that lie on a rank in several pieces.
        return GradientPart(gradient.full_tensor()[start:stop])
    _, offset = compute_local_shape_and_global_offset(gradient.shape, mesh, placements)
    end = gradient.shape[0] if stop is None else stop
    local = gradient.to_local()[max(0, start - offset[0]) : max(0, end - offset[0])]
    sharded = [i for i, placement in enumerate(placements) if isinstance(placement, Shard)]
    return GradientPart(local, tuple(mesh.get_group(i) for i in sharded))
