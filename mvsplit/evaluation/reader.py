"""Reads pictures of shapes: which objects are there, of which shape and colour, and where.

No network and nothing learned: what the renderer paints is undone step by step, so an answer can be
followed by hand.

1. The background is the median of the border, where no object ever lies.
2. Coverage ĉ of a pixel is the length of its difference from the background along the nearest of
   the palette's directions, in lengths of that direction.
3. Blobs are runs of pixels with ĉ > ⅓ that touch, also diagonally; objects keep two pixels apart.
4. Each of the six shapes is painted, sharp and soft, at the place and in the size that give it the
   blob's first moments, then moved by a few Gauss–Newton steps; the one with the smallest error is
   the answer.
5. The colour is the palette's nearest to the one that fits the picture best by least squares.

A blob that no shape fits, or of a colour that is not in the palette, is an object without a name,
which no caption asks for.

Shapes: B pictures, S pixels a side, N blobs, K = 6 shapes, W pixels a side of a blob's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.data.captions import BACKGROUNDS, COLOURS, SHAPES
from mvsplit.data.render import (
    CROSS_ARM,
    RGB,
    RING_HOLE,
    SQUARE_SIDE,
    TRIANGLE_BASE,
    coverage,
)
from mvsplit.data.scenes import RADII

EDGE = 1 / 3  # coverage from which a pixel belongs to a blob
SPECK = 0.4  # of the area of the smallest object: blobs of less are no objects
MISFIT = 0.12  # Σ(ĉ − template)² / Σ template² from which a blob has no shape
OFF_COLOUR = 0.2  # distance in RGB, each in [0, 1], from which a colour has no name
BLURS = (0.0, 0.02)  # fractions of the side: a picture may be as sharp as rendered, or softer
_ROUNDS = 3  # Gauss–Newton steps
_NUDGE = 0.05  # pixels, of the numerical derivative
_CHUNK = 512  # pictures at a time
# Area and centroid of each shape of radius 1, in the renderer's coordinates (y downwards).
_AREAS = {
    "circle": np.pi,
    "square": 4 * SQUARE_SIDE**2,
    "triangle": (1 + TRIANGLE_BASE) ** 2 * 1.0 / (1 + TRIANGLE_BASE),
    "diamond": 2.0,
    "cross": 8 * CROSS_ARM - 4 * CROSS_ARM**2,
    "ring": np.pi * (1 - RING_HOLE**2),
}
_CENTROIDS = {"triangle": (2 * TRIANGLE_BASE - 1) / 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenObject:
    """One blob. Lengths are fractions of the side; `shape` and `colour` are None where it is like
    none that there are; `misfit` is its error relative to the best template."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    misfit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenPicture:
    """All objects of a picture, in no order that means anything, and its background."""

    objects: tuple[SeenObject, ...]
    background: str | None


def read_pictures(pictures: Tensor) -> list[SeenPicture]:
    """What [B, 3, S, S] in [−1, 1] shows; values outside are cut. S is 32 or more."""
    parts = pictures.split(_CHUNK)
    return [seen for part in parts for seen in _read_chunk(part)]


