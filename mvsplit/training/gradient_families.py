"""The gradient norm of every layer and family (paper App. F), by a handful of operations.

In the flat buffers the same parameter of successive layers lies at a constant distance. So the
gradients of a family over all layers are one strided view, and their norms one operation at any
depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mvsplit.models import DiT
from mvsplit.training.nonfinite import families
from mvsplit.training.optimizer import FlatGroup, norm_of, over_ranks

FAMILIES = ("Embed", "Q", "K", "V", "Attn_WO", "FFN_W13", "FFN_W2", "gains", "Final")


@dataclass(frozen=True)
class _Band:
    """The gradients of one parameter of every layer, or of the network."""

    family: str
    rows: Tensor  # [L, N], or [1, N] outside the layers


_bands: WeakKeyDictionary[FlatGroup, list[_Band]] = WeakKeyDictionary()


def family_norms(model: DiT, groups: Iterable[FlatGroup]) -> dict[str, Tensor]:
    """L2 norms of the gradients in `groups`, by family: [L] for those that every layer has, [1] for
    Embed and Final. Scalars stay on the device; nothing waits for it. Where parameters are spread
    over ranks, every rank has to call it."""
    groups = list(groups)
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        if group not in _bands:
            _bands[group] = _cut(model, group)
        for band in _bands[group]:
            norms = norm_of(band.rows, dim=1)
            found.setdefault(band.family, []).append(norms)
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
        distances = {b - a for a, b in pairwise(starts)} or {1}
        if len(distances) > 1:
            raise ValueError(f"{names[0]} lies at uneven distances: {sorted(distances)}")
        for family, part in families(model, names[0], _numbers(group, names[0]), rows=0).items():
            part = part[part >= 0]
            if part.numel():  # else another rank holds them
                size, stride = (len(starts), part.numel()), (distances.copy().pop(), 1)
                band = group.grads.as_strided(size, stride, starts[0] + int(part[0]))
            else:
                band = group.grads.new_empty(len(starts), 0)
            bands.append(_Band(family, band))
    return bands


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
