"""The real handwritten digits that come with scikit-learn: 1,797 pictures of 8×8, no download."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvsplit.data.types import Examples

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits:
    """Latents [B, 1, 8, 8] in [-1, 1] (ink is 1), captions "zero" to "nine".

    `labels` [1797] int64 is the class of every sample.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """

    channels, height, width = 1, 8, 8
    vocabulary = NAMES
    caption_words = 1

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # here: the import costs about a second

        digits = load_digits()
        ink = torch.from_numpy(digits.images).float()  # [1797, 8, 8], whole numbers 0 … 16
        self._latents = (ink / 8 - 1).unsqueeze(1)  # [1797, 1, 8, 8]
        self.labels = torch.from_numpy(digits.target).long()
        self.size = len(self.labels)
        self._captions = [NAMES[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return self.size

    def fetch(self, indices: Sequence[int]) -> Examples:
        """The samples at `indices`, each in 0 … 1796.

        Raises IndexError for an index outside.
        """
        if any(not 0 <= index < self.size for index in indices):
            raise IndexError(f"digits has samples 0 … {self.size - 1}, asked for {list(indices)}")
        latents = self._latents[torch.as_tensor(indices, dtype=torch.int64)]
        return Examples(latents=latents, captions=[self._captions[index] for index in indices])
