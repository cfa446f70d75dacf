"""The flow against formulas written out by hand, sample by sample."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.flow import (
    advance,
    flow_loss,
    interpolate,
    sample_times,
    schedule,
    shift_time,
    velocity_target,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 3, 2, 5, 7, generator=generator, dtype=torch.float64)
    return x0, x1


def test_the_path_is_a_line_from_data_at_0_to_noise_at_1(pair):
    x0, x1 = pair
    assert torch.equal(interpolate(x0, x1, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones(3)), x1)
    t = [0.1, 0.5, 0.83]
    z = interpolate(x0, x1, torch.tensor(t, dtype=torch.float64)).numpy()
    for i, time in enumerate(t):
        expected = x0[i].numpy() + time * (x1[i].numpy() - x0[i].numpy())
        np.testing.assert_allclose(z[i], expected, rtol=1e-13, atol=1e-14)


def test_a_scalar_time_is_the_time_of_every_sample(pair):
    x0, x1 = pair
    assert torch.equal(
        interpolate(x0, x1, torch.tensor(0.25)), interpolate(x0, x1, torch.full((3,), 0.25))
    )


def test_the_target_is_minus_the_time_derivative_of_the_path(pair):
    x0, x1 = pair
    later, earlier = (
        interpolate(x0, x1, torch.full((3,), t, dtype=torch.float64)) for t in (0.75, 0.25)
    )
    slope = (later - earlier) / 0.5
    torch.testing.assert_close(velocity_target(x0, x1), -slope, rtol=1e-12, atol=1e-13)


def test_the_loss_and_its_gradient(pair):
    x0, x1 = pair
    v = torch.full_like(x0, 0.5).requires_grad_()
    loss = flow_loss(v, x0, x1)
    loss.backward()
    difference = 0.5 - (x0.numpy() - x1.numpy())
    np.testing.assert_allclose(loss.item(), np.mean(difference**2), rtol=1e-13)
    np.testing.assert_allclose(v.grad.numpy(), 2 * difference / difference.size, rtol=1e-12)


def test_the_loss_of_bf16_velocities_is_summed_in_fp32(pair):
    x0, x1 = pair
    v = velocity_target(x0, x1).bfloat16()
    loss = flow_loss(v, x0.bfloat16(), x1.bfloat16())
    assert loss.dtype == torch.float32
    difference = v.double() - (x0.bfloat16().double() - x1.bfloat16().double())
    np.testing.assert_allclose(loss.item(), difference.square().mean().item(), rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 4.0, 0.5])
def test_following_the_exact_velocity_recovers_the_data(pair, shift):
    x0, x1 = pair
    z, times = x1, schedule(7, shift)
    for t, t_next in pairwise(times):
        z = advance(z, velocity_target(x0, x1), t, t_next)
        torch.testing.assert_close(z, interpolate(x0, x1, t_next), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, x0, rtol=1e-12, atol=1e-12)


def test_advance_to_the_ends_names_data_and_noise(pair):
    x0, x1 = pair
    z = interpolate(x0, x1, torch.tensor(0.7, dtype=torch.float64))
    v = velocity_target(x0, x1)
    torch.testing.assert_close(advance(z, v, 0.7, 0.0), x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(advance(z, v, 0.7, 1.0), x1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.25, 1.0, 4.0])
def test_shifting_multiplies_the_odds_of_noise_by_a(shift):
    t = np.linspace(0.01, 0.99, 37)
    odds = shift * t / (1 - t)  # t'/(1 − t') = a·t/(1 − t)
    np.testing.assert_allclose(shift_time(torch.tensor(t), shift), odds / (1 + odds), rtol=1e-12)


def test_the_schedule_is_the_papers():
    times = schedule(35, 4.0).tolist()
    assert times[0] == 1.0
    assert times[-1] == 0.0
    expected = [4.0 * (i / 35) / (1 + 3.0 * (i / 35)) for i in range(35, -1, -1)]
    np.testing.assert_allclose(times, expected, rtol=1e-14)


def test_times_are_uniform_then_shifted_and_come_from_the_generator():
    plain, shifted = (
        sample_times(20_000, shift=a, generator=torch.Generator().manual_seed(5)).double()
        for a in (1.0, 3.0)
    )
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    # The standard error of a quantile of 20,000 uniform draws is at most 0.5/√20000 = 0.0035.
    torch.testing.assert_close(plain.quantile(quantiles), quantiles, rtol=0, atol=0.015)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-6, atol=1e-6)
    assert plain.min() >= 0
    assert plain.max() < 1


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(UserError, match=r"shift=.*greater than 0"):
        schedule(4, shift)


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="steps=0: must be at least 1"):
        schedule(0)
