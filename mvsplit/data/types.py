"""What a data set hands out, and what the loader makes of it.

Shapes: B batch, C channels, F frames of clips, H height, W width, T text tokens (the longest of the
batch), Dc text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Samples of a data set in the order asked for."""

    latents: Tensor  # [B, C, H, W], of clips [B, C, F, H, W], float32, in [-1, 1] for pictures
    captions: list[str]  # B strings
    rejected: Tensor | None = None  # [B, C, H, W] of pairs, to which `latents` were preferred


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step reads."""

    latents: Tensor  # [B, C, H, W] or [B, C, F, H, W] float32
    text: Tensor  # [B, T, Dc] float32, zero where there is no word
    text_valid: Tensor | None  # [B] int64, words of each sample; None: all have T
    indices: Tensor  # [B] int64, the samples' places in the data set
    rejected: Tensor | None = None  # as in `Examples`
    beside: Batch | None = None  # as many samples of another data set, read at the same time


class Dataset(Protocol):
    """Samples by index. `fetch` is a pure function: a sample never depends on its batch-mates."""

    @property
    def channels(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def size(self) -> int | None:
        """Number of samples; None: unlimited, every index ≥ 0 is a sample."""

    def fetch(self, indices: Sequence[int]) -> Examples: ...


@runtime_checkable
class BucketedDataset(Protocol):
    """A finite `Dataset` whose samples have several shapes, captions or mirror images."""

    @property
    def buckets(self) -> list[NDArray[np.int64]]:
        """The samples of each shape; a batch is of one of them."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must find unchanged when it goes on, by name."""

    def fetch(self, indices: Sequence[int], draws: NDArray[np.uint64] | None = None) -> Examples:
        """As that of `Dataset`; 64 random bits for each sample choose among its variants."""


@runtime_checkable
class ClipDataset(Protocol):
    """A `Dataset` of clips."""

    @property
    def frames(self) -> int:
        """F of its latents [B, C, F, H, W]."""


def sample_shape(dataset: Dataset) -> tuple[int, ...]:
    """Of the latents of a sample: (C, H, W), or of a clip (C, F, H, W)."""
    frames = (dataset.frames,) if isinstance(dataset, ClipDataset) else ()
    return (dataset.channels, *frames, dataset.height, dataset.width)


class WordDataset(Dataset, Protocol):
    """A data set whose captions use a closed list of words."""

    @property
    def vocabulary(self) -> tuple[str, ...]: ...

    @property
    def caption_words(self) -> int:
        """Words of the longest caption."""


class Embedder(Protocol):
    """Turns captions into the network's text input; "" is the unconditional prompt."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns text [B, T, Dc] and the number of real tokens of each prompt [B] int64."""

    def spec(self) -> dict[str, Any]:
        """A JSON-able description that rebuilds the embedder."""
