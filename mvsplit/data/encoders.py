"""What makes a cache: the two small interfaces, and encoders that need no download.

Shapes: B batch, C channels, H and W sides of a picture, h and w of its latents, T text tokens, Dc
text width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mvsplit.data.text import position_table, split_words, word_signs
from mvsplit.errors import UserError

_SHOWN = 40  # characters of a prompt in a message


class LatentEncoder(Protocol):
    """Pictures to latents."""

    @property
    def multiple(self) -> int:
        """Of which both sides of a picture must be one."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], about in [-1, 1], of latents [B, C, h, w]."""

    def fingerprint(self) -> str:
        """Changes where any latent would."""


class TextEncoder(Protocol):
    """Captions to text states; "" is the unconditional prompt."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text [B, T, Dc] and the number of real tokens of each prompt [B] int64, each ≥ 1."""

    def fingerprint(self) -> str:
        """Changes where any text state would."""


class Pixels:
    """The identity: the latents are the pixels."""

    multiple = 1

    def encode(self, images: Tensor) -> Tensor:
        """The pictures themselves, [B, 3, H, W]."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves, [B, 3, H, W]."""
        return latents

    def fingerprint(self) -> str:
        return "pixels"


class OpenWords:
    """Any words at all as fixed random signs, for laptops and tests: no download, no language.

    Each token is [word ; position] as in `WordEmbedder`, but the vocabulary is open.

    Args:
        width: Dc, at least 16.
        max_tokens: words after which a caption is cut.

    Raises UserError for a width or a length that cannot be used.
    """

    def __init__(self, width: int = 64, max_tokens: int = 64) -> None:
        if width < 16:
            raise UserError(f"text_encoder=words:{width}: too few to tell words apart; use 16 …")
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: leaves no word; use at least 1")
        self.width, self.max_tokens = width, max_tokens
        position_width = 2 * (width // 8)
        self._word_width = width - position_width
        self._positions = position_table(max_tokens, position_width)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text [B, T, Dc] float32, zero past the end of a caption, and valid [B] int64."""
        words = [self._words(prompt) for prompt in prompts]
        valid = torch.tensor([len(row) for row in words])
        text = torch.zeros(len(words), max(map(len, words)), self.width)
        for row, sentence in enumerate(words):
            text[row, : len(sentence), : self._word_width] = word_signs(
                sentence, self._word_width, seed=0
            )
            text[row, : len(sentence), self._word_width :] = self._positions[: len(sentence)]
        return text, valid

    def fingerprint(self) -> str:
        return f"words:{self.width}:{self.max_tokens}"

    def _words(self, prompt: str) -> list[str]:
        words = split_words(prompt) or [""]
        if len(words) > self.max_tokens:
            warnings.warn(
                f"prompt {prompt[:_SHOWN]!r}… has {len(words)} words; the last "
                f"{len(words) - self.max_tokens} are cut, {self.max_tokens} are read",
                stacklevel=3,
            )
        return words[: self.max_tokens]


def load_latent_encoder(name: str, device: torch.device | str = "cpu") -> LatentEncoder:
    """`pixels`, or the FLUX.2 autoencoder in a folder or of a hub id. Raises UserError for neither.

    Args:
        name: as `mvsplit encode --vae` takes it.
        device: where it runs.
    """
    if name == "pixels":
        return Pixels()
    from mvsplit.data.vae import Flux2Autoencoder

    return Flux2Autoencoder.load(name, device=device)


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """`words`, `words:WIDTH`, or a Qwen3 model in a folder or of a hub id.

    Args:
        name: as `mvsplit encode --text-encoder` takes it.
        device: where it runs.

    Raises UserError for a width that is no number and where there is no such model.
    """
    kind, _, width = name.partition(":")
    if kind != "words":
        from mvsplit.data.text_encoder import QwenEncoder

        return QwenEncoder.load(name, device=device)
    if width and not width.isdecimal():
        raise UserError(f"text_encoder={name!r}: {width!r} is no width; write words:64 for example")
    return OpenWords(int(width)) if width else OpenWords()


def to_images(pictures: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """Pictures [H, W, 3] uint8, all of one size, as [B, 3, H, W] float32 in [-1, 1]."""
    bytes_BHWC = torch.from_numpy(np.stack(pictures)).to(device)
    return bytes_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
