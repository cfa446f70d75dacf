"""Every sampler against an equation whose solution is known, in fp64: its order is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.flow import log_snr, schedule
from mvsplit.sampling.samplers import SAMPLERS, ab2, dpmpp_2m, euler, get_sampler, heun

NOISE = torch.tensor([[0.1, 0.35], [0.6, 0.85]], dtype=torch.float64)


def logistic(z, t):
    """v of dz/dt = z(1 − z)·5cos 3t: nonlinear in z, and t matters."""
    return -5 * z * (1 - z) * math.cos(3 * t)


def solution(start: float) -> torch.Tensor:
    """z(0) of `logistic` from NOISE at `start`: logit z grows by 5/3·sin 3t."""
    return torch.sigmoid(torch.logit(NOISE) - 5 / 3 * math.sin(3 * start))


def error(name: str, steps: int, shift: float, start: float) -> float:
    sample = get_sampler(name).sample
    end = sample(logistic, NOISE, steps=steps, shift=shift, start=start)
    assert end.dtype == torch.float64
    return (end - solution(start)).abs().max().item()


@pytest.mark.parametrize("start", [1.0, 0.7])
@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_measured_order_is_the_one_it_claims(name, shift, start):
    steps = np.array([80, 160, 320, 640])
    errors = [error(name, n, shift, start) for n in steps]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # λ runs to infinity at both ends of the path, which gives DPM-Solver++ an error of N⁻²·log N.
    slack = 0.4 if name == "dpmpp-2m" else 0.05
    assert order == pytest.approx(SAMPLERS[name].order, abs=slack)
    assert errors[-1] < 10.0 ** -(1 + SAMPLERS[name].order)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_evaluations_are_counted_as_they_are_made(name, steps):
    times = []

    def velocity(z, t):
        times.append(t)
        return torch.ones_like(z)

    get_sampler(name).sample(velocity, NOISE, steps=steps, shift=4.0)
    assert len(times) == SAMPLERS[name].evaluations(steps)
    assert 0 not in times  # where no velocity is defined by the data
    assert set(times) == set(schedule(steps, 4.0).tolist()[:-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_straight_path_is_walked_exactly_and_every_state_is_seen(name):
    data = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    noise = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    seen = []
    end = get_sampler(name).sample(
        lambda z, t: data - noise,
        noise,
        steps=5,
        shift=3.0,
        callback=lambda done, z: seen.append((done, z)),
    )
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5]
    for (_, z), t in zip(seen, schedule(5, 3.0).tolist()[1:], strict=True):
        torch.testing.assert_close(z, (1 - t) * data + t * noise, rtol=0, atol=1e-14)
    assert torch.equal(seen[-1][1], end)


def test_one_step_is_eulers_whoever_makes_it():
    one = {name: error(name, 1, 4.0, 1.0) for name in SAMPLERS}
    assert len(set(one.values())) == 1


def test_multistep_formulas_written_out():
    """Three steps from t = 0.8 by the sources' formulas, with α, σ and λ as they stand there."""
    t = schedule(3, 2.0, 0.8).numpy()
    z = NOISE.numpy().copy()
    v = []
    for i in range(3):
        v.append(logistic(z, t[i]))
        h = t[i] - t[i + 1]
        w = h / (t[i - 1] - t[i]) if i else 0.0
        z = z + h * ((1 + w / 2) * v[i] - w / 2 * v[i - 1])
    np.testing.assert_allclose(ab2(logistic, NOISE, steps=3, shift=2.0, start=0.8), z, rtol=1e-13)

    z, x = NOISE.numpy().copy(), []
    alpha, sigma = 1 - t, t
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    for i in range(3):
        x.append(z + t[i] * logistic(z, t[i]))
        h = lam[i + 1] - lam[i]
        d = x[i]
        if i == 1:  # not the first, not the last
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x[i] - 1 / (2 * r) * x[i - 1]
        z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * np.expm1(-h) * d
    actual = dpmpp_2m(logistic, NOISE, steps=3, shift=2.0, start=0.8)
    np.testing.assert_allclose(actual, z, rtol=1e-13)


def test_heun_written_out():
    (t0, t1, t2), z = schedule(2, 4.0).tolist(), NOISE
    v = logistic(z, t0)
    z = z + (t0 - t1) * (v + logistic(z + (t0 - t1) * v, t1)) / 2
    z = z + (t1 - t2) * logistic(z, t1)
    torch.testing.assert_close(heun(logistic, NOISE, steps=2, shift=4.0), z, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_integrates_in_fp32_whatever_the_network_returns(name):
    one = torch.ones(1, 4, dtype=torch.bfloat16)
    noise = torch.ones(1, 4, dtype=torch.bfloat16)
    end = get_sampler(name).sample(lambda z, t: one, noise, steps=1000, shift=1.0)
    assert end.dtype == torch.float32
    # In bf16, 1 + 0.001 is 1 and the sum would never leave it. In fp32 each sum rounds by 6e-8.
    torch.testing.assert_close(end, torch.full((1, 4), 2.0), rtol=0, atol=1e-4)


def test_the_schedule_from_the_middle():
    for shift in (0.3, 1.0, 4.0):
        assert torch.equal(schedule(9, shift, 1.0), schedule(9, shift))
        times = schedule(9, shift, 0.37)
        assert times[0] == 0.37
        assert times[-1] == 0
        assert (times.diff() < 0).all()
        back = times / (shift - (shift - 1) * times)  # the inverse of the shift
        torch.testing.assert_close(back.diff(), back.diff()[:1].expand(9))
    for start in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=r"start=.*greater than 0 and at most 1"):
            schedule(3, 1.0, start)


def test_log_snr_at_its_ends_and_between():
    assert (log_snr(1.0), log_snr(0.0)) == (-math.inf, math.inf)
    assert log_snr(0.2) == pytest.approx(math.log(4))


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"sampler='huen' is unknown; did you mean heun"):
        get_sampler("huen")
    assert get_sampler("euler").sample is euler
