"""Guidance in an interval of times, and its rescaling, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.sampling import SAMPLERS, SamplingConfig, classifier_free, euler, generate
from mvsplit.sampling.guidance import rescaled
from tests.sampling.test_euler_and_guidance import Counting


def parts(model, seed=0):
    """z, text and null text of three samples, and the two velocities of each."""
    generator = torch.Generator().manual_seed(seed)
    text, null = (torch.randn(n, 3, 24, generator=generator) for n in (3, 1))
    z = torch.randn(3, 1, 4, 6, generator=generator)
    return z, text, null, model(z, null.expand(3, -1, -1)), model(z, text)


def test_guidance_is_there_in_its_interval_only(model):
    z, text, null, free, conditional = parts(model)
    counting = Counting(model)
    velocity = classifier_free(counting, text, null, 3.0, interval=(0.2, 0.8))
    mixed = free + 3.0 * (conditional - free)
    for t, expected in ((0.1, conditional), (0.2, conditional), (0.21, mixed), (0.8, mixed)):
        # fp32 rounding through three blocks, times the scale
        torch.testing.assert_close(velocity(z, t), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(velocity(z, 0.81), conditional)
    assert counting.batches == [3, 3, 6, 6, 3]
    assert (mixed - conditional).abs().max() > 0.01


def test_the_whole_interval_is_plain_guidance_to_the_bit(model):
    z, text, null, *_ = parts(model)
    whole = classifier_free(model, text, null, 3.0, interval=(0.0, 1.0), rescale=0.0)
    plain = classifier_free(model, text, null, 3.0)
    for t in (0.0, 1e-9, 0.5, 1.0, 999.0):
        assert torch.equal(whole(z, t), plain(z, t))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_gives_every_sample_its_own_deviation(model, share):
    z, text, null, free, conditional = parts(model)
    free, conditional = free.double().numpy(), conditional.double().numpy()
    expected = np.empty_like(free)
    for i in range(3):
        v = free[i] + 4.0 * (conditional[i] - free[i])
        expected[i] = share * v * conditional[i].std() / v.std() + (1 - share) * v
    actual = classifier_free(model, text, null, 4.0, rescale=share)(z, 0.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
    if share == 1:
        np.testing.assert_allclose(
            actual.std((1, 2, 3), correction=0), conditional.std((1, 2, 3)), rtol=1e-4
        )


def test_rescaling_of_equal_velocities_changes_nothing():
    v = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(rescaled(v, v, 0.7), v, rtol=1e-14, atol=0)
    torch.testing.assert_close(rescaled(5 * v, v, 1.0), v, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_passes_are_counted_as_the_network_runs(model, embedder, name):
    for options in (
        {"guidance": 1.0},
        {"guidance": 2.0},
        {"guidance": 2.0, "guidance_interval": (0.3, 0.9)},
    ):
        counting = Counting(model)
        counting.parameters = model.parameters
        config = SamplingConfig(steps=5, sampler=name, shift=2.0, **options)
        list(generate(counting, embedder, ["one", "two"], (1, 4, 6), config))
        assert sum(counting.batches) == 2 * config.passes()
    assert SamplingConfig(steps=35).passes() == 70


def test_options_reach_the_velocity(model, embedder):
    def draw(**options):
        config = SamplingConfig(steps=4, guidance=4.0, **options)
        return next(generate(model, embedder, ["red circle"], (1, 4, 6), config)).latents

    made = [
        draw(),
        draw(guidance_interval=(0.0, 0.5)),
        draw(guidance_rescale=0.7),
        *(draw(sampler=name) for name in SAMPLERS if name != "euler"),
    ]
    for i in range(len(made)):
        for j in range(i):
            assert (made[i] - made[j]).abs().max() > 1e-3, (i, j)


def test_an_interval_at_the_noisy_end_leaves_the_rest_to_the_prompt(model):
    """Euler's last steps are those of the conditional network alone."""
    z, text, null, *_ = parts(model, seed=3)
    seen = []
    velocity = classifier_free(model, text, null, 3.0, interval=(0.5, 1.0))
    euler(velocity, z, steps=4, shift=1.0, callback=lambda i, state: seen.append(state))
    later = euler(lambda s, t: model(s, text), seen[1], steps=2, shift=1.0, start=0.5)
    torch.testing.assert_close(seen[-1], later, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval=0.5 0.5: give two times"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval=-0.1 0.5"),
        ({"guidance_interval": (0.1, float("nan"))}, "guidance_interval=0.1 nan"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale=1.5: must be in \[0, 1\]"),
        ({"sampler": "eular"}, "sampler='eular' is unknown; did you mean euler"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**option)
