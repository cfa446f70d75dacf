"""Qwen3 as text encoder: what counts, what is cut, and that neighbours change nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

from mvsplit.errors import UserError
from tests.hub.tiny import TEXT_WIDTH, library, tiny_text_encoder, tiny_tokenizer

library("transformers")

from mvsplit.data.text_encoder import QwenEncoder  # noqa: E402

LENGTHS = (1, 7, 256)
PROMPTS = ["a", "a b c d", "c" * 256]


@pytest.fixture(scope="module")
def encoder() -> QwenEncoder:
    return QwenEncoder(tiny_tokenizer(), tiny_text_encoder())


def alone(encoder: QwenEncoder, prompt: str) -> torch.Tensor:
    """The last hidden state of the model on the tokens of one prompt, without padding."""
    ids = encoder.tokenizer(prompt, return_tensors="pt").input_ids
    return encoder.model(ids).last_hidden_state[0]


def test_states_are_those_of_each_prompt_alone(encoder):
    text, valid = encoder.encode(PROMPTS)
    assert valid.tolist() == list(LENGTHS)
    assert text.shape == (3, 256, TEXT_WIDTH)
    for row, prompt in enumerate(PROMPTS):
        expected = alone(encoder, prompt)
        torch.testing.assert_close(text[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert encoder.width == TEXT_WIDTH


def test_text_is_padded_to_the_longest_of_the_call_and_repeats_are_rows(encoder):
    text, valid = encoder.encode(["a b", "a", "a b"])
    assert text.shape[1] == 3
    assert valid.tolist() == [3, 1, 3]
    assert torch.equal(text[0], text[2])
    assert not torch.equal(text[0, 0], text[0, 1])


def test_attending_counts_the_padding(encoder):
    released = QwenEncoder(encoder.tokenizer, encoder.model, padding="attend")
    text, valid = released.encode(["a b", "a"])
    assert valid.tolist() == [3, 3]
    assert torch.equal(text, encoder.encode(["a b", "a"])[0])


def test_an_overlong_prompt_is_cut_and_says_by_how_much(encoder):
    message = r"prompt 'c{40}…' has 300 tokens; the last 44 are cut, 256 are read"
    with pytest.warns(UserWarning, match=message):
        text, valid = encoder.encode(["c" * 300])
    assert valid.tolist() == [256]
    assert torch.equal(text, encoder.encode(["c" * 256])[0])


def test_what_fits_exactly_is_not_cut(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["c" * 256])


def test_the_empty_prompt_is_one_padding_token(encoder):
    text, valid = encoder.encode([""])
    assert valid.tolist() == [1]
    expected = encoder.model(torch.tensor([[encoder.tokenizer.pad_token_id]])).last_hidden_state
    assert torch.equal(text, expected)
    beside, valid = encoder.encode(["", "a b"])
    assert valid.tolist() == [1, 3]
    torch.testing.assert_close(beside[0, :1], text[0], rtol=1e-4, atol=1e-5)


def test_it_comes_back_from_its_own_format(tmp_path, encoder):
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    back = QwenEncoder.load(str(tmp_path))
    assert torch.equal(back.encode(PROMPTS)[0], encoder.encode(PROMPTS)[0])
    assert back.fingerprint() == encoder.fingerprint()
    back.model.norm.weight[0] += 1e-3
    assert back.fingerprint() != encoder.fingerprint()


def test_a_missing_model_and_bad_options_are_one_line(tmp_path, encoder):
    with pytest.raises(UserError, match=r"text_encoder='.*nothing': neither a folder") as caught:
        QwenEncoder.load(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="padding='ignore' is unknown: choose mask or attend"):
        QwenEncoder(encoder.tokenizer, encoder.model, padding="ignore")
    with pytest.raises(UserError, match="prompts: none given"):
        encoder.encode([])
