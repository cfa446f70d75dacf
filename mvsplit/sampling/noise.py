"""Noise that belongs to a picture, not to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mvsplit.errors import UserError


def sample_noise(
    indices: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise [len(indices), *shape] in fp32, a function of (seed, index) alone.

    Each picture is drawn on the CPU from a generator of its own, so that its noise is the same to
    the bit in any batch, in any order and on any device.

    Raises:
        UserError: a negative seed or index.
    """
    if seed < 0 or any(index < 0 for index in indices):
        raise UserError(f"seed={seed}: neither a seed nor the index of a picture can be negative")
    rows = [torch.randn(tuple(shape), generator=_generator(seed, index)) for index in indices]
    return torch.stack(rows).to(device) if rows else torch.empty(0, *shape, device=device)


def _generator(seed: int, index: int) -> torch.Generator:
    """Mixed, because the streams of neighbouring plain seeds need not be independent."""
    mixed = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))
