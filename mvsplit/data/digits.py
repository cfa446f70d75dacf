"""The real handwritten digits that come with scikit-learn: 1,797 pictures of 8×8, no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mvsplit.data.counter import stream_key, uniforms
from mvsplit.data.types import Examples
from mvsplit.errors import UserError, nearest

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("all", "train", "held-out")
_HELD_OUT = 0.25  # of all digits


class Digits:
    """Latents [B, 1, 8, 8] in [-1, 1] (ink is 1), captions "zero" to "nine".

    `labels` [size] int64 is the class of every sample.

    Args:
        split: all 1,797 digits; those to train on; or the quarter, always the same, that a training
            on "train" never sees.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """

    channels, height, width = 1, 8, 8
    vocabulary = NAMES
    caption_words = 1

    def __init__(self, split: str = "all") -> None:
        if split not in SPLITS:
            raise UserError(f"data.split={split!r} is unknown; {nearest(split, SPLITS)}")
        from sklearn.datasets import load_digits  # here: the import costs about a second

        digits = load_digits()
        ink = torch.from_numpy(digits.images).float()  # [1797, 8, 8], whole numbers 0 … 16
        chosen = torch.from_numpy(_chosen(len(ink), split))
        self._latents = (ink / 8 - 1).unsqueeze(1)[chosen]  # [size, 1, 8, 8]
        self.labels = torch.from_numpy(digits.target).long()[chosen]
        self.size = len(self.labels)
        self._captions = [NAMES[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Sequence[int]) -> Examples:
        """The samples at `indices`, each in 0 … size - 1.

        Raises IndexError for an index outside.
        """
        if any(not 0 <= index < self.size for index in indices):
            raise IndexError(f"digits has samples 0 … {self.size - 1}, asked for {list(indices)}")
        latents = self._latents[torch.as_tensor(indices, dtype=torch.int64)]
        return Examples(latents=latents, captions=[self._captions[index] for index in indices])


def _chosen(count: int, split: str) -> np.ndarray:
    """The places of the digits of a split, in order: fixed, and the same on every machine."""
    places = np.arange(count)
    if split == "all":
        return places
    held_out = uniforms(stream_key("digits held out"), places.astype(np.uint64)) < _HELD_OUT
    return places[held_out == (split == "held-out")]
