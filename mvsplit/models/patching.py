"""Latents to patches and back; the two orders are those of the released checkpoint."""

from __future__ import annotations

from torch import Tensor


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, HW/p², C·p·p], channels ordered (c, p1, p2) as a convolution's weight."""
    b, c, h, w = latents.shape
    grid = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """[B, HW/p², p·p·C] → [B, C, H, W], channels ordered (p1, p2, c), the released head's."""
    b = tokens.shape[0]
    grid = tokens.reshape(b, height // patch, width // patch, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)
