"""Segments: runs of tokens that each have their own mean (paper App. E, J_seg = blkdiag(J_I, J_T))."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mvsplit.errors import UserError


@dataclass(frozen=True)
class Segments:
    """How the T tokens of a sequence divide into S consecutive runs, and how many of each are real.

    Args:
        lengths: tokens in each segment; they sum to T. A segment may be empty.
        valid: [B, S] integers, the real tokens at the start of each segment of each sample.
            None means that every token is real.

    Padding (tokens past `valid`) enters no mean and leaves every merge as zero. One object serves
    all layers of a forward pass: what is derived from it is computed once and kept.
    """

    lengths: tuple[int, ...]
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if any(n < 0 for n in self.lengths):
            raise UserError(f"Segments.lengths={self.lengths}: a length cannot be negative")
        if self.valid is not None and self.valid.shape[1:] != (len(self.lengths),):
            raise UserError(
                f"Segments.valid has shape {tuple(self.valid.shape)}; expected [batch, "
                f"{len(self.lengths)}], one count for each of the lengths {self.lengths}"
            )

    @classmethod
    def whole(cls, x: Tensor) -> Segments:
        """One segment over all tokens of `x` [B, T, D]."""
        return cls((x.shape[1],))

    @cached_property
    def total(self) -> int:
        """T, the number of tokens."""
        return sum(self.lengths)

    @cached_property
    def slices(self) -> list[slice]:
        """The token range of each segment."""
        ends = [sum(self.lengths[: s + 1]) for s in range(len(self.lengths))]
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    @cached_property
    def mask(self) -> Tensor | None:
        """[B, T] booleans, true on real tokens; None where every token is real."""
        if self.valid is None:
            return None
        per_segment = [
            torch.arange(n, device=self.valid.device) < self.valid[:, s : s + 1]
            for s, n in enumerate(self.lengths)
        ]
        return torch.cat(per_segment, dim=1)

    def check(self, x: Tensor) -> None:
        """Raises UserError unless the segments cover exactly the tokens of `x` [B, T, D]."""
        if self.total != x.shape[1]:
            raise UserError(
                f"Segments.lengths={self.lengths} cover {self.total} tokens, the input has "
                f"{x.shape[1]}; the lengths must sum to T"
            )
        if self.valid is not None and self.valid.shape[0] != x.shape[0]:
            raise UserError(
                f"Segments.valid counts {self.valid.shape[0]} samples, the input has {x.shape[0]}"
            )
