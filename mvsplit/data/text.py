"""A frozen text embedder of whole words that needs no download and never changes.

A token is [word ; position]. The word part is ±1, its signs the bits of SHAKE-256(seed, word), so
distinct words are nearly orthogonal and every machine agrees on every bit. The position part tells
"a red circle left of a blue square" from "a blue circle left of a red square", which the backbone
cannot: it gives text tokens no rotary position (paper, section 3).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvsplit.errors import UserError, nearest_of_all

_WORD = re.compile(r"[^\W\d_]+|\d+")  # a run of letters or a run of digits; the rest separates
_NUMERALS = {
    "0": "zero",
    "1": "one",
    "2": "two",
    "3": "three",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
}
_NULL = ""  # the word of the unconditional prompt


def split_words(prompt: str) -> list[str]:
    """Lower-case words; punctuation only separates; 0 … 9 in figures are the number words."""
    return [_NUMERALS.get(word, word) for word in _WORD.findall(prompt.casefold())]


class WordEmbedder:
    """Encodes prompts made of the words of `vocabulary`.

    Args:
        vocabulary: distinct lower-case words.
        width: length Dc of a token; of it, position takes a quarter if there can be two tokens.
        seed: which embedding; part of what a trained network has learned.
        max_tokens: longest prompt, in words.

    Raises UserError for a vocabulary or a width that cannot be used.
    """

    def __init__(
        self, vocabulary: Sequence[str], width: int, seed: int = 0, max_tokens: int = 32
    ) -> None:
        self.vocabulary = tuple(vocabulary)
        self.width, self.seed, self.max_tokens = width, seed, max_tokens
        self._check()
        position_width = 0 if max_tokens == 1 else 2 * max(1, width // 8)
        words = word_signs((_NULL, *self.vocabulary), width - position_width, seed)
        if len(torch.unique(words, dim=0)) < len(words):
            raise UserError(
                f"text width: {width} is too small to tell {len(self.vocabulary)} words apart; "
                "use a larger width"
            )
        # The last row, which index -1 names, is the padding.
        self._words = torch.cat([words, words.new_zeros(1, words.shape[1])])
        self._positions = position_table(max_tokens, position_width)  # [max_tokens, position width]
        self._index = {word: row for row, word in enumerate((_NULL, *self.vocabulary))}

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text [B, T, Dc] float32 and valid [B] int64, for B prompts of T words at most.

        Every real token has an RMS of one; padding is zero. "" is one null token.

        Raises UserError for an unknown word and for a prompt of more than `max_tokens` words.
        """
        if not prompts:
            raise UserError("prompts: none given; give at least one")
        rows = [self._rows(prompt) for prompt in prompts]
        length = max(len(row) for row in rows)
        padded = torch.tensor([row + [-1] * (length - len(row)) for row in rows])  # [B, T]
        positions = self._positions[:length] * (padded >= 0).unsqueeze(-1)
        text = torch.cat([self._words[padded], positions], dim=-1)
        return text, torch.tensor([len(row) for row in rows])

    def spec(self) -> dict[str, Any]:
        """A description that JSON can hold and `from_spec` reads back."""
        return {
            "kind": "words",
            "vocabulary": list(self.vocabulary),
            "width": self.width,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> WordEmbedder:
        """The embedder that `spec` describes. Raises UserError where it describes none."""
        known = {"kind", "vocabulary", "width", "seed", "max_tokens"}
        if set(spec) != known or spec["kind"] != "words":
            raise UserError(
                f"embedder: fields {sorted(spec)} of kind {spec.get('kind')!r} cannot be read; "
                f"a word embedder has kind 'words' and exactly {sorted(known)}"
            )
        return cls(**{field: value for field, value in spec.items() if field != "kind"})

    def _rows(self, prompt: str) -> list[int]:
        words = split_words(prompt) if prompt.strip() else [_NULL]
        if not words:
            raise UserError(f'prompt: {prompt!r} has no words; write "" for no condition')
        if len(words) > self.max_tokens:
            begins = shorten(prompt, 60, placeholder=" …")
            raise UserError(
                f"prompt: {begins!r} has {len(words)} words, at most {self.max_tokens} are "
                f"possible; shorten it by {len(words) - self.max_tokens}"
            )
        unknown = [word for word in words if word not in self._index]
        if unknown:
            raise UserError(
                f"prompt: unknown word {unknown[0]!r} in {prompt!r}; "
                f"{nearest_of_all(unknown[0], self.vocabulary)}"
            )
        return [self._index[word] for word in words]

    def _check(self) -> None:
        for word in self.vocabulary:
            if split_words(word) != [word]:
                raise UserError(f"vocabulary: {word!r} is not one lower-case word; split it")
        if not self.vocabulary or len(set(self.vocabulary)) < len(self.vocabulary):
            raise UserError("vocabulary: empty or with a word twice; give distinct words")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} leaves no word; use at least 1")
        if self.width < 4:
            raise UserError(f"text width: {self.width} is too small; use at least 4")


def word_signs(words: Sequence[str], width: int, seed: int) -> Tensor:
    """[words, width] of ±1."""
    rows = []
    for word in words:
        name = f"mvsplit word {seed} {word}".encode()
        digest = hashlib.shake_256(name).digest(-(-width // 8))
        rows.append(np.unpackbits(np.frombuffer(digest, dtype=np.uint8), bitorder="little")[:width])
    return torch.from_numpy(np.stack(rows).astype(np.float32) * 2 - 1)


def position_table(length: int, width: int) -> Tensor:
    """[length, width], width even: √2·(sin ωp, cos ωp) for angular frequencies ω in 1 … 1/length.

    Every pair has an RMS of one.
    """
    pairs = width // 2
    table = [
        [math.sqrt(2) * wave(position * length ** (-pair / pairs))]
        for position in range(length)
        for pair in range(pairs)
        for wave in (math.sin, math.cos)
    ]
    return torch.tensor(table, dtype=torch.float32).reshape(length, width)
