"""Latents to patches and back; the two orders are those of the released checkpoint."""

from __future__ import annotations

from torch import Tensor


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, HW/p², C·p·p], channels ordered (c, p1, p2) as a convolution's weight."""
    b, c, h, w = latents.shape
    grid = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """[B, HW/p², p·p·C] → [B, C, H, W], channels ordered (p1, p2, c), the released head's."""
    b = tokens.shape[0]
    channels = tokens.shape[2] // patch**2
    grid = tokens.reshape(b, height // patch, width // patch, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, height, width)
