"""The text states of a cache, by caption.

Shapes: B prompts, T text tokens (the longest asked for), Dc text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mvsplit.data.cache import Cache
from mvsplit.data.encoders import TextEncoder
from mvsplit.data.shards import caption_hash
from mvsplit.errors import UserError


class CachedText:
    """The embedder of a cache: the states of its captions come from the disk, those of any other
    prompt from the text encoder that made the cache, loaded when the first such prompt comes.

    Args:
        cache: where the states lie.
        load_encoder: gives the text encoder of a name.
    """

    def __init__(self, cache: Cache, load_encoder: Callable[[str], TextEncoder]) -> None:
        self._cache, self._load_encoder = cache, load_encoder
        count = len(cache.manifest.shards)
        parts = [cache.shard(number).table("captions.hashes") for number in range(count)]
        shards = np.repeat(np.arange(count, dtype=np.int32), [len(part) for part in parts])
        rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
        # A caption of several shards has one hash; its states in the first of them are taken.
        self._hashes, first = np.unique(np.concatenate(parts), return_index=True)
        self._shards, self._rows = shards[first], rows[first]
        self._encoder: TextEncoder | None = None
        null = self._cached("")
        assert null is not None, "every shard holds the unconditional prompt"
        self.width = null.shape[1]

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text [B, T, Dc] float32, zero past the end of a prompt, and valid [B] int64.

        Raises UserError where a prompt is none of the captions and the text encoder that made the
        cache cannot be loaded or is another by now.
        """
        if not prompts:
            raise UserError("prompts: none given; give at least one")
        states = []
        for prompt in prompts:
            found = self._cached(prompt)
            states.append((self._encode(prompt) if found is None else found).float())
        return pad_sequence(states, batch_first=True), torch.tensor([len(s) for s in states])

    def spec(self) -> dict[str, Any]:
        """What must not change while a network is trained: the text encoder and its width."""
        settings = self._cache.manifest.settings
        return {"kind": "cache", "text_encoder": settings.text_encoder, "width": self.width}

    def _cached(self, prompt: str) -> Tensor | None:
        """[T, Dc] as stored, None where the prompt is no caption of the cache."""
        wanted = caption_hash(prompt)
        place = int(np.searchsorted(self._hashes, wanted))
        if place == len(self._hashes) or self._hashes[place] != wanted:
            return None
        shard, row = self._cache.shard(int(self._shards[place])), int(self._rows[place])
        if shard.string("captions", row) != prompt:
            return None  # another caption of the same hash: one in 10⁶ caches of 10⁶ captions
        bounds = shard.table("text.offsets")
        return shard.rows("text", bounds[row], bounds[row + 1])

    def _encode(self, prompt: str) -> Tensor:
        """[T, Dc] of any prompt."""
        settings = self._cache.manifest.settings
        if self._encoder is None:
            encoder = self._load_encoder(settings.text_encoder_name)
            if encoder.fingerprint() != settings.text_encoder:
                raise UserError(
                    f"prompt {prompt!r} is no caption of the cache, and the text encoder "
                    f"{settings.text_encoder_name} is not the one that made it; use a caption, or "
                    "the encoder that made it"
                )
            self._encoder = encoder
        text, valid = self._encoder.encode([prompt])
        return text[0, : int(valid[0])].cpu()
