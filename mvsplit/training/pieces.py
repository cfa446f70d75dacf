"""What forward and backward read at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TEXT_LENGTHS = 16  # text is padded to a multiple of so many tokens on a GPU


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a global batch with its noise and times, on the device."""

    data: Tensor  # x0 [B, C, H, W]
    noise: Tensor  # x1 [B, C, H, W]
    times: Tensor  # t [B]
    text: Tensor  # [B, T, Dc]
    text_valid: Tensor | None  # [B]
    parts: Tensor | None = None  # how many such pieces the batch has, []
    rejected: Tensor | None = None  # x0 [B, C, H, W] of pairs, to which `data` was preferred


def cut(samples: int, pieces: int) -> Iterator[slice]:
    """The rows of so many pieces, as equal as they can be, the larger first: a graph of those has
    room for the others."""
    size, larger = divmod(samples, pieces)
    start = 0
    for number in range(pieces):
        end = start + size + (number < larger)
        yield slice(start, end)
        start = end


def padded(text: int) -> int:
    """The tokens of `text` with that padding."""
    return -(-text // TEXT_LENGTHS) * TEXT_LENGTHS


def in_few_lengths(text: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, T, Dc] with masked padding to a multiple of `TEXT_LENGTHS` tokens, and the real
    tokens of each sample [B]. It changes no result, and a run meets few shapes, for each of which
    a graph is recorded and attention is chosen."""
    extra = padded(text.shape[1]) - text.shape[1]
    if not extra:
        return text, valid
    if valid is None:
        valid = torch.full((len(text),), text.shape[1], device=text.device)
    return pad(text, (0, 0, 0, extra)), valid
