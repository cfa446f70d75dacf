"""A shard of a cache: one safetensors file, read piece by piece.

Shapes: N pictures of one bucket, V views of each (1, or 2 with its mirror image), C, h, w of the
latents, S distinct captions, K captions of all pictures, P pictures, M text tokens, Dc their width.

| tensor | holds |
|---|---|
| `latents.HxW` [N·V, C, h, w] | of the pictures of a bucket, the views of a picture side by side |
| `text` [M, Dc], `text.offsets` [S+1] | text states, one caption after the other, no padding |
| `captions` [bytes], `captions.offsets` [S+1], `captions.hashes` [S] | the captions in UTF-8 |
| `pictures.captions` [K], `pictures.offsets` [P+1] | which captions each picture has |
| `names` [bytes], `names.offsets` [P+1] | what the source calls each picture |

Pictures are in the order of the buckets, those of one bucket in the order of the source.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from mvsplit.data.atomic import fsync
from mvsplit.errors import UserError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


def caption_hash(caption: str) -> int:
    """63 bits that stand for a caption."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pack_strings(name: str, strings: Sequence[str]) -> dict[str, Tensor]:
    """`name` and `name.offsets`, from which `Shard.string` reads them back."""
    encoded = [string.encode() for string in strings]
    joined = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
    return {name: joined, f"{name}.offsets": offsets(map(len, encoded))}


def offsets(lengths: Iterable[int]) -> Tensor:
    """[n + 1] int64: where each of n runs of these lengths begins, and where the last ends."""
    return torch.tensor([0, *accumulate(lengths)])


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Puts a shard at `path`, whole or not at all. Raises OSError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    shutil.copymode(path.parent, temporary)  # its writer makes it readable by the owner only
    os.chmod(temporary, temporary.stat().st_mode & 0o666)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


class Shard:
    """A shard that is open for reading, by several threads if need be; closed with its last use.

    Rows are read with `pread`, not mapped: memory that is mapped counts as the process's own, and
    would grow until the whole cache is in it.

    Raises UserError where the file is missing or its header is not that of a shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115, closed with the last use
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; encode it again") from error
        self._start = 8 + length
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._tables: dict[str, NDArray[np.int64]] = {}

    def length(self, name: str) -> int:
        """Rows of a tensor, 0 where the shard has none of that name."""
        return self._entries[name]["shape"][0] if name in self._entries else 0

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` … `stop` of the tensor `name`. Raises UserError where the file ends."""
        entry = self._entries[name]
        rows = torch.empty((stop - start, *entry["shape"][1:]), dtype=DTYPES[entry["dtype"]])
        if rows.numel():
            row_bytes = rows.nbytes // len(rows)
            into = memoryview(rows.reshape(-1).view(torch.uint8).numpy().data)
            self._read(into, self._start + entry["data_offsets"][0] + start * row_bytes)
        return rows

    def string(self, name: str, index: int) -> str:
        """String `index` of those packed under `name`."""
        bounds = self.table(f"{name}.offsets")
        return bytes(self.rows(name, bounds[index], bounds[index + 1]).numpy()).decode()

    def table(self, name: str) -> NDArray[np.int64]:
        """A whole small tensor, kept while the shard is open."""
        if name not in self._tables:
            self._tables[name] = self.rows(name, 0, self.length(name)).numpy()
        return self._tables[name]

    def _read(self, into: memoryview, offset: int) -> None:
        while into:
            count = os.preadv(self._file.fileno(), [into], offset)
            if not count:
                raise UserError(f"{self.path} is truncated; run mvsplit encode again to restore it")
            into, offset = into[count:], offset + count
