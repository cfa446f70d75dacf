"""Captioned shapes: rendered scenes without end, made as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mvsplit.data.captions import CAPTION_WORDS, VOCABULARY
from mvsplit.data.render import render
from mvsplit.data.scenes import Scene, SceneTable, draw_scenes
from mvsplit.data.types import Examples
from mvsplit.errors import UserError


class Shapes:
    """Scenes of 1–4 coloured shapes, latents [B, 3, size, size] in [-1, 1], captions in English.

    Sample `index` depends on (seed, index) alone; it shows the same scene at either size.

    Args:
        size: pixels a side, 32 or 64.
        seed: which endless series.
        device: where pictures are rendered and left.
    """

    channels = 3
    size: int | None = None
    vocabulary = VOCABULARY
    caption_words = CAPTION_WORDS

    def __init__(self, size: int = 32, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if size not in (32, 64):
            raise UserError(f"data.size={size!r} is not possible for shapes; choose 32 or 64")
        self.height = self.width = size
        self.seed = seed
        self.device = device

    def fetch(self, indices: Sequence[int]) -> Examples:
        """The samples at `indices`, each ≥ 0 and below 2⁵⁸. Raises IndexError for others."""
        table = self._table(indices)
        return Examples(
            latents=render(table, self.height, self.device),
            captions=[scene.caption for scene in table.scenes()],
        )

    def scene(self, index: int) -> Scene:
        """The truth about sample `index`: objects, background, and what the caption says."""
        return self._table([index]).scenes()[0]

    def _table(self, indices: Sequence[int]) -> SceneTable:
        if any(not 0 <= index < 2**58 for index in indices):
            raise IndexError(f"shapes has samples 0 … 2⁵⁸ - 1, asked for {list(indices)}")
        return draw_scenes(self.seed, np.asarray(indices, dtype=np.uint64))
