"""The diffusion transformer: patches and text in one stream, L blocks, a linear head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.kernels import Segments, rms_norm
from mvsplit.models.block import Block
from mvsplit.models.config import DiTConfig, Mean
from mvsplit.models.init import initialise
from mvsplit.models.patching import patchify, unpatchify
from mvsplit.models.rope import rope_tables


class DiT(nn.Module):
    """Velocity of a rectified flow from noisy latents and text (paper §3).

    The stream is [image tokens ; text tokens], one segment each; the tokens of a clip lie frame
    after frame, and `config.mean` says what of it is a segment. The network has no timestep input:
    it reads the time from the latents.

    Args:
        config: the shape.
        generator: source of the initial weights; the default generator if None.
    """

    def __init__(self, config: DiTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_in = nn.Linear(config.patch_values, config.width)
        self.text_in = (
            nn.Linear(config.text_width, config.width, bias=False)
            if config.text_width != config.width
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(blocks := [Block(config) for _ in range(config.depth)])
        self.normalised = all(block.rule_ffn.normalised for block in blocks)
        self.head = nn.Linear(config.width, config.patch_values)
        initialise(self, config, generator)

    def forward(self, latents: Tensor, text: Tensor, text_valid: Tensor | None = None) -> Tensor:
        """
        Args:
            latents: z_t, [B, C, H, W]; H and W divisible by the patch, not necessarily equal. Or of
                clips, [B, C, F, H, W]; a clip of one frame is a picture.
            text: text states [B, T, text_width], padded at the end.
            text_valid: [B] real text tokens of each sample. None attends to all of them, padding
                included, as the released model does.

        Returns:
            The velocity, as large as the latents (`mvsplit.flow` says in which direction).

        Raises:
            UserError: a shape that does not fit the configuration.
        """
        self._check(latents, text, text_valid)
        size = latents.shape[2:]
        frames, rows, columns = self.config.patch_grid(size)
        x, segments = self.embed(latents, text, text_valid)
        cos, sin = rope_tables(
            rows,
            columns,
            text.shape[1],
            self.config.head_width,
            self.config.rope_theta,
            latents.device,
            frames,
        )
        for block in self.blocks:
            x = block(x, cos, sin, segments)
        return self.read_out(x, size)

    def embed(
        self, latents: Tensor, text: Tensor, text_valid: Tensor | None
    ) -> tuple[Tensor, Segments]:
        """The stream [B, T, D] that enters the first block, and its segments."""
        patches = patchify(latents, self.config.patch, self.config.patch_frames)
        grid = self.config.patch_grid(latents.shape[2:])
        segments = stream_segments(grid, text.shape[1], text_valid, self.config.mean)
        if segments.mask is not None:  # so that not even NaN in the padding can spread
            text = torch.where(segments.mask[:, patches.shape[1] :, None], text, 0)
        eps = self.config.norm_eps
        image_tokens = rms_norm(self.patch_in(patches), eps)
        text_tokens = rms_norm(self.text_in(text), eps)
        return torch.cat((image_tokens, text_tokens), dim=1), segments

    def read_out(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The velocity of latents of `size`, (H, W) or (F, H, W), from the stream [B, T, D] that
        leaves the last block."""
        image = x[:, : math.prod(self.config.patch_grid(size))]
        if not self.normalised:
            image = rms_norm(image, self.config.norm_eps)
        return unpatchify(self.head(image), self.config.patch, size, self.config.patch_frames)

    def _check(self, latents: Tensor, text: Tensor, text_valid: Tensor | None) -> None:
        c = self.config
        if latents.ndim not in (4, 5) or latents.shape[1] != c.channels:
            raise UserError(
                f"latents have shape {list(latents.shape)}; expected [batch, {c.channels}, H, W], "
                f"or [batch, {c.channels}, frames, H, W]"
            )
        height, width = latents.shape[-2:]
        if height % c.patch or width % c.patch:
            raise UserError(
                f"image size {height}×{width} is not divisible by "
                f"model.patch={c.patch}; resize, or choose a patch that divides both sides"
            )
        c.check_frames(latents.shape[2] if latents.ndim == 5 else 1)
        if text.ndim != 3 or text.shape[2] != c.text_width or text.shape[0] != latents.shape[0]:
            raise UserError(
                f"text has shape {list(text.shape)}; expected "
                f"[{latents.shape[0]}, tokens, {c.text_width}]"
            )
        if text_valid is not None and text_valid.shape != text.shape[:1]:
            raise UserError(
                f"text_valid has shape {list(text_valid.shape)}; expected [{text.shape[0]}]"
            )


def stream_segments(
    grid: tuple[int, int, int], text_tokens: int, text_valid: Tensor | None, mean: Mean
) -> Segments:
    """What has a mean of its own in the stream [frames·rows·columns of a clip ; text].

    | mean | lengths |
    |---|---|
    | clip | (frames·rows·columns, text) |
    | frame | rows·columns for each frame, then text |
    | sequence | (frames·rows·columns + text) |

    A picture has one frame.

    Args:
        grid: frames, rows and columns of patches.
        text_tokens: of the longest text.
        text_valid: [B] real text tokens of each sample; None: all are.
    """
    image, frames = math.prod(grid), grid[0]
    if mean == "clip":
        return Segments.image_and_text(image, text_tokens, text_valid)
    if mean == "sequence":
        valid = None if text_valid is None else text_valid[:, None] + image
        return Segments((image + text_tokens,), valid, real_first=True)
    valid = None
    if text_valid is not None:
        counts = [torch.full_like(text_valid, image // frames)] * frames
        valid = torch.stack((*counts, text_valid), dim=1)
    return Segments((*(image // frames,) * frames, text_tokens), valid, real_first=True)
