"""Aspect buckets: the few sizes to which pictures are brought, so that a batch has one shape.

Shapes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from mvsplit.errors import UserError

Shape = tuple[int, int]


def aspect_buckets(resolution: int, multiple: int = 1, max_aspect: float = 1.0) -> list[Shape]:
    """Shapes of about `resolution`² pixels, from the tallest to the widest.

    Args:
        resolution: side of the square among them.
        multiple: of which every side is one.
        max_aspect: largest ratio of the longer side to the shorter; 1 gives the square alone.

    Raises UserError for values that give no shape.
    """
    if multiple < 1 or resolution < 1 or resolution % multiple:
        nearest = max(multiple, round(resolution / max(multiple, 1)) * multiple)
        raise UserError(
            f"resolution={resolution} is not a multiple of {multiple}, as the encoder and the "
            f"buckets need; use {nearest}"
        )
    if max_aspect < 1:
        raise UserError(f"max_aspect={max_aspect}: must be at least 1, which gives squares only")
    shapes = set()
    for short in range(multiple, resolution + 1, multiple):
        long = round(resolution**2 / short / multiple) * multiple
        if long <= max_aspect * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes, key=lambda shape: shape[1] / shape[0])


def nearest_bucket(height: int, width: int, shapes: Sequence[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest to height : width, as a factor; the taller of two."""
    aspect = math.log(width / height)
    return min(shapes, key=lambda shape: (abs(math.log(shape[1] / shape[0]) - aspect), shape[1]))


def fit(picture: Image.Image, shape: Shape) -> Image.Image:
    """The picture at `shape`: scaled until it covers it, without distortion, and its centre cut."""
    height, width = shape
    scale = max(width / picture.width, height / picture.height)
    # In pixels of the picture; but for rounding never more than it has.
    box_width = min(width / scale, picture.width)
    box_height = min(height / scale, picture.height)
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