def _read_chunk(pictures: Tensor) -> list[SeenPicture]:
    rgb = (pictures.float().clamp(-1, 1) + 1) / 2
    side = rgb.shape[-1]
    ground = _grounds(rgb)
    blobs = _blobs(rgb - ground[:, :, None, None], ground)
    seen: list[list[SeenObject]] = [[] for _ in range(len(rgb))]
    if len(blobs.owner):
        for owner, thing in zip(blobs.owner.tolist(), _read_blobs(blobs, side), strict=True):
            seen[owner].append(thing)
    names = _nearest_names(ground, BACKGROUNDS)
    return [
        SeenPicture(objects=tuple(objects), background=name)
        for objects, name in zip(seen, names, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Blobs:
    """N blobs cut out of their pictures."""

    owner: Tensor  # [N] the picture of each
    cover: Tensor  # [N, W, W] coverage, 0 away from the blob
    contrast: Tensor  # [N, 3, W, W] difference from the background, 0 away from the blob
    corner: Tensor  # [N, 2] x, y of the window's first pixel
    ground: Tensor  # [N, 3]


def _grounds(rgb: Tensor) -> Tensor:
    """[B, 3]: the median colour of each border."""
    border = [rgb[:, :, 0], rgb[:, :, -1], rgb[:, :, 1:-1, 0], rgb[:, :, 1:-1, -1]]
    return torch.cat(border, dim=2).median(dim=2).values


def _blobs(contrast: Tensor, ground: Tensor) -> _Blobs:
    side = contrast.shape[-1]
    cover = _cover(contrast, ground)
    labels = _components(cover > EDGE)
    owner, label = _large_ones(labels, cover, side)
    own = labels[owner] == label[:, None, None]  # [N, S, S]
    # The rim, where coverage is small, belongs to it; the next object is two pixels away.
    own = functional.max_pool2d(own.float()[:, None], 3, 1, 1)[:, 0]
    window = min(side, int(np.ceil(2 * (RADII.max() * side + 3))))
    corner = _corners(own * cover[owner], window)
    rows = corner[:, 1, None] + torch.arange(window, device=own.device)
    columns = corner[:, 0, None] + torch.arange(window, device=own.device)
    place = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)  # [N, W·W]
    mine = own.flatten(1).gather(1, place).view(-1, window, window)
    differences = contrast[owner].flatten(2).gather(2, place[:, None].expand(-1, 3, -1))
    return _Blobs(
        owner=owner,
        cover=cover[owner].flatten(1).gather(1, place).view_as(mine) * mine,
        contrast=differences.view(-1, 3, window, window) * mine[:, None],
        corner=corner,
        ground=ground[owner],
    )


def _cover(contrast: Tensor, ground: Tensor) -> Tensor:
    """ĉ [B, S, S]: how far each pixel is from the background towards the colour that explains it
    best, 1 being that colour."""
    palette = torch.tensor([RGB[name] for name in COLOURS], device=ground.device)
    directions = palette[None] - ground[:, None]  # [B, 8, 3]
    squares = directions.square().sum(2)  # [B, 8]
    along = torch.einsum("bkc,bchw->bkhw", directions, contrast) / squares[..., None, None]
    # ‖x − ĉ·d‖² = ‖x‖² − ĉ²·‖d‖²; coverage lies in [0, 1].
    cut = along.clamp(0, 1)
    explained = (2 * cut * along - cut.square()) * squares[..., None, None]
    best = explained.argmax(1, keepdim=True)
    return along.gather(1, best)[:, 0].clamp(0, 1.2)


def _components(mask: Tensor) -> Tensor:
    """[B, S, S] int: pixels of `mask` that touch have the same number, others 0."""
    side = mask.shape[-1]
    numbers = torch.arange(1, side * side + 1, device=mask.device, dtype=torch.float32)
    labels = numbers.view(1, side, side) * mask
    while True:
        spread = functional.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def _large_ones(labels: Tensor, cover: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The picture and the number of every component that is no speck. [N], [N]."""
    pixels = side * side + 1
    flat = labels.flatten(1) + pixels * torch.arange(len(labels), device=labels.device)[:, None]
    mass = torch.zeros(len(labels) * pixels, device=labels.device)
    mass.index_add_(0, flat.flatten(), cover.flatten())
    smallest = min(_AREAS.values()) * (RADII.min() * side) ** 2
    found = (mass > SPECK * smallest).nonzero()[:, 0]
    found = found[found % pixels > 0]  # 0 is the background
    return found // pixels, found % pixels


def _corners(cover: Tensor, window: int) -> Tensor:
    """[N, 2]: the window around each blob's centroid, within the picture."""
    centre = _moments(cover)[:, :2]
    return (centre - window / 2).round().long().clamp(0, cover.shape[-1] - window)


def _moments(cover: Tensor) -> Tensor:
    """Centroid x, y and mass in pixels. [N, W, W] → [N, 3]."""
    place = torch.arange(cover.shape[-1], device=cover.device) + 0.5
    mass = cover.sum((1, 2))
    x, y = (cover.sum(axis) @ place / mass for axis in (1, 2))
    return torch.stack((x, y, mass), 1)


def _read_blobs(blobs: _Blobs, side: int) -> list[SeenObject]:
    sharpness = [_fit(blobs.cover, blur * side) for blur in BLURS]
    geometry, template = (torch.cat(parts, 1) for parts in zip(*sharpness, strict=True))
    error = (template - blobs.cover[:, None]).square().sum((2, 3))
    misfit, best = (error / template.square().sum((2, 3)).clamp_min(1e-6)).min(1)  # of [N, 2·K]
    each = torch.arange(len(best), device=best.device)
    place, painted = geometry[each, best], template[each, best]
    colour = _colour(blobs, painted, misfit < MISFIT)
    names = _nearest_names(colour, COLOURS)
    place = torch.cat((place[:, :2] + blobs.corner, place[:, 2:]), 1) / side
    rows = zip(best.tolist(), misfit.tolist(), names, place.tolist(), strict=True)
    return [
        SeenObject(
            shape=SHAPES[shape % len(SHAPES)] if wrong < MISFIT else None,
            colour=name,
            x=x,
            y=y,
            radius=radius,
            misfit=wrong,
        )
        for shape, wrong, name, (x, y, radius) in rows
    ]


def _fit(cover: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """Geometry (x, y, radius in pixels) [N, K, 3] of each shape that, blurred, comes closest to
    `cover` [N, W, W], and its coverage [N, K, W, W]."""
    geometry = _first_guess(_moments(cover))
    smallest, largest = 0.5 * RADII.min() / RADII.max(), 1.0
    window = cover.shape[-1]
    for _ in range(_ROUNDS):
        geometry = geometry + _gauss_newton(geometry, cover, blur)
        geometry[..., :2].clamp_(0, window)
        geometry[..., 2].clamp_(smallest * window / 4, largest * window)
    return geometry, _paint(geometry, window, blur)


def _first_guess(moments: Tensor) -> Tensor:
    """The geometry of each shape with the given centroid and mass. [N, 3] → [N, K, 3]."""
    areas = torch.tensor([_AREAS[name] for name in SHAPES], device=moments.device)
    drop = torch.tensor([_CENTROIDS.get(name, 0.0) for name in SHAPES], device=moments.device)
    radius = (moments[:, 2:] / areas.float()).sqrt()  # [N, K]
    x = moments[:, :1].expand_as(radius)
    return torch.stack((x, moments[:, 1:2] - drop * radius, radius), 2)


def _gauss_newton(geometry: Tensor, cover: Tensor, blur: float) -> Tensor:
    """The step that a least-squares fit takes at `geometry` [N, K, 3]."""
    window = cover.shape[-1]
    here = _paint(geometry, window, blur)
    nudges = _NUDGE * torch.eye(3, device=cover.device)
    slopes = [
        (_paint(geometry + nudge, window, blur) - _paint(geometry - nudge, window, blur))
        / (2 * _NUDGE)
        for nudge in nudges
    ]
    jacobian = torch.stack(slopes, -1).flatten(2, 3)  # [N, K, W·W, 3]
    error = (cover[:, None] - here).flatten(2)[..., None]  # [N, K, W·W, 1]
    normal = jacobian.mT @ jacobian + 0.1 * torch.eye(3, device=cover.device)
    return torch.linalg.solve(normal, jacobian.mT @ error)[..., 0].clamp(-1, 1)


def _paint(geometry: Tensor, window: int, blur: float) -> Tensor:
    """Coverage [N, K, W, W] of the K shapes at geometry [N, K, 3], painted by the renderer itself,
    then blurred by a Gaussian of `blur` pixels."""
    count, kinds = geometry.shape[:2]
    in_turn = geometry.transpose(0, 1).reshape(-1, 3)  # the renderer wants them sorted by shape
    painted = blurred(coverage(np.full(kinds, count), in_turn, window)[:, None], blur)
    return painted.view(kinds, count, window, window).transpose(0, 1)


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """[B, C, S, S] under a Gaussian of `sigma` pixels; the border goes on outside."""
    if sigma == 0:
        return pictures
    reach = max(1, round(3 * sigma))
    steps = torch.arange(-reach, reach + 1, device=pictures.device)
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights = (weights / weights.sum()).to(pictures.dtype)
    flat = pictures.flatten(0, 1)[:, None]
    wide = functional.pad(flat, (reach,) * 4, mode="replicate")
    rows = functional.conv2d(wide, weights.view(1, 1, 1, -1))
    return functional.conv2d(rows, weights.view(1, 1, -1, 1)).view_as(pictures)


def _colour(blobs: _Blobs, painted: Tensor, fits: Tensor) -> Tensor:
    """[N, 3]: the colour that, painted with the coverage found, is closest to the picture; where no
    shape fits, the mean of the pixels that are covered most."""
    most = (blobs.cover > 0.8 * blobs.cover.amax((1, 2), keepdim=True)).to(painted)
    weight = torch.where(fits[:, None, None], painted, most)
    total = weight.square().sum((1, 2)).clamp_min(1e-6)
    return blobs.ground + (blobs.contrast * weight[:, None]).sum((2, 3)) / total[:, None]


def _nearest_names(colours: Tensor, names: tuple[str, ...]) -> list[str | None]:
    """The name of the nearest, or None where none is near. [N, 3] → N names."""
    palette = torch.tensor([RGB[name] for name in names], device=colours.device)
    distance, nearest = torch.cdist(colours, palette).min(1)
    return [
        names[place] if far < OFF_COLOUR else None
        for place, far in zip(nearest.tolist(), distance.tolist(), strict=True)
    ]
