"""The diffusion transformer: patches and text in one stream, L blocks, a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.kernels import Segments, rms_norm
from mvsplit.models.block import Block
from mvsplit.models.config import DiTConfig
from mvsplit.models.init import initialise
from mvsplit.models.patching import patchify, unpatchify
from mvsplit.models.rope import rope_tables


class DiT(nn.Module):
    """Velocity of a rectified flow from noisy latents and text (paper §3).

    The stream is [image tokens ; text tokens], one segment each. The network has no timestep
    input: it reads the time from the latents.

    Args:
        config: the shape.
        generator: source of the initial weights; the default generator if None.
    """

    def __init__(self, config: DiTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        values = config.channels * config.patch**2
        self.patch_in = nn.Linear(values, config.width)
        self.text_in = (
            nn.Linear(config.text_width, config.width, bias=False)
            if config.text_width != config.width
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(blocks := [Block(config) for _ in range(config.depth)])
        self.normalised = all(block.rule_ffn.normalised for block in blocks)
        self.head = nn.Linear(config.width, values)
        initialise(self, config, generator)

    def forward(self, latents: Tensor, text: Tensor, text_valid: Tensor | None = None) -> Tensor:
        """
        Args:
            latents: z_t, [B, C, H, W]; H and W divisible by the patch, not necessarily equal.
            text: text states [B, T, text_width], padded at the end.
            text_valid: [B] real text tokens of each sample. None attends to all of them, padding
                included, as the released model does.

        Returns:
            The velocity [B, C, H, W] (`mvsplit.flow` says in which direction).

        Raises:
            UserError: a shape that does not fit the configuration.
        """
        self._check(latents, text, text_valid)
        height, width = latents.shape[2:]
        patch = self.config.patch
        x, segments = self.embed(latents, text, text_valid)
        cos, sin = rope_tables(
            height // patch,
            width // patch,
            text.shape[1],
            self.config.head_width,
            self.config.rope_theta,
            latents.device,
        )
        for block in self.blocks:
            x = block(x, cos, sin, segments)
        return self.read_out(x, segments, height, width)

    def embed(
        self, latents: Tensor, text: Tensor, text_valid: Tensor | None
    ) -> tuple[Tensor, Segments]:
        """The stream [B, T, D] that enters the first block, and its two segments."""
        patches = patchify(latents, self.config.patch)
        segments = Segments.image_and_text(patches.shape[1], text.shape[1], text_valid)
        if segments.mask is not None:  # so that not even NaN in the padding can spread
            text = torch.where(segments.mask[:, segments.slices[1], None], text, 0)
        eps = self.config.norm_eps
        image_tokens = rms_norm(self.patch_in(patches), eps)
        text_tokens = rms_norm(self.text_in(text), eps)
        return torch.cat((image_tokens, text_tokens), dim=1), segments

    def read_out(self, x: Tensor, segments: Segments, height: int, width: int) -> Tensor:
        """The velocity [B, C, H, W] from the stream [B, T, D] that leaves the last block."""
        image = x[:, segments.slices[0]]
        if not self.normalised:
            image = rms_norm(image, self.config.norm_eps)
        return unpatchify(self.head(image), self.config.patch, height, width)

    def _check(self, latents: Tensor, text: Tensor, text_valid: Tensor | None) -> None:
        c = self.config
        if latents.ndim != 4 or latents.shape[1] != c.channels:
            raise UserError(
                f"latents have shape {list(latents.shape)}; expected [batch, {c.channels}, H, W]"
            )
        if latents.shape[2] % c.patch or latents.shape[3] % c.patch:
            raise UserError(
                f"image size {latents.shape[2]}×{latents.shape[3]} is not divisible by "
                f"model.patch={c.patch}; resize, or choose a patch that divides both sides"
            )
        if text.ndim != 3 or text.shape[2] != c.text_width or text.shape[0] != latents.shape[0]:
            raise UserError(
                f"text has shape {list(text.shape)}; expected "
                f"[{latents.shape[0]}, tokens, {c.text_width}]"
            )
        if text_valid is not None and text_valid.shape != text.shape[:1]:
            raise UserError(
                f"text_valid has shape {list(text_valid.shape)}; expected [{text.shape[0]}]"
            )
