"""What forward and backward read at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a global batch with its noise and times, on the device."""

    data: Tensor  # x0 [B, C, H, W]
    noise: Tensor  # x1 [B, C, H, W]
    times: Tensor  # t [B]
    text: Tensor  # [B, T, Dc]
    text_valid: Tensor | None  # [B]
