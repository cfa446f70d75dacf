"""The frozen word embedder: stability, padding, spelling of prompts, errors."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

from mvsplit.data import Digits, WordEmbedder
from mvsplit.errors import UserError

WORDS = ("red", "blue", "circle", "square", "left", "of", "two", "a")


@pytest.fixture
def embedder():
    return WordEmbedder(WORDS, 32, seed=0, max_tokens=8)


def test_never_changes(embedder):
    """Stored values: a change here makes every trained network misread its prompts."""
    text, _ = embedder.encode(["red circle"])
    signs = "".join("+" if value > 0 else "-" for value in text[0, 1, :24])
    assert signs == "-+---+---+-----+-+--+--+"
    assert text[0, 1, :24].abs().eq(1).all()
    # Position 1, frequencies 8^(0, -1/4, -2/4, -3/4): √2·(sin, cos), worked out in fp64.
    expected = [
        math.sqrt(2) * wave(8 ** (-pair / 4)) for pair in range(4) for wave in (math.sin, math.cos)
    ]
    torch.testing.assert_close(text[0, 1, 24:].double(), torch.tensor(expected).double())


def test_signs_are_the_bits_of_the_hash():
    text, _ = WordEmbedder(("seven",), 20, seed=9, max_tokens=1).encode(["seven"])
    digest = int.from_bytes(hashlib.shake_256(b"mvsplit word 9 seven").digest(3), "little")
    assert text[0, 0].tolist() == [1.0 if digest >> bit & 1 else -1.0 for bit in range(20)]


def test_real_tokens_have_unit_rms_and_padding_is_zero(embedder):
    text, valid = embedder.encode(["a red circle left of a blue square", "", "two"])
    assert valid.tolist() == [8, 1, 1]
    assert valid.dtype == torch.int64
    rms = text.double().square().mean(-1).sqrt()
    real = torch.arange(8) < valid[:, None]
    torch.testing.assert_close(rms, real.double(), rtol=1e-6, atol=0)


def test_a_prompt_does_not_depend_on_its_batch(embedder):
    long = "red circle left of blue square"
    alone, _ = embedder.encode(["two"])
    padded, _ = embedder.encode([long, "two"])
    assert torch.equal(padded[1, :1], alone[0])


def test_word_order_shows(embedder):
    """As sets of tokens, for the backbone has no other sign of the order of words."""
    text, _ = embedder.encode(["red circle left of blue square", "blue circle left of red square"])
    first, second = (set(map(tuple, prompt.tolist())) for prompt in text)
    assert len(first & second) == 4


def test_vocabulary_order_and_company_do_not_matter():
    one = WordEmbedder(("red", "blue"), 32).encode(["red blue"])[0]
    two = WordEmbedder(("green", "blue", "red"), 32).encode(["red blue"])[0]
    assert torch.equal(one, two)
    assert not torch.equal(one, WordEmbedder(("red", "blue"), 32, seed=1).encode(["red blue"])[0])


@pytest.mark.parametrize(
    "spelling", ["Two red, CIRCLE!", "2 red circle", " two\n red-circle. ", "two_red_circle"]
)
def test_spelling(embedder, spelling):
    assert torch.equal(embedder.encode([spelling])[0], embedder.encode(["two red circle"])[0])


def test_numerals_are_digit_names():
    digits = WordEmbedder(Digits.vocabulary, 16, max_tokens=1)
    numerals = digits.encode([str(value) for value in range(10)])[0]
    assert torch.equal(numerals, digits.encode(Digits.vocabulary)[0])
    assert len(torch.unique(numerals, dim=0)) == 10


def test_blank_is_the_null_token(embedder):
    text, valid = embedder.encode(["", "  "])
    assert torch.equal(text[0], text[1])
    assert valid.tolist() == [1, 1]
    for word in WORDS:
        assert not torch.equal(embedder.encode([word])[0][0], text[0])


def test_spec_round_trip(embedder):
    again = WordEmbedder.from_spec(json.loads(json.dumps(embedder.spec())))
    assert again.spec() == embedder.spec()
    assert torch.equal(again.encode(["left of"])[0], embedder.encode(["left of"])[0])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a rad circle"], "prompt: unknown word 'rad' in 'a rad circle'; did you mean red"),
        (["a rad circle"], " known: a, "),
        (["a"] * 2 + ["a " * 9], "has 9 words, at most 8 are possible; shorten it by 1"),
        (["?!"], "prompt: '?!' has no words"),
        ([], "prompts: none given"),
    ],
)
def test_bad_prompts(embedder, prompts, message):
    with pytest.raises(UserError) as caught:
        embedder.encode(prompts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": ("Red",)}, "vocabulary: 'Red' is not one lower-case word"),
        ({"vocabulary": ("on top",)}, "vocabulary: 'on top' is not one lower-case word"),
        ({"vocabulary": ("red", "red")}, "vocabulary: empty or with a word twice"),
        ({"width": 2}, "text width: 2 is too small; use at least 4"),
        ({"width": 4, "vocabulary": tuple("abcdefgh")}, "text width: 4 is too small to tell 8"),
        ({"max_tokens": 0}, "max_tokens: 0 leaves no word"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        WordEmbedder(**{"vocabulary": WORDS, "width": 32, **arguments})
    assert message in str(caught.value)


@pytest.mark.parametrize("change", [{"kind": "qwen"}, {"extra": 1}])
def test_foreign_spec(embedder, change):
    with pytest.raises(UserError, match=r"embedder: fields .* cannot be read"):
        WordEmbedder.from_spec({**embedder.spec(), **change})
