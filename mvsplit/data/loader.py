"""The resumable loader: the batch at position p is a pure function of (seed, p).

Nothing is drawn from a generator, so there is nothing to save but p, and a run that was resumed, or
cut into other batches, sees the same samples with the same captions dropped. Where samples have
several shapes a batch has one of them, so the order depends on the batch size, which then is fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvsplit.data.counter import random_bits, stream_key, uniforms
from mvsplit.data.order import BucketOrder, epoch_order
from mvsplit.data.prefetch import Prefetch
from mvsplit.data.types import Batch, BucketedDataset, Dataset, Embedder, Examples
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
        prefetch: batches that a thread makes ahead of time; 0 makes each when it is asked for.
        beside: of as large batches; its batch at a position comes with that of this one.
        rank, world: `next_batch` gives the rank-th of `world` equal runs of a batch's rows, a
            process's share; the position counts whole batches all the same.

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
        prefetch: int = 0,
        beside: Loader | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} holds no sample; use at least 1")
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout: {caption_dropout} is no share; use 0 … 1")
        if position < 0:
            raise UserError(f"position: {position} lies before the first sample; use at least 0")
        if not 0 <= rank < world or batch_size % world:
            raise UserError(
                f"batch_size: {batch_size} has no share {rank} of {world}; use a multiple of it"
            )
        self.dataset = dataset
        self.embedder = embedder
        self.batch_size = batch_size
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.position = position
        self.beside = beside
        buckets = dataset.buckets if isinstance(dataset, BucketedDataset) else []
        self._order = BucketOrder(buckets, batch_size, seed) if len(buckets) > 1 else None
        each = batch_size // world
        self._share = slice(rank * each, (rank + 1) * each)
        self._prefetch = Prefetch(self._share_at, batch_size, prefetch) if prefetch else None

    def next_batch(self) -> Batch:
        """This process's share of the batch at `position`, which then moves past the batch."""
        make = self._prefetch.take if self._prefetch else self._share_at
        batch = make(self.position)
        self.position += self.batch_size
        return batch

    def _share_at(self, position: int) -> Batch:
        return self.batch_at(position, self._share)

    def batch_at(self, position: int, rows: slice = slice(None)) -> Batch:
        """The batch whose first sample is number `position`; changes nothing.

        Args:
            position: in a data set of several shapes a multiple of the batch size.
            rows: the samples of the batch that are wanted, a process's share for example.

        Raises ValueError for a position inside a batch of one shape.
        """
        positions = np.arange(position, position + self.batch_size, dtype=np.uint64)[rows]
        indices = self._batch_indices(position)[rows]
        examples = self._fetch(indices, positions)
        text, valid = self.embedder.encode(self._keep_captions(positions, examples.captions))
        return Batch(
            latents=examples.latents,
            text=text,
            text_valid=None if bool((valid == text.shape[1]).all()) else valid,
            indices=torch.from_numpy(indices),
            rejected=examples.rejected,
            beside=None if self.beside is None else self.beside.batch_at(position, rows),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, and what it must not have changed."""
        return {"position": self.position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was saved. The batch size may differ from then if all samples have
        one shape.

        Raises UserError, naming it, for what is not as it was and would make other batches follow.
        """
        for field, value in self._fixed().items():
            if state.get(field) != value:
                raise UserError(
                    f"{field}: the loader has {value}, the saved run has {state.get(field)}; "
                    "resume with the saved value or start a new run"
                )
        self.position = state["position"]

    def _fixed(self) -> dict[str, Any]:
        fixed: dict[str, Any] = {
            "seed": self.seed,
            "caption_dropout": self.caption_dropout,
            "dataset_size": self.dataset.size,
        }
        if isinstance(self.dataset, BucketedDataset):
            fixed |= self.dataset.identity
        if self.beside is not None:
            fixed["beside"] = self.beside._fixed()
        return fixed | ({"batch_size": self.batch_size} if self._order else {})

    def _fetch(self, indices: NDArray[np.int64], positions: NDArray[np.uint64]) -> Examples:
        if not isinstance(self.dataset, BucketedDataset):
            return self.dataset.fetch(indices.tolist())
        return self.dataset.fetch(
            indices.tolist(), random_bits(stream_key("views", self.seed), positions)
        )

    def _batch_indices(self, position: int) -> NDArray[np.int64]:
        """[B]: the samples of the batch at `position`."""
        if self._order is None:
            return self._indices(position)
        number, inside = divmod(position, self.batch_size)
        if inside:
            raise ValueError(f"position {position} is no multiple of {self.batch_size}")
        return self._order.indices(number)

    def _indices(self, position: int) -> NDArray[np.int64]:
        positions = np.arange(position, position + self.batch_size)
        size = self.dataset.size
        if size is None:
            return positions
        epochs, places = np.divmod(positions, size)
        indices = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            indices[here] = epoch_order(self.seed, epoch, size)[places[here]]
        return indices

    def _keep_captions(self, positions: NDArray[np.uint64], captions: list[str]) -> list[str]:
        dropped = uniforms(stream_key("dropout", self.seed), positions) < self.caption_dropout
        return [
            "" if drop else caption
            for drop, caption in zip(dropped.tolist(), captions, strict=True)
        ]
