"""Euler and guidance against loops written out by hand, and against the released code's sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mvsplit.errors import UserError
from mvsplit.hub import load_released
from mvsplit.sampling import classifier_free, euler

GOLDEN = Path(__file__).parents[1] / "golden" / "released_tiny.safetensors"


class Counting:
    """Counts the calls of a network and the samples in them."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def __call__(self, latents, text, valid=None):
        self.batches.append(len(latents))
        return self.model(latents, text, valid)


def test_the_released_codes_sample_comes_out():
    golden = load_file(GOLDEN)
    weights = {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}
    model = load_released(weights, num_heads=2).requires_grad_(False)
    velocity = classifier_free(model, golden["io.text"][1:], golden["io.text"][:1], 2.0)
    sample = euler(velocity, golden["sample.noise"], steps=6, shift=4.0)
    expected = golden["sample.latents"]
    scale = expected.abs().max().item()
    torch.testing.assert_close(sample, expected, rtol=0, atol=1e-5 * scale)


def test_euler_is_the_papers_loop():
    def velocity(z, t):
        return torch.sin(z) * t + 0.3

    noise = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(2, 6)
    z, n, a = noise.numpy().copy(), 9, 4.0
    for i in range(n, 0, -1):
        t, t_next = (a * s / (1 + (a - 1) * s) for s in (i / n, (i - 1) / n))
        z += (t - t_next) * (np.sin(z) * t + 0.3)
    np.testing.assert_allclose(euler(velocity, noise, steps=n, shift=a), z, rtol=1e-13)


def test_euler_integrates_in_fp32_whatever_the_network_returns():
    noise = torch.ones(1, 4)
    one = torch.ones(1, 4, dtype=torch.bfloat16)
    sample = euler(lambda z, t: one, noise, steps=1000, shift=1.0)
    assert sample.dtype == torch.float32
    # In bf16, 1 + 0.001 is 1 and the sum would never leave it. In fp32 each sum rounds by 6e-8.
    torch.testing.assert_close(sample, noise + 1, rtol=0, atol=1e-4)


def test_the_callback_sees_every_state():
    seen = []
    noise = torch.ones(1, 2)
    end = euler(
        lambda z, t: z, noise, steps=3, shift=1.0, callback=lambda i, z: seen.append((i, z))
    )
    assert [i for i, _ in seen] == [1, 2, 3]
    for i, z in seen:
        torch.testing.assert_close(z, noise * (4 / 3) ** i)
    assert torch.equal(seen[-1][1], end)


@pytest.mark.parametrize("lengths", [(3, 3), (4, 2), (1, 4)])
@pytest.mark.parametrize("counted", [False, True])
def test_one_call_gives_what_two_calls_give(model, lengths, counted):
    generator = torch.Generator().manual_seed(0)
    text, null = (torch.randn(3, n, 24, generator=generator) for n in lengths)
    null = null[:1]
    text_valid = torch.tensor([1, lengths[0], 1]) if counted else None
    null_valid = torch.tensor([1]) if counted else None
    z = torch.randn(3, 1, 4, 6, generator=generator)
    counting = Counting(model)
    velocity = classifier_free(
        counting, text, null, 2.5, text_valid=text_valid, null_valid=null_valid
    )
    actual = velocity(z, 0.5)
    free = model(z, null.expand(3, -1, -1), None if null_valid is None else null_valid.expand(3))
    expected = free + 2.5 * (model(z, text, text_valid) - free)
    assert counting.batches == [6]
    # fp32 rounding through three blocks, times the scale
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (actual - free).abs().max() > 0.01


def test_counts_on_one_side_leave_the_other_whole(model):
    generator = torch.Generator().manual_seed(2)
    text, null = (torch.randn(2, 3, 24, generator=generator) for _ in range(2))
    z = torch.randn(2, 1, 4, 4, generator=generator)
    valid = torch.tensor([2, 1])
    actual = classifier_free(model, text, null, 3.0, text_valid=valid)(z, 1.0)
    free = model(z, null)
    expected = free + 3.0 * (model(z, text, valid) - free)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_without_guidance_the_network_sees_the_prompts_alone(model):
    text, null = torch.randn(2, 2, 24), torch.full((1, 5, 24), torch.nan)
    z = torch.randn(2, 1, 4, 4)
    counting = Counting(model)
    assert torch.equal(classifier_free(counting, text, null, 1.0)(z, 0.1), model(z, text))
    assert counting.batches == [2]


def test_a_wrong_number_of_null_prompts_is_refused(model):
    with pytest.raises(UserError, match="null_text holds 2 prompts for 3 samples; give 1 or 3"):
        classifier_free(model, torch.ones(3, 1, 24), torch.ones(2, 1, 24), 2.0)
