"""Ties the flat buffers of the optimiser to the shards that this rank holds under FSDP2.

FSDP2 keeps each parameter as a DTensor and hands out its gradient as another. The buffers of a
`FlatGroup` then hold this rank's shards, end to end: the values are copied in before an update and
back after it, the gradients are copied in after backward. So the update, the averages and the norms
are the same few operations as in one process, over fewer numbers. The copies read and write a
parameter's bytes twice a step, which is nothing beside a step, and cost the memory of one more set
of weights, divided by the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from mvsplit.diagnostics.ranks import is_distributed


def is_spread(tensor: Tensor) -> bool:
    """Whether this rank holds only a shard of `tensor`."""
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor  # which takes longer to import than this package

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, unless it is spread."""
    return cast(Any, tensor).to_local() if is_spread(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank has to ask for it where it is spread."""
    return cast(Any, tensor).full_tensor() if is_spread(tensor) else tensor


def part_like(whole: Tensor, target: Tensor) -> Tensor:
    """Of a whole tensor, the rows that this rank holds of `target`, which is as large."""
    if not is_spread(target):
        return whole
    first = _first_row(target)
    return whole[first : first + len(local(target))]


class Spread:
    """The parameters whose shards lie in a flat buffer.

    Args:
        parameters: DTensors by name, all on the same mesh.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        first: Any = next(iter(self.parameters.values()))
        self.groups = _sharding_groups(first)
        self._grads: dict[str, Tensor] = {}

    def wrap(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shards by name as DTensors like the parameters, sharing the memory of `parts`."""
        return {name: _like(self.parameters[name], part) for name, part in parts.items()}

    def wrap_rows(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of numbers in a row for each parameter, of which every rank has as many."""
        found = {}
        for name, row in rows.items():
            parameter = self.parameters[name]
            ranks = parameter.numel() // local(parameter).numel()
            found[name] = _like(parameter, row, torch.Size([ranks * len(row)]))
        return found

    @torch.no_grad()
    def pull_values(self, parts: Mapping[str, Tensor]) -> None:
        """Copies the parameters into the buffer's parts."""
        torch._foreach_copy_(list(parts.values()), [local(self.parameters[n]) for n in parts])

    @torch.no_grad()
    def push_values(self, parts: Mapping[str, Tensor]) -> None:
        """The inverse of `pull_values`."""
        torch._foreach_copy_([local(self.parameters[n]) for n in parts], list(parts.values()))

    @torch.no_grad()
    def pull_grads(self, parts: Mapping[str, Tensor]) -> None:
        """Copies the gradients of a backward pass into the buffer's parts, which then are the
        gradients: the tensors that FSDP2 made are let go."""
        if not self._grads:
            self._grads = self.wrap(parts)
        found = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        torch._foreach_copy_([parts[n] for n in found], [local(g) for g in found.values()])
        for name, parameter in self.parameters.items():
            if name not in found:
                parts[name].zero_()
            parameter.grad = self._grads[name]

    def drop_grads(self) -> None:
        """Lets the gradients go; FSDP2 would add to them."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def rows(self, name: str) -> tuple[int, torch.Size]:
        """The first row of a parameter that this rank holds, and the shape of all of it."""
        return _first_row(self.parameters[name]), self.parameters[name].shape


def joined_norms(norms: Sequence[Tensor], groups: Iterable[Any]) -> list[Tensor]:
    """L2 norms of what all ranks of `groups` hold together, from those of each rank's part, each
    [N] or a scalar; the same bits on each. One all-reduce, in fp64, in which nothing overflows."""
    squares = torch.cat([norm.reshape(-1).double().square() for norm in norms])
    for group in groups:
        distributed.all_reduce(squares, group=group)
    parts = squares.sqrt().split([norm.numel() for norm in norms])
    return [part.to(n.dtype).view(n.shape) for part, n in zip(parts, norms, strict=True)]


def _first_row(spread: Any) -> int:
    """The first row of a tensor that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        spread.shape, spread.device_mesh, spread.placements
    )
    return offset[0]


def _sharding_groups(parameter: Any) -> tuple[Any, ...]:
    """The process groups between which a parameter is divided, not those that hold copies."""
    from torch.distributed.tensor import Shard

    mesh, placements = parameter.device_mesh, parameter.placements
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if isinstance(p, Shard))


def _like(parameter: Any, part: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A DTensor with the placement of `parameter`, and its shape or another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape if shape is None else shape,
        stride=parameter.stride() if shape is None else (1,),
    )
