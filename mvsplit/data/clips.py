"""Captioned clips: moving shapes without end, made as they are asked for.

Shapes: B clips, F frames, S pixels a side, N objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mvsplit.data.captions import BACKGROUNDS, COLOURS, SHAPES
from mvsplit.data.motions import (
    CAPTION_WORDS,
    MOTIONS,
    SLOTS,
    VOCABULARY,
    ClipScene,
    ClipTable,
    draw_clips,
    places,
)
from mvsplit.data.render import RGB, coverage
from mvsplit.data.types import Examples
from mvsplit.errors import UserError, nearest

MOST_FRAMES = 64
_CHUNK = 64  # frames painted at a time, as in `render`


class Clips:
    """Clips of one or two moving shapes, latents [B, 3, F, size, size] in [-1, 1], captions of what
    moves how (`mvsplit.data.motions`).

    Sample `index` depends on (seed, index, motions) alone; it shows the same scene at any size and
    number of frames.

    Args:
        frames: F; a clip lasts as long with more, which then are nearer to each other.
        size: pixels a side, 32 or 64.
        seed: which endless series.
        motions: those of `MOTIONS` that are drawn; all if None.
        device: where clips are rendered and left.

    Raises UserError for values that are not possible.
    """

    channels = 3
    size: int | None = None
    vocabulary = VOCABULARY
    caption_words = CAPTION_WORDS

    def __init__(
        self,
        frames: int = 8,
        size: int = 32,
        seed: int = 0,
        motions: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if size not in (32, 64):
            raise UserError(f"data.size={size!r} is not possible for clips; choose 32 or 64")
        if not 1 <= frames <= MOST_FRAMES:
            raise UserError(
                f"data.frames={frames} is not possible for clips; choose 1 … {MOST_FRAMES}"
            )
        self.motions = tuple(MOTIONS if motions is None else motions)
        for motion in self.motions:
            if motion not in MOTIONS:
                raise UserError(
                    f"data.motions: motion {motion!r} is unknown; {nearest(motion, MOTIONS)}"
                )
        if not self.motions:
            raise UserError(f"clips: motions=() leaves none; choose from {', '.join(MOTIONS)}")
        self.height = self.width = size
        self.frames, self.seed, self.device = frames, seed, device

    def fetch(self, indices: Sequence[int]) -> Examples:
        """The samples at `indices`, each ≥ 0 and below 2⁵⁸. Raises IndexError for others."""
        table = self._table(indices)
        return Examples(
            latents=render_clips(table, self.frames, self.height, self.device),
            captions=[scene.caption for scene in table.scenes()],
        )

    def scenes(self, indices: Sequence[int]) -> list[ClipScene]:
        """The truth about samples: objects, their ways, and what the caption says."""
        return self._table(indices).scenes()

    def _table(self, indices: Sequence[int]) -> ClipTable:
        if any(not 0 <= index < 2**58 for index in indices):
            raise IndexError(f"clips has samples 0 … 2⁵⁸ - 1, asked for {list(indices)}")
        return draw_clips(self.seed, np.asarray(indices, dtype=np.uint64), self.motions)


def render_clips(
    table: ClipTable, frames: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Clips [B, 3, F, S, S] float32 in [-1, 1], anti-aliased as `render` does it. What is painted
    later covers what is there by its coverage c: x ← x + c·(colour − x)."""
    palette = torch.tensor([RGB[name] for name in COLOURS], device=device) * 2 - 1
    grounds = torch.tensor([RGB[name] for name in BACKGROUNDS], device=device) * 2 - 1
    ground = grounds[torch.from_numpy(table.background).to(device)]  # [B, 3]
    # Frame by frame, so that a frame's pixels lie together while it is painted.
    clips = ground[:, None, :, None, None].repeat(1, frames, 1, size, size)  # [B, F, 3, S, S]
    centre = places(table, frames)
    each = max(1, _CHUNK // frames)
    for start in range(0, len(table.count), each):
        rows = np.arange(start, min(start + each, len(table.count)))
        for layer in range(SLOTS):  # what is farther away first
            slot = np.where(layer == 1, table.front[rows], 1 - table.front[rows])
            there = slot < table.count[rows]
            _paint(clips, table, centre, rows[there], slot[there], palette)
    return clips.transpose(1, 2).contiguous()


def _paint(
    clips: Tensor,
    table: ClipTable,
    centre: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    palette: Tensor,
) -> None:
    """Paints object `slots` [N] of clips `rows` [N] into all frames of `clips` [B, F, 3, S, S]."""
    if not len(rows):
        return
    order = np.argsort(table.shape[rows, slots], kind="stable")
    rows, slots = rows[order], slots[order]
    frames, size = clips.shape[1], clips.shape[-1]
    radius = np.broadcast_to(table.radius[rows, slots, None, None], (len(rows), frames, 1))
    geometry = np.concatenate([centre[rows, slots], radius], axis=2).reshape(-1, 3) * size
    kinds = np.bincount(table.shape[rows, slots], minlength=len(SHAPES)) * frames
    cover = coverage(kinds, torch.from_numpy(geometry.astype(np.float32)).to(clips.device), size)
    cover = cover.view(len(rows), frames, 1, size, size)
    owner = torch.from_numpy(rows).to(clips.device)
    colour = palette[torch.from_numpy(table.colour[rows, slots]).to(clips.device)]
    below = clips[owner]
    clips[owner] = torch.lerp(below, colour[:, None, :, None, None].expand_as(below), cover)
