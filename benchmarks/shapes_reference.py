"""Paints one scene pixel by pixel in fp64: the plain truth for `mvsplit.data.render`.

It takes the scene's description, not the table, and shares with the renderer only the palette and
the rule that a pixel is covered by ½ - d, cut to [0, 1], d being the signed distance of its centre
from the outline. Outlines are vertex lists and radii.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvsplit.data.render import RGB
from mvsplit.data.scenes import Scene, SceneObject

# Corners in radii, clockwise on the screen (y grows downwards).
_SQUARE = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
_TRIANGLE = [(0, -1), (1, 0.8), (-1, 0.8)]
_DIAMOND = [(0, -1), (1, 0), (0, 1), (-1, 0)]
_BAR = [(-1, -0.34), (1, -0.34), (1, 0.34), (-1, 0.34)]
_POST = [(-0.34, -1), (0.34, -1), (0.34, 1), (-0.34, 1)]
_POLYGONS = {  # a shape is the union of its convex polygons
    "square": [_SQUARE],
    "triangle": [_TRIANGLE],
    "diamond": [_DIAMOND],
    "cross": [_BAR, _POST],
}


def paint_scene(scene: Scene, size: int) -> Tensor:
    """The picture [3, size, size] float64 in [-1, 1]."""
    picture = torch.empty(3, size, size, dtype=torch.float64)
    for row in range(size):
        for column in range(size):
            picture[:, row, column] = torch.tensor(_pixel(scene, size, column + 0.5, row + 0.5))
    return picture


def _pixel(scene: Scene, size: int, px: float, py: float) -> list[float]:
    colour = [2 * value - 1 for value in RGB[scene.background]]
    for thing in scene.objects:
        cover = min(1.0, max(0.0, 0.5 - _distance(thing, size, px, py)))
        ink = [2 * value - 1 for value in RGB[thing.colour]]
        colour = [below + cover * (above - below) for below, above in zip(colour, ink, strict=True)]
    return colour


def _distance(thing: SceneObject, size: int, px: float, py: float) -> float:
    """Signed distance in pixels of the point (px, py) from the outline of `thing`."""
    dx, dy, radius = px - thing.x * size, py - thing.y * size, thing.radius * size
    if thing.shape == "circle":
        return math.hypot(dx, dy) - radius
    if thing.shape == "ring":
        return max(math.hypot(dx, dy) - radius, 0.55 * radius - math.hypot(dx, dy))
    polygons = _POLYGONS[thing.shape]
    return min(_polygon_distance(polygon, dx, dy, radius) for polygon in polygons)


def _polygon_distance(corners: list, dx: float, dy: float, radius: float) -> float:
    """The largest signed distance from the lines through the edges."""
    edges = zip(corners, corners[1:] + corners[:1], strict=True)
    return max(_line_distance(a, b, dx / radius, dy / radius) for a, b in edges) * radius


def _line_distance(a: tuple, b: tuple, x: float, y: float) -> float:
    """Distance of (x, y) from the line a → b, positive on its left on the screen: outside."""
    ex, ey = b[0] - a[0], b[1] - a[1]
    return ((x - a[0]) * ey - (y - a[1]) * ex) / math.hypot(ex, ey)
