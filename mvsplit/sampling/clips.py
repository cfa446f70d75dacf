"""Clips to GIF and MP4, and to a contact sheet: a row for each clip, a column for each frame.

A folder holds `00000.gif`, …, `00000.mp4`, … where that is asked for, `metadata.jsonl` with one
JSON object a clip, and `contact.png`. As with pictures, a file appears whole or not at all, and a
clip's line is written after its files.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.sampling.images import PictureFolder, save_bytes, save_png, to_pictures

_GAP = 2  # px between the frames of a contact sheet
_BACKGROUND = (128, 128, 128)
Frames = list[Image.Image]


def to_clips(latents: Tensor) -> list[Frames]:
    """The frames of latents [B, C, F, H, W] as pictures, RGB, as `to_pictures` makes them.

    Raises:
        UserError: latents that are no pixels, or not finite.
    """
    frames = latents.shape[2]
    pictures = to_pictures(latents.transpose(1, 2).flatten(0, 1))
    rgb = [picture.convert("RGB") for picture in pictures]
    return [rgb[start : start + frames] for start in range(0, len(rgb), frames)]


def contact_sheet(clips: Sequence[Frames]) -> Image.Image:
    """A row for each clip, a column for each frame; all of one size."""
    first = clips[0][0]
    width, height = first.width + _GAP, first.height + _GAP
    columns = max(map(len, clips))
    sheet = Image.new("RGB", (columns * width - _GAP, len(clips) * height - _GAP), _BACKGROUND)
    for row, clip in enumerate(clips):
        for column, frame in enumerate(clip):
            sheet.paste(frame, (column * width, row * height))
    return sheet


def gif_bytes(frames: Frames, fps: float, record: Mapping[str, Any]) -> bytes:
    """A GIF that repeats for ever, with `record` as JSON in its comment. Its colours are those of
    the clip where these are at most 256, else the nearest of as many; a GIF counts time in
    hundredths of a second, so that rates that do not divide 100 are rounded.

    Successive frames that are the same become one that lasts as long.
    """
    table = _palette(frames)
    indexed = [frame.quantize(palette=table, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    indexed[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=max(1, round(100 / fps)) * 10,
        loop=0,
        comment=json.dumps(record, allow_nan=False).encode(),
    )
    return buffer.getvalue()


def _palette(frames: Frames) -> Image.Image:
    """One table of colours for all frames, lest a still colour flickers."""
    strip = Image.new("RGB", (sum(f.width for f in frames), frames[0].height))
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width
    return strip.quantize(256, method=Image.Quantize.MEDIANCUT)


def require_mp4() -> None:
    """Raises UserError, naming the extra, where no MP4 can be written."""
    if importlib.util.find_spec("av") is None:
        raise UserError(
            "mp4: needs PyAV, which is not installed; pip install 'mvsplit[video]', or leave --mp4 "
            "out for GIF alone"
        )


def mp4_bytes(frames: Frames, fps: float) -> bytes:
    """An MP4 that every browser plays: H.264, 4:2:0, which needs even sides; an odd one gets the
    last row or column twice.

    Raises:
        UserError: the extra `video` is not installed.
    """
    require_mp4()
    import av

    arrays = [np.asarray(frame) for frame in frames]
    height, width = arrays[0].shape[:2]
    even = ((0, height % 2), (0, width % 2), (0, 0))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for array in arrays:
            picture = av.VideoFrame.from_ndarray(np.pad(array, even, mode="edge"), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
    return buffer.getvalue()


class ClipFolder(PictureFolder):
    """A new folder of clips with their records.

    Args:
        path: created if absent.
        fps: frames a second.
        mp4: whether each clip is written as MP4 too.

    Raises:
        UserError: as `PictureFolder`; MP4 is asked for and the extra `video` is not installed.
    """

    def __init__(self, path: Path, fps: float, *, mp4: bool) -> None:
        if mp4:
            require_mp4()
        super().__init__(path)
        self._fps, self._mp4 = fps, mp4

    def add_clip(self, index: int, frames: Frames, record: Mapping[str, Any]) -> Path:
        """Saves a clip and, after it, its line. Raises UserError where the disk is full."""
        path = self.path / f"{index:05d}.gif"
        if self._mp4:
            save_bytes(path.with_suffix(".mp4"), mp4_bytes(frames, self._fps))
        save_bytes(path, gif_bytes(frames, self._fps, record))
        self.note(path.name, record)
        return path

    def add_contact_sheet(self, clips: Sequence[Frames], record: Mapping[str, Any]) -> Path:
        """Saves `contact.png`. Raises UserError where the disk is full."""
        path = self.path / "contact.png"
        save_png(path, contact_sheet(clips), record)
        return path
