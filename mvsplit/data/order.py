"""In which order samples are visited: pure functions of the seed and a place, with no state.

Buckets: bucket b has n_b samples, a batch has B of one bucket. Each bucket is an endless stream,
one random order of its samples after the other, cut into batches of B; nothing is left over, and
nothing is repeated to fill a batch. Epoch e holds the batches ⌊e·n_b/B⌋ … ⌊(e+1)·n_b/B⌋ − 1 of
every bucket, shuffled. So how many batches lie before an epoch is known without counting them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mvsplit.data.counter import random_bits, stream_key

_KEPT = 3  # orders of each kind that are kept: a batch may reach into the next
_T = TypeVar("_T")


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """[size]: the samples in the order in which epoch `epoch` visits them."""
    return _shuffled(size, "order", seed, epoch)


class BucketOrder:
    """Batches of one bucket each, every sample once in each pass through its bucket.

    Args:
        buckets: the samples of each bucket, distinct, at least one in all.
        batch_size: B.
        seed: decides all orders.
    """

    def __init__(self, buckets: Sequence[NDArray[np.int64]], batch_size: int, seed: int) -> None:
        self._buckets = [bucket for bucket in buckets if len(bucket)]
        self._batch_size, self._seed = batch_size, seed
        self._passes: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def indices(self, batch: int) -> NDArray[np.int64]:
        """[B]: the samples of batch number `batch`."""
        epoch = self._epoch_of(batch)
        bucket, number = self._table(epoch)[batch - self._batches_before(epoch)]
        return self._stream(int(bucket), int(number) * self._batch_size)

    def _batches_before(self, epoch: int) -> int:
        """Σ_b ⌊e·n_b/B⌋."""
        return sum(self._first_batch(bucket, epoch) for bucket in range(len(self._buckets)))

    def _first_batch(self, bucket: int, epoch: int) -> int:
        return epoch * len(self._buckets[bucket]) // self._batch_size

    def _epoch_of(self, batch: int) -> int:
        """The last epoch before which at most `batch` batches lie; small ones may have none."""
        size = sum(map(len, self._buckets))
        # Each bucket is short of e·n_b/B by less than one batch.
        bound = (batch + len(self._buckets) + 1) * self._batch_size // size + 1
        return bisect_right(range(bound + 1), batch, key=self._batches_before) - 1

    def _table(self, epoch: int) -> NDArray[np.int64]:
        """[batches, 2]: (bucket, number in its stream) of the batches of an epoch, in order."""
        if epoch not in self._epochs:
            rows = [
                (bucket, number)
                for bucket in range(len(self._buckets))
                for number in range(
                    self._first_batch(bucket, epoch), self._first_batch(bucket, epoch + 1)
                )
            ]
            order = _shuffled(len(rows), "batches", self._seed, epoch)
            _keep(self._epochs, epoch, np.array(rows, dtype=np.int64)[order], _KEPT)
        return self._epochs[epoch]

    def _stream(self, bucket: int, start: int) -> NDArray[np.int64]:
        """[B]: the samples at places start … start + B − 1 of a bucket's stream."""
        size = len(self._buckets[bucket])
        passes, places = np.divmod(np.arange(start, start + self._batch_size), size)
        found = np.empty_like(places)
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            here = passes == number
            found[here] = self._pass(bucket, number)[places[here]]
        return self._buckets[bucket][found]

    def _pass(self, bucket: int, number: int) -> NDArray[np.int64]:
        key = (bucket, number)
        if key not in self._passes:
            order = _shuffled(len(self._buckets[bucket]), "order", self._seed, number, bucket)
            _keep(self._passes, key, order, _KEPT * len(self._buckets))
        return self._passes[key]


def _shuffled(size: int, *stream: int | str) -> NDArray[np.int64]:
    keys = random_bits(stream_key(*stream), np.arange(size, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


_K = TypeVar("_K", bound=Hashable)


def _keep(known: dict[_K, _T], key: _K, value: _T, most: int) -> None:
    """Adds to a dictionary of at most `most`; the oldest goes."""
    known[key] = value
    while len(known) > most:
        del known[next(iter(known))]
