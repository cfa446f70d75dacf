"""Latents to pictures, and pictures to a folder that is in order whenever one looks at it.

A folder holds `00000.png`, `00001.png`, …, `metadata.jsonl` with one JSON object a picture, and
`grid.png`. A file appears whole or not at all, and a picture's line is written after its file, so
that a process that is killed leaves only complete pictures with complete lines.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mvsplit.errors import UserError

_SMALLEST_SIDE = 64  # px; smaller pictures are enlarged by a whole factor
_GAP = 2  # px between the pictures of a grid
_BACKGROUND = 128
_MODES = {1: "L", 3: "RGB"}
METADATA_KEY = "mvsplit"  # of the PNG text chunk that holds a picture's record as JSON


def to_pictures(latents: Tensor) -> list[Image.Image]:
    """Pictures of latents [B, C, H, W] in [−1, 1], C 1 (grey) or 3 (RGB); values outside are cut.

    Tiny ones are enlarged without smoothing until the longer side has at least 64 px.

    Raises:
        UserError: latents that are no pixels, or not finite.
    """
    if latents.shape[1] not in _MODES:
        raise UserError(
            f"latents of {latents.shape[1]} channels are no picture (1 or 3 channels are); decode "
            "them first"
        )
    if not latents.isfinite().all():
        raise UserError("latents hold values that are not finite; there is no picture of them")
    pixels = to_bytes(latents)
    factor = math.ceil(_SMALLEST_SIDE / max(latents.shape[2:]))
    enlarged = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    arrays = enlarged.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]


def to_bytes(latents: Tensor) -> Tensor:
    """[−1, 1] to 0 … 255, uint8 on the CPU; values outside are cut."""
    return latents.float().add(1).mul(127.5).round().clamp(0, 255).byte().cpu()


def make_grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size and mode in rows, as nearly square as their number allows."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].width + _GAP, pictures[0].height + _GAP
    size = (columns * width - _GAP, rows * height - _GAP)
    grid = Image.new("RGB", size, (_BACKGROUND,) * 3)
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


def save_png(path: Path, picture: Image.Image, record: Mapping[str, Any]) -> None:
    """Writes a PNG with `record` as JSON in its text chunk; whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    info = PngInfo()
    info.add_itxt(METADATA_KEY, _to_json(record))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    save_bytes(path, buffer.getvalue())


def save_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def read_record(path: Path) -> dict[str, Any]:
    """The record that `save_png` put into a picture."""
    with Image.open(path) as picture:
        text: dict[str, str] = picture.text  # type: ignore[attr-defined]
        return json.loads(text[METADATA_KEY])


class PictureFolder:
    """A new folder of pictures with their records.

    Args:
        path: created if absent.

    Raises:
        UserError: the folder holds pictures already, is a file, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = path / "metadata.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metadata.touch(exist_ok=False)
        except FileExistsError as error:
            raise UserError(f"out: {path} is taken already; choose another folder") from error
        except OSError as error:
            raise _cannot_write(path, error) from error

    def add(self, index: int, picture: Image.Image, record: Mapping[str, Any]) -> Path:
        """Saves a picture and, after it, its line. Raises UserError where the disk is full."""
        path = self.path / f"{index:05d}.png"
        save_png(path, picture, record)
        self.note(path.name, record)
        return path

    def note(self, file_name: str, record: Mapping[str, Any]) -> None:
        """Adds the line of a file that is there."""
        line = _to_json({"file_name": file_name, **record}) + "\n"
        try:
            with open(self._metadata, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise _cannot_write(self._metadata, error) from error

    def add_grid(self, pictures: Sequence[Image.Image], record: Mapping[str, Any]) -> Path:
        """Saves `grid.png`. Raises UserError where the disk is full."""
        path = self.path / "grid.png"
        save_png(path, make_grid(pictures), record)
        return path


def _to_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free some space or choose --out")
