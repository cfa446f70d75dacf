"""Latents to patches and back; for pictures the two orders are those of the released checkpoint.

Shapes: B batch, C channels, F frames, H height, W width of latents; q frames and p pixels of a
patch's sides.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def patchify(latents: Tensor, patch: int, patch_frames: int = 1) -> Tensor:
    """[B, C, H, W] → [B, HW/p², C·p·p], channels ordered (c, p1, p2) as a convolution's weight;
    [B, C, F, H, W] → [B, FHW/qp², C·q·p·p], frame after frame, channels ordered (c, q, p1, p2)."""
    b, c, *frames, h, w = latents.shape
    if not frames:
        grid = latents.reshape(b, c, h // patch, patch, w // patch, patch)
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
    q, count = patch_frames, frames[0] // patch_frames
    grid = latents.reshape(b, c, count, q, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3).flatten(2)


def unpatchify(tokens: Tensor, patch: int, size: Sequence[int], patch_frames: int = 1) -> Tensor:
    """The inverse, to latents of `size`, (H, W) or (F, H, W).

    [B, HW/p², p·p·C] → [B, C, H, W], channels ordered (p1, p2, c), the released head's;
    [B, FHW/qp², q·p·p·C] → [B, C, F, H, W], channels ordered (q, p1, p2, c).
    """
    *frames, h, w = size
    b = tokens.shape[0]
    if not frames:
        channels = tokens.shape[2] // patch**2
        grid = tokens.reshape(b, h // patch, w // patch, patch, patch, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, h, w)
    q, count = patch_frames, frames[0] // patch_frames
    channels = tokens.shape[2] // (q * patch**2)
    grid = tokens.reshape(b, count, h // patch, w // patch, q, patch, patch, channels)
    return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, channels, frames[0], h, w)
