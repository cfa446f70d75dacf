"""AdamW on weights in two halves: that these are fp32, and the update against torch's in fp64."""

import pytest
import torch

from mvsplit.kernels import split_adamw as split
from mvsplit.kernels.low_adamw import LowSettings


def draw(n, seed, scale=1.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def some_state(n):
    high, low_bits = split.split(draw(n, 1))
    first, second = draw(n, 2, 1e-2), draw(n, 3).square() * 1e-4
    return high, split.SplitState(low_bits, first, second)


def settings(update):
    return LowSettings(1e-3, 0.9, 0.999, 1e-8, 0.1, update)


@pytest.mark.parametrize("scale", [1e-38, 1e-8, 1.0, 3e37])
def test_two_halves_are_the_number_bit_for_bit(scale):
    x = torch.cat((draw(5000, 4, scale), torch.tensor([0.0, -0.0, 1.00390625, -1.00390625])))
    high, low_bits = split.split(x)
    assert torch.equal(split.join(high, low_bits).view(torch.int32), x.view(torch.int32))
    nearest = (high.double() - x.double()).abs() <= (x.bfloat16().double() - x.double()).abs()
    assert nearest.all()


def test_infinity_and_nan_stay():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    high, low_bits = split.split(x)
    assert torch.equal(split.join(high, low_bits)[:2], x[:2])
    assert high[2].isnan()
    assert not split.join(high, low_bits)[2].isfinite()


@pytest.mark.parametrize("fused", [False, True])
def test_many_small_updates_are_adamw(fused, device):
    """Far below the step of bf16, which would lose each of them; torch's AdamW in fp64 is right."""
    if fused:
        pytest.importorskip("triton")
        from mvsplit.kernels.fused.split_adamw import split_adamw_ as update
    else:
        update = split.reference_split_adamw_
    n = 2100
    values = draw(n, 5).bfloat16()
    exact = values.double().requires_grad_()
    adam = torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    start, state = values.clone(), split.SplitState.zeros(values.to(device))
    values = values.to(device)
    for step in range(1, 21):
        grads = draw(n, 5 + step, 1e-3).bfloat16()
        exact.grad = grads.double()
        adam.step()
        update(values, grads.to(device), state, settings(step))
    found = split.join(values.cpu(), state.low_bits.cpu())
    moved = (exact.detach() - start.double()).norm()
    assert (found.double() - exact.detach()).norm() < 1e-4 * moved
    assert torch.equal(values.cpu(), split.split(found)[0])
    assert (values.cpu().double() - exact.detach()).norm() > 0.05 * moved  # bf16 alone does not do


def test_kernel_equals_reference(device, poisoned_memory):
    """To rounding: a multiply-add may be fused. Products and sum of β·m + (1−β)·g are rounded three
    times or twice, to 2⁻²⁴ of each; where the two cancel, that is much of what is left, so that the
    bound is one of the terms: 4·2⁻²⁴ of them for both sides together."""
    pytest.importorskip("triton")
    from mvsplit.kernels.fused.split_adamw import split_adamw_ as fused

    n = 4097
    (wanted, wanted_state), grads = some_state(n), draw(n, 6, 0.1).bfloat16()
    values = wanted.clone().to(device)
    state = split.SplitState(*(t.clone().to(device) for t in wanted_state))
    terms = 0.9 * wanted_state.first.abs() + 0.1 * grads.float().abs()
    split.reference_split_adamw_(wanted, grads, wanted_state, settings(3))
    fused(values, grads.to(device), state, settings(3))
    whole = [
        split.join(v.cpu(), s.low_bits.cpu()) for v, s in ((values, state), (wanted, wanted_state))
    ]
    torch.testing.assert_close(*whole, rtol=1e-6, atol=1e-8)
    assert ((state.first.cpu() - wanted_state.first).abs() <= 2**-22 * terms).all()
    torch.testing.assert_close(state.second.cpu(), wanted_state.second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_shows_in_weights_and_both_moments(bad, fused, device):
    update = split.reference_split_adamw_
    if fused:
        pytest.importorskip("triton")
        from mvsplit.kernels.fused.split_adamw import split_adamw_ as update
    values, state = some_state(300)
    values, state = values.to(device), split.SplitState(*(t.to(device) for t in state))
    grads = draw(300, 7).bfloat16().to(device)
    grads[17] = bad
    update(values, grads, state, settings(3))
    for found in (values, state.first, state.second):
        assert not found[17].isfinite()
        assert found.isfinite().sum() == 299
