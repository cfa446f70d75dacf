"""Rotary embedding of image tokens on two axes, and of a clip's on three; text is not rotated."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    rows: int,
    columns: int,
    text_tokens: int,
    head_width: int,
    theta: float,
    device: torch.device,
    frames: int = 1,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [frames·rows·columns + text_tokens, head_width/2] in fp32.

    Of K = head_width, each axis of space has K/4 pairs with frequencies θ^(−2i/(K/2)); the height's
    come first, then the width's. Image tokens are in row-major order, text tokens get angle zero
    (released code).

    In a clip the slowest ⌊K/8⌋ pairs of either axis turn with time as well:

        angle = place·θ^(−2i/(K/2)) + frame·θ^(−j/(2⌊K/8⌋)),  j = 0 … 2⌊K/8⌋ − 1,

    j in the order of these pairs. Space turns them by θ^(−1/2) = 0.01 a patch at most, 0.15 on a
    grid of 16, so they are time's own; at frame 0 nothing is added, so a clip of one frame is a
    picture, bit for bit, and weights trained on pictures read clips. An attention score still
    depends on differences of places alone. (A split into three sets of pairs, as in most video
    models, would give pictures other frequencies. A sum of axes in one angle is the idea of
    RoPE-Mixed, Heo et al., arXiv 2403.13298, whose frequencies are learned.)
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
    if frames > 1:
        image = (_time_angles(frames, head_width, theta, device)[:, None] + image).flatten(0, 1)
    angles = torch.cat((image, image.new_zeros(text_tokens, image.shape[1])))
    return angles.cos(), angles.sin()


def _time_angles(frames: int, head_width: int, theta: float, device: torch.device) -> Tensor:
    """What each frame adds to the angles of its tokens, [frames, head_width/2]."""
    own, axis = head_width // 8, head_width // 4
    steps = torch.arange(2 * own, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(frames, device=device).float(), theta ** (-steps / (2 * own)))
    space = angles.new_zeros(frames, axis - own)  # pairs that turn with space alone
    return torch.cat((space, angles[:, :own], space, angles[:, own:]), dim=1)
