"""The gradient norm of every layer and family (paper App. F), by a handful of operations.

In the flat buffers the same parameter of successive layers lies at a constant distance. So the
gradients of a family over all layers are one strided view, and their norms one operation at any
depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mvsplit.models import DiT
from mvsplit.training.nonfinite import families
from mvsplit.training.optimizer import FlatGroup, counted_once, norm_of, over_ranks

FAMILIES = ("Embed", "Q", "K", "V", "Attn_WO", "FFN_W13", "FFN_W2", "LoRA_A", "gains", "Final")


@dataclass(frozen=True)
class _Band:
    """The gradients of one parameter of the layers that learn it, or of the network.

    Attributes:
        runs: [n, N] each, of n layers at a constant distance in the buffer.
        layers: where they belong among all; None where there are no others.
        depth: all of them, or 1 for a parameter of the network.
    """

    family: str
    runs: list[Tensor]
    layers: Tensor | None
    depth: int

    def norms(self) -> Tensor:
        """[depth], 0 where the parameter is frozen."""
        each = torch.cat([norm_of(rows, dim=1) for rows in self.runs])
        if self.layers is None:
            return each
        return each.new_zeros(self.depth).index_copy_(0, self.layers, each)


_bands: WeakKeyDictionary[FlatGroup, list[_Band]] = WeakKeyDictionary()


def family_norms(model: DiT, groups: Iterable[FlatGroup]) -> dict[str, Tensor]:
    """L2 norms of the gradients in `groups`, by family: [L] for those that layers have, [1] for
    Embed and Final; families that are frozen are left out. Scalars stay on the device; nothing
    waits for it. Where parameters are spread over ranks, every rank has to call it."""
    groups = list(groups)
    found: dict[str, list[Tensor]] = {}
    for group, counts in counted_once(groups):
        if group not in _bands:
            _bands[group] = _cut(model, group)
        for band in _bands[group]:
            found.setdefault(band.family, []).append(band.norms() * counts)
    names = [family for family in FAMILIES if family in found]
    here = [torch.linalg.vector_norm(torch.stack(found[name]), dim=0) for name in names]
    return dict(zip(names, over_ranks(groups, here), strict=True))


def _cut(model: DiT, group: FlatGroup) -> list[_Band]:
    """The bands of a group."""
    same: dict[str, list[str]] = {}  # the names of one parameter, from the first layer to the last
    for name in group.places:
        same.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(name)
    bands = []
    for names in same.values():
        starts = [group.places[name][0] for name in names]
        layers = [int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))]
        depth = model.config.depth if layers else 1
        where = None
        if len(names) < depth:
            where = torch.tensor(layers, device=group.grads.device)
        for family, part in families(model, names[0], _numbers(group, names[0]), rows=0).items():
            part = part[part >= 0]
            if part.numel():  # else another rank holds them
                runs = [
                    group.grads.as_strided((n, part.numel()), (distance, 1), start + int(part[0]))
                    for start, distance, n in _runs(starts)
                ]
            else:
                runs = [group.grads.new_empty(len(starts), 0)]
            bands.append(_Band(family, runs, where, depth))
    return bands


def _runs(starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Rising places as runs of a constant distance: the first, the distance, and how many."""
    begin = 0
    while begin < len(starts):
        end = begin + 1
        distance = starts[end] - starts[begin] if end < len(starts) else 1
        while end < len(starts) and starts[end] - starts[end - 1] == distance:
            end += 1
        yield starts[begin], distance, end - begin
        begin = end


def _numbers(group: FlatGroup, name: str) -> Tensor:
    """The places of a parameter's numbers after its first one, to find where a family's rows lie;
    -1 for numbers that other ranks hold."""
    shape = group.places[name][1]
    numbers = torch.arange(shape.numel()).view(shape)
    if group.spread is None:
        return numbers
    first, whole = group.spread.rows(name)
    held = torch.full(whole, -1)
    held[first : first + len(numbers)] = numbers
    return held
