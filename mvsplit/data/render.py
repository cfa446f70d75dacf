"""Paints tables of scenes, many at once, anti-aliased, on any device.

A pixel's coverage by an object is ½ − d, cut to [0, 1], where d is the signed distance in pixels of
its centre from the outline (negative inside; straight outlines are continued past their corners).

Shapes: N objects, B scenes, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mvsplit.data.captions import BACKGROUNDS, COLOURS, SHAPES
from mvsplit.data.scenes import SLOTS, SceneTable

RGB = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (1.00, 0.92, 0.10),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.50, 0.10, 0.70),
    "pink": (1.00, 0.45, 0.75),
    "black": (0.00, 0.00, 0.00),
    "gray": (0.50, 0.50, 0.50),
    "white": (1.00, 1.00, 1.00),
    "brown": (0.36, 0.22, 0.12),
}

SQUARE_SIDE = 0.9  # half the side of a square, in radii
TRIANGLE_BASE = 0.8  # how far below the centre the base lies, in radii; the apex is 1 above it
CROSS_ARM = 0.34  # half the width of a cross's arms, in radii
RING_HOLE = 0.55  # radius of a ring's hole, in radii

# Scenes painted at a time: few enough for the intermediate pictures to stay in a core's cache.
_CHUNK = 64


def render(table: SceneTable, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Pictures [B, 3, S, S] float32 in [-1, 1], S = `size`, of the B scenes of `table`."""
    palette = torch.tensor([RGB[name] for name in COLOURS], device=device) * 2 - 1
    grounds = torch.tensor([RGB[name] for name in BACKGROUNDS], device=device) * 2 - 1
    ground = grounds[torch.from_numpy(table.background).to(device)]  # [B, 3]
    pictures = ground[:, :, None, None].expand(-1, -1, size, size).contiguous()
    for start in range(0, len(table.count), _CHUNK):
        rows = slice(start, start + _CHUNK)
        owner, kinds, colour, geometry = _objects(table, rows, device)
        cover = coverage(kinds, geometry * size, size)  # [N, S, S]
        contrast = palette[colour] - ground[rows][owner]  # [N, 3]
        # Objects never share a pixel, so the sum has one term at most that is not zero and does
        # not depend on the order of its terms.
        pictures[rows].index_add_(0, owner, cover[:, None] * contrast[:, :, None, None])
    return pictures


def _objects(
    table: SceneTable, rows: slice, device: torch.device | str
) -> tuple[Tensor, np.ndarray, Tensor, Tensor]:
    """The objects of the scenes `rows`, sorted by shape.

    Returns their scene within `rows` [N], how many there are of each shape, their colours [N] and
    (x, y, radius) [N, 3] as fractions of the side.
    """
    used = np.arange(SLOTS) < table.count[rows, None]
    shape = table.shape[rows][used]
    order = np.argsort(shape, kind="stable")
    geometry = np.concatenate([table.centre[rows][used], table.radius[rows][used][:, None]], axis=1)
    return (
        torch.from_numpy(np.nonzero(used)[0][order]).to(device),
        np.bincount(shape, minlength=len(SHAPES)),
        torch.from_numpy(table.colour[rows][used][order]).to(device),
        torch.from_numpy(geometry[order].astype(np.float32)).to(device),
    )


def coverage(kinds: np.ndarray, geometry: Tensor, size: int) -> Tensor:
    """[N, S, S] from (x, y, radius) [N, 3] in pixels; `kinds[k]` objects of SHAPES[k] in turn."""
    pixel = torch.arange(size, device=geometry.device, dtype=geometry.dtype) + 0.5  # centres
    dx = pixel[None, None, :] - geometry[:, 0, None, None]  # [N, 1, S]
    dy = pixel[None, :, None] - geometry[:, 1, None, None]  # [N, S, 1]
    radius = geometry[:, 2, None, None]  # [N, 1, 1]
    cover = torch.empty(len(geometry), size, size, device=geometry.device)
    start = 0
    for name, number in zip(SHAPES, kinds.tolist(), strict=True):
        part = slice(start, start := start + number)
        cover[part] = _DISTANCES[name](dx[part], dy[part], radius[part])
    return cover.neg_().add_(0.5).clamp_(0, 1)


def _circle(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return (dx * dx + dy * dy).sqrt_().sub_(radius)


def _square(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()).sub_(SQUARE_SIDE * radius)


def _triangle(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Apex (0, -r), base from (-r, br) to (r, br), b = TRIANGLE_BASE."""
    rise = 1 + TRIANGLE_BASE
    side = dx.abs() * rise - (dy + radius)
    return torch.maximum(side.div_(math.hypot(rise, 1)), dy - TRIANGLE_BASE * radius)


def _diamond(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return (dx.abs() + (dy.abs() - radius)).mul_(math.sqrt(0.5))


def _cross(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """The union of two bars."""
    ax, ay, arm = dx.abs(), dy.abs(), CROSS_ARM * radius
    return torch.minimum(torch.maximum(ax - radius, ay - arm), torch.maximum(ax - arm, ay - radius))


def _ring(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    middle, half = (1 + RING_HOLE) / 2 * radius, (1 - RING_HOLE) / 2 * radius
    return (dx * dx + dy * dy).sqrt_().sub_(middle).abs_().sub_(half)


_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
