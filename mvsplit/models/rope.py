"""Two-axis rotary embedding for image tokens; text tokens are not rotated."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    rows: int, columns: int, text_tokens: int, head_width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [rows·columns + text_tokens, head_width/2] in fp32.

    Each axis has head_width/4 frequencies θ^(−2i/(head_width/2)); the height's come first, then
    the width's. Image tokens are in row-major order, text tokens get angle zero (released code).
    """
    axis_width = head_width // 2
    steps = torch.arange(0, axis_width, 2, device=device, dtype=torch.float32)
    frequencies = theta ** (-steps / axis_width)
    height = torch.outer(torch.arange(rows, device=device).float(), frequencies)
    width = torch.outer(torch.arange(columns, device=device).float(), frequencies)
    image = torch.cat(
        (
            height[:, None].expand(rows, columns, -1),
            width[None].expand(rows, columns, -1),
        ),
        dim=-1,
    ).flatten(0, 1)
    angles = torch.cat((image, image.new_zeros(text_tokens, image.shape[1])))
    return angles.cos(), angles.sin()
