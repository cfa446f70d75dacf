"""Segments: runs of tokens, each with its own mean (paper App. E, J_seg = blkdiag(J_I, J_T))."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from mvsplit.errors import UserError


@dataclass(frozen=True, eq=False)
class Segments:
    """How the T tokens of a sequence divide into S consecutive runs, and how many of each are real.

    Padding (tokens past `valid`) enters no mean and leaves every merge as zero. One object serves
    all layers of a forward pass, so what is derived from it is computed once, on construction.

    Args:
        lengths: tokens in each segment; they sum to T. A segment may be empty.
        valid: [B, S] integers, the real tokens at the start of each segment of each sample.
            None means that every token is real.
        real_first: a promise that only the last segment of a sample has padding, so that its real
            tokens come first (`image_and_text` keeps it). Looking would wait for the device.

    Attributes:
        slices: the token range of each segment.
        mask: [B, T] booleans, true on real tokens; None where every token is real.

    Raises:
        UserError: lengths that are no tuple of whole numbers, a negative one, or a `valid` that is
            not [B, S].
    """

    lengths: tuple[int, ...]
    valid: Tensor | None = None
    real_first: bool = False
    slices: tuple[slice, ...] = field(init=False, repr=False)
    mask: Tensor | None = field(init=False, repr=False)
    _matrices: dict[tuple, tuple[Tensor, Tensor]] = field(init=False, repr=False)
    _biases: dict[torch.dtype, Tensor] = field(init=False, repr=False)
    _counts: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_lengths()
        if any(n < 0 for n in self.lengths):
            raise UserError(f"Segments.lengths={self.lengths}: a length cannot be negative")
        if self.valid is not None and self.valid.shape[1:] != (len(self.lengths),):
            raise UserError(
                f"Segments.valid has shape {tuple(self.valid.shape)}; expected [batch, "
                f"{len(self.lengths)}], one count for each of the lengths {self.lengths}"
            )
        ends = accumulate(self.lengths)
        slices = tuple(slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True))
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "mask", self._real_tokens())
        object.__setattr__(self, "_matrices", {})
        object.__setattr__(self, "_biases", {})
        object.__setattr__(self, "_counts", {})

    def _check_lengths(self) -> None:
        lengths: object = self.lengths
        if isinstance(lengths, int):
            raise UserError(
                f"Segments.lengths={lengths}: expected a tuple, one length for each segment; write "
                f"Segments(({lengths},)) for one segment over {lengths} tokens"
            )
        # While a network is traced, a length may be a symbol.
        known = isinstance(lengths, tuple | list)
        if not known or not all(isinstance(n, int | torch.SymInt) for n in self.lengths):
            given = repr(lengths) if known else f"a {type(lengths).__name__}"
            raise UserError(
                f"Segments.lengths is {given}: expected a tuple of whole numbers, one length for "
                f"each segment, for example Segments((256, 77)) for image and text"
            )

    @classmethod
    def whole(cls, x: Tensor) -> Segments:
        """One segment over all tokens of `x` [B, T, D]."""
        return cls((x.shape[1],))

    @classmethod
    def image_and_text(cls, image: int, text: int, text_valid: Tensor | None) -> Segments:
        """[image tokens ; text tokens], of which `text_valid` [B] are real."""
        if text_valid is None:
            return cls((image, text))
        valid = torch.stack((torch.full_like(text_valid, image), text_valid), dim=1)
        return cls((image, text), valid, real_first=True)

    @property
    def total(self) -> int:
        """T, the number of tokens."""
        return sum(self.lengths)

    def check(self, x: Tensor, f: Tensor | None = None) -> None:
        """Raises UserError unless the segments cover exactly the samples and tokens of `x`
        [B, T, …], which is [B, T, D] where it is merged with a branch output `f`."""
        if x.dim() < 2 or (f is not None and x.dim() != 3):
            raise UserError(f"x has the shape {list(x.shape)}; it must be [B, T, D]")
        if f is not None and f.shape != x.shape:
            raise UserError(
                f"f has the shape {list(f.shape)}, the trunk x {list(x.shape)}; a branch must keep "
                f"its shape"
            )
        if self.total != x.shape[1]:
            raise UserError(
                f"Segments.lengths={self.lengths} cover {self.total} tokens, the input has "
                f"{x.shape[1]}; the lengths must sum to T"
            )
        if self.valid is not None and self.valid.shape[0] != x.shape[0]:
            raise UserError(
                f"Segments.valid counts {self.valid.shape[0]} samples, the input has {x.shape[0]}"
            )

    def matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """J as a product of two thin matrices: JX = members · (averages · X).

        A small batched product is several times cheaper on a CPU than a slice and a sum for each
        segment. Computed once for each dtype and device. A non-finite value of a real token reaches
        every segment of its sample, as it would at the next attention.

        Args:
            like: [B, T, D], of whose batch, dtype and device the matrices are.

        Returns:
            members [B, T, S], 1 where a real token lies in a segment, and averages [B, S, T], which
            is membersᵀ divided by the number of real tokens (an empty segment has a row of zeros).
        """
        key = (like.dtype, like.device)
        if key not in self._matrices:
            members = like.new_zeros(1, self.total, len(self.lengths))
            for s, tokens in enumerate(self.slices):
                members[:, tokens, s] = 1
            if self.mask is not None:
                members = members * self.mask.unsqueeze(-1)
            counts = members.sum(1).clamp(min=1).unsqueeze(-1)
            self._matrices[key] = members, members.transpose(1, 2) / counts
        members, averages = self._matrices[key]
        return members.expand(like.shape[0], -1, -1), averages.expand(like.shape[0], -1, -1)

    def key_bias(self, like: Tensor) -> Tensor | None:
        """What attention adds to its scores: 0 for real keys, −∞ for padding, [B, 1, 1, T] in the
        dtype of `like`; None where every token is real. Computed once for each dtype. One row for
        all queries: cuDNN reads it in less time than T equal ones."""
        if self.mask is None:
            return None
        if like.dtype not in self._biases:
            row = torch.zeros(self.mask.shape, dtype=like.dtype, device=self.mask.device)
            row.masked_fill_(~self.mask, -torch.inf)
            self._biases[like.dtype] = row[:, None, None, :]
        return self._biases[like.dtype]

    def sequence_bounds(self) -> Tensor | None:
        """Where the real tokens of each sample begin and where its padding does, in the batch as
        one row of B·T tokens: [2B + 1] int32, the last being B·T; None unless `real_first`.
        Computed once."""
        if self.mask is None or not self.real_first:
            return None
        if "bounds" not in self._counts:
            batch, total = self.mask.shape
            bounds = self.mask.new_empty(2 * batch + 1, dtype=torch.int32)
            starts = torch.arange(batch + 1, device=bounds.device, dtype=torch.int32) * total
            bounds[0::2] = starts
            bounds[1::2] = starts[:-1] + self.mask.sum(1, dtype=torch.int32)
            self._counts["bounds"] = bounds
        return self._counts["bounds"]

    def first_tokens(self) -> Tensor | None:
        """Real tokens of each sample, which are its first, [B] int32; None unless `real_first`, or
        where every token is real. Computed once."""
        if self.mask is None or not self.real_first:
            return None
        if "first" not in self._counts:
            self._counts["first"] = self.mask.sum(1, dtype=torch.int32)
        return self._counts["first"]

    def padding(self) -> Tensor | None:
        """Padded tokens of each sample, [B] fp32; None where every token is real. Computed once."""
        if self.mask is None:
            return None
        if "padding" not in self._counts:
            self._counts["padding"] = (~self.mask).sum(1, dtype=torch.float32)
        return self._counts["padding"]

    def _real_tokens(self) -> Tensor | None:
        if self.valid is None:
            return None
        per_segment = [
            torch.arange(n, device=self.valid.device) < self.valid[:, s : s + 1]
            for s, n in enumerate(self.lengths)
        ]
        return torch.cat(per_segment, dim=1)
