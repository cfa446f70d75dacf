"""Pairs of samples of which one was preferred, in a parquet file; needs the extra `data`.

| column | holds |
|---|---|
| caption | text |
| chosen, rejected | pictures: the bytes of a file, also as `datasets` writes images; or latents: nested lists [C][H][W] |

Shapes: B samples, C channels, H, W.
"""  # noqa: E501

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from mvsplit.data.atomic import sha256
from mvsplit.data.encoders import to_images
from mvsplit.data.sources import BrokenPicture, read_image
from mvsplit.data.types import Examples
from mvsplit.errors import UserError, needs_extra

CAPTION, CHOSEN, REJECTED = COLUMNS = ("caption", "chosen", "rejected")
ORIENTATION = ExifTags.Base.Orientation
Encode = Callable[[Tensor], Tensor]


class Pairs:
    """The pairs of a parquet file: `latents` of the examples were preferred to `rejected`.

    Pairs may differ in size; `buckets` holds those of each of `shapes` (H, W). Pictures stay as
    they are in the file until they are asked for.

    Args:
        path: the file.
        channels: C of the network.
        encode: pictures [B, 3, H, W] in [−1, 1] to latents, at once; None where the latents are the
            pixels, of which a single channel is grey.

    Raises UserError where there is no such file or column, where a pair lacks a caption or one of
    its samples, and where its samples differ in size or have other channels.
    """

    def __init__(self, path: Path | str, channels: int, encode: Encode | None = None) -> None:
        self.path, self.channels = Path(path), channels
        columns = _read(self.path)
        self.captions = [str(caption or "").strip() for caption in columns[CAPTION]]
        self._chosen, self._rejected = (
            self._samples(name, columns[name], encode) for name in (CHOSEN, REJECTED)
        )
        self.size: int | None = len(self.captions)
        self.shapes, self.buckets = self._sorted_by_shape()
        self.height, self.width = self.shapes[int(np.argmax([len(b) for b in self.buckets]))]

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must find again when it goes on: the same file, wherever it lies."""
        return {"pairs": sha256(self.path)}

    def fetch(self, indices: Sequence[int], draws: NDArray[np.uint64] | None = None) -> Examples:
        """The pairs at `indices`, which must be of one size; `draws` choose nothing here.

        Raises UserError for a picture that cannot be read.
        """
        chosen, rejected = (
            torch.stack(
                [
                    self._picture(sample, index, self.channels)
                    if isinstance(sample := samples[index], bytes)
                    else sample
                    for index in indices
                ]
            )
            for samples in (self._chosen, self._rejected)
        )
        captions = [self.captions[index] for index in indices]
        return Examples(latents=chosen, captions=captions, rejected=rejected)

    def _samples(self, name: str, values: Sequence[Any], encode: Encode | None) -> list[Any]:
        """The bytes of pictures, or latents [C, H, W]."""
        found = [self._sample(name, row, value) for row, value in enumerate(values)]
        if encode is None:
            return found
        return [
            encode(self._picture(sample, row, 3)[None])[0].cpu()
            if isinstance(sample, bytes)
            else sample
            for row, sample in enumerate(found)
        ]

    def _sample(self, name: str, row: int, value: Any) -> bytes | Tensor:
        if isinstance(value, dict):
            value = value.get("bytes")
        if not self.captions[row]:
            raise self._wrong(row, "has no caption; give each pair the one that both were made of")
        if value is None:
            raise self._wrong(row, f"has no {name} sample; a pair needs both, leave the row out")
        if isinstance(value, bytes):
            return value
        try:
            return torch.from_numpy(np.array(value, dtype=np.float32))
        except (ValueError, TypeError) as error:
            raise self._wrong(
                row, f"{name} is neither a picture nor latents [C][H][W]; write one of them"
            ) from error

    def _sorted_by_shape(self) -> tuple[list[tuple[int, int]], list[NDArray[np.int64]]]:
        """The shapes that there are, and the pairs of each."""
        rows: dict[tuple[int, int], list[int]] = {}
        for row, pair in enumerate(zip(self._chosen, self._rejected, strict=True)):
            one, other = (self._shape(sample, row) for sample in pair)
            if one != other:
                raise self._wrong(
                    row,
                    f"chosen is {one[1]}×{one[2]} in {one[0]} channels, rejected "
                    f"{other[1]}×{other[2]} in {other[0]}; make both of one size",
                )
            rows.setdefault(one[1:], []).append(row)
        if not rows:
            raise UserError(f"data.pairs: {self.path} holds no pair; make some")
        shapes = sorted(rows)
        return shapes, [np.array(rows[shape]) for shape in shapes]

    def _shape(self, sample: bytes | Tensor, row: int) -> tuple[int, int, int]:
        """C, H, W; of a picture without reading more than its head."""
        if isinstance(sample, bytes):
            try:
                image = Image.open(io.BytesIO(sample))
                turned = image.getexif().get(ORIENTATION, 1) > 4  # by a quarter, when it is read
            except (OSError, SyntaxError, ValueError) as error:
                raise self._wrong(row, f"has a picture that cannot be read: {error}") from error
            width, height = image.size[::-1] if turned else image.size
            return self.channels, height, width
        if sample.ndim != 3 or len(sample) != self.channels:
            raise self._wrong(
                row,
                f"has latents of shape {list(sample.shape)}; the network takes "
                f"[{self.channels}, H, W]",
            )
        channels, height, width = sample.shape
        return channels, height, width

    def _picture(self, sample: bytes, row: int, channels: int) -> Tensor:
        try:
            return _pixels(sample, channels)
        except BrokenPicture as error:
            raise self._wrong(row, f"has a picture that cannot be read: {error}") from error

    def _wrong(self, row: int, what: str) -> UserError:
        return UserError(f"data.pairs: row {row} of {self.path} {what}")


def write_pairs(path: Path, rows: Iterable[tuple[str, Tensor, Tensor]]) -> int:
    """Writes captions with chosen and rejected pictures, each [1 or 3, H, W] in [−1, 1], values
    outside cut, as a new file that appears whole or not at all; returns how many.

    Raises:
        UserError: there is no row; the file exists or cannot be written; pyarrow is not installed.
    """
    with needs_extra("data"):
        import pyarrow
        import pyarrow.parquet
    if path.exists():
        raise UserError(f"out={path}: exists; choose another file")
    pairs = [(caption, _png(chosen), _png(rejected)) for caption, chosen, rejected in rows]
    if not pairs:
        raise UserError(f"out={path}: there is no pair to write; draw more captions")
    columns = dict(zip(COLUMNS, map(list, zip(*pairs, strict=True)), strict=True))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
        temporary.rename(path)
    except OSError as error:
        raise UserError(
            f"out={path}: {error.strerror}; choose a place that can be written"
        ) from error
    return len(pairs)


def _read(path: Path) -> dict[str, list[Any]]:
    """The columns of the file."""
    with needs_extra("data"):
        import pyarrow
        import pyarrow.parquet
    if not path.is_file():
        raise UserError(
            f"data.pairs: there is no file {path}; give one, or make it with mvsplit pairs"
        )
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data.pairs: {path} is no parquet file ({reason}); give one") from error
    for name in COLUMNS:
        if name not in table.column_names:
            raise UserError(
                f"data.pairs: {path} has no column {name!r}; rename one of "
                f"{', '.join(table.column_names)}"
            )
    return {name: table.column(name).to_pylist() for name in COLUMNS}


def _pixels(picture: bytes, channels: int) -> Tensor:
    """A picture as [1 or 3, H, W] in [−1, 1], grey if of one channel. Raises BrokenPicture."""
    image = read_image(picture)
    if channels == 1:
        image = image.convert("L").convert("RGB")
    return to_images([np.array(image)])[0, :channels]


def _png(picture: Tensor) -> bytes:
    """A picture [1 or 3, H, W] in [−1, 1] as the bytes of a PNG file."""
    pixels = picture.float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
