"""The resumable loader: the batch at position p is a pure function of (seed, p).

Nothing is drawn from a generator, so there is nothing to save but p, and a run that was resumed, or
cut into other batches, sees the same samples with the same captions dropped.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvsplit.data.counter import random_bits, stream_key, uniforms
from mvsplit.data.types import Batch, Dataset, Embedder
from mvsplit.errors import UserError


class Loader:
    """Batches of latents and embedded captions.

    A finite data set is gone through in a new order each epoch, every sample once; of an unlimited
    one, sample p is the p-th.

    Args:
        dataset: where samples come from.
        embedder: what encodes their captions.
        batch_size: samples a batch.
        seed: decides the orders and the dropped captions.
        caption_dropout: share of captions replaced by "", for classifier-free guidance.
        position: samples consumed so far.

    Raises UserError for values that are not possible.
    """

    def __init__(
        self,
        dataset: Dataset,
        embedder: Embedder,
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.0,
        position: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} holds no sample; use at least 1")
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout: {caption_dropout} is no share; use 0 … 1")
        if position < 0:
            raise UserError(f"position: {position} lies before the first sample; use at least 0")
        self.dataset = dataset
        self.embedder = embedder
        self.batch_size = batch_size
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.position = position

    def next_batch(self) -> Batch:
        """The batch at `position`, which then moves past it."""
        batch = self.batch_at(self.position)
        self.position += self.batch_size
        return batch

    def batch_at(self, position: int) -> Batch:
        """The batch whose first sample is number `position`; changes nothing."""
        positions = np.arange(position, position + self.batch_size, dtype=np.uint64)
        indices = self._indices(positions)
        examples = self.dataset.fetch(indices.tolist())
        text, valid = self.embedder.encode(self._keep_captions(positions, examples.captions))
        return Batch(
            latents=examples.latents,
            text=text,
            text_valid=None if bool((valid == text.shape[1]).all()) else valid,
            indices=torch.from_numpy(indices),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, and what it must not have changed."""
        return {"position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was saved. The batch size may differ from then.

        Raises UserError if another data set, seed or dropout would make other batches follow.
        """
        for field, value in self._fixed().items():
            if state[field] != value:
                raise UserError(
                    f"{field}: the loader has {value}, the saved run has {state[field]}; "
                    "resume with the saved value or start a new run"
                )
        self.position = state["position"]

    def _fixed(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "caption_dropout": self.caption_dropout,
            "dataset_size": self.dataset.size,
        }

    def _indices(self, positions: NDArray[np.uint64]) -> NDArray[np.int64]:
        size = self.dataset.size
        if size is None:
            return positions.astype(np.int64)
        epochs, places = np.divmod(positions.astype(np.int64), size)
        indices = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            indices[here] = _epoch_order(self.seed, epoch, size)[places[here]]
        return indices

    def _keep_captions(self, positions: NDArray[np.uint64], captions: list[str]) -> list[str]:
        dropped = uniforms(stream_key("dropout", self.seed), positions) < self.caption_dropout
        return [
            "" if drop else caption
            for drop, caption in zip(dropped.tolist(), captions, strict=True)
        ]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """[size]: the samples in the order in which epoch `epoch` visits them."""
    keys = random_bits(stream_key("order", seed, epoch), np.arange(size, dtype=np.uint64))
    return np.argsort(keys, kind="stable")
