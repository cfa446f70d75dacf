"""A data set of encoded pictures, as `mvsplit encode` makes it.

Shapes: B samples, C, h, w of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvsplit.data.manifest import Manifest, read_manifest, verify_shards
from mvsplit.data.shards import Shard
from mvsplit.data.types import Examples
from mvsplit.errors import UserError

_OPEN_SHARDS = 128  # below the 256 files that some systems allow a process


class Cache:
    """Latents in buckets of one shape, each picture with its captions and perhaps its mirror image.

    `buckets` holds the samples of each shape of `shapes` (h, w); `height` and `width` are those of
    the shape that has most.

    Args:
        path: the folder that `mvsplit encode` has filled.
        verify: compute the checksum of every shard; sizes are compared anyway.

    Raises UserError where the cache is unfinished, truncated or damaged.
    """

    def __init__(self, path: str | Path | None = None, verify: bool = True) -> None:
        if path is None:
            raise UserError("data.path: name the folder that mvsplit encode has filled")
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        verify_shards(self.path, self.manifest.shards, checksums=verify)
        if not self.manifest.pictures:
            raise UserError(f"data.path: {self.path} has no picture; encode a source that has")
        self.size: int | None = self.manifest.pictures
        self.channels = len(self.manifest.latents["mean"])
        self._index(self.manifest)
        self.height, self.width = self.shapes[int(np.argmax([len(b) for b in self.buckets]))]
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must find again when it goes on: which pictures, encoded with what."""
        settings = self.manifest.settings
        return {
            "vae": settings.vae,
            "text_encoder": settings.text_encoder,
            "source": settings.source,
            "resolution": settings.resolution,
            "max_aspect": settings.max_aspect,
            "flips": settings.flips,
            "dtype": settings.dtype,
            "shard_size": settings.shard_size,
        }

    def fetch(self, indices: Sequence[int], draws: NDArray[np.uint64] | None = None) -> Examples:
        """The samples at `indices`, which must be of one bucket.

        Args:
            indices: B numbers in 0 … size − 1.
            draws: 64 random bits for each, which choose mirror image and caption; None for the
                picture as it is with its first caption.

        Raises IndexError for an index outside, ValueError for samples of several shapes, UserError
        for a shard that has become shorter.
        """
        if any(not 0 <= index < self.manifest.pictures for index in indices):
            raise IndexError(f"the cache has samples 0 … {self.manifest.pictures - 1}")
        shards, pictures, buckets, rows = self._locate(np.asarray(indices, dtype=np.int64))
        if len(set(buckets.tolist())) > 1:
            raise ValueError("samples of several shapes; ask for those of one bucket")
        shape = self.shapes[buckets[0]]
        bits = np.zeros(len(indices), dtype=np.uint64) if draws is None else draws
        flips = (bits & np.uint64(1)).astype(np.int64) if self._views > 1 else 0 * rows
        latents = torch.empty(len(indices), self.channels, *shape)
        captions = []
        for i, number in enumerate(shards.tolist()):
            shard = self._shard(number)
            row = int(rows[i]) * self._views + int(flips[i])
            latents[i] = shard.rows(_tensor_name(shape), row, row + 1)[0]
            captions.append(_caption(shard, int(pictures[i]), int(bits[i]) >> 1))
        return Examples(latents=latents, captions=captions)

    def name(self, index: int) -> str:
        """What the source called sample `index`, for messages."""
        shards, pictures, _, _ = self._locate(np.array([index]))
        return self._shard(int(shards[0])).string("names", int(pictures[0]))

    def shard(self, number: int) -> Shard:
        """Shard `number`; the most recent ones stay open."""
        return self._shard(number)

    def _index(self, manifest: Manifest) -> None:
        """Where each sample lies: shard after shard, in a shard bucket after bucket."""
        names = sorted({name for shard in manifest.shards for name in shard.pictures}, key=_shape)
        self.shapes = [_shape(name) for name in names]
        counts = np.array([[s.pictures.get(name, 0) for name in names] for s in manifest.shards])
        ends = counts.cumsum().reshape(counts.shape)  # [shards, buckets]: first index past each
        self._ends = ends.reshape(-1)
        self._starts = (ends - counts).reshape(-1)
        self._shard_starts = (ends - counts)[:, 0]
        self._views = 2 if manifest.settings.flips else 1
        self.buckets = [
            np.concatenate(
                [np.arange(end - n, end) for end, n in zip(ends[:, b], counts[:, b], strict=True)]
            )
            for b in range(len(names))
        ]

    def _locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Of each sample: its shard, its place among the shard's pictures, its bucket, its row."""
        cells = np.searchsorted(self._ends, indices, side="right")
        shards, buckets = np.divmod(cells, len(self.shapes))
        return shards, indices - self._shard_starts[shards], buckets, indices - self._starts[cells]

    def _open(self, number: int) -> Shard:
        return Shard(self.path / "shards" / self.manifest.shards[number].file)


def _tensor_name(shape: tuple[int, int]) -> str:
    return f"latents.{shape[0]}x{shape[1]}"


def _shape(name: str) -> tuple[int, int]:
    """(16, 24) for "16x24"."""
    height, width = map(int, name.split("x"))
    return height, width


def _caption(shard: Shard, picture: int, bits: int) -> str:
    """One of a picture's captions, chosen by random bits."""
    bounds = shard.table("pictures.offsets")
    choice = bounds[picture] + bits % (bounds[picture + 1] - bounds[picture])
    return shard.string("captions", shard.table("pictures.captions")[choice])
