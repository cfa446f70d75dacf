"""Diffusion-DPO's loss against a computation of its own in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from mvsplit.flow import implicit_rewards, preference_losses


def by_hand(losses: list[float], beta: float) -> tuple[float, list[float]]:
    """−log σ(m) of one pair and its derivatives by the four losses ℓ_θ(w), ℓ_ref(w), ℓ_θ(l),
    ℓ_ref(l), from m = −(β/2)·[(ℓ_θ(w) − ℓ_ref(w)) − (ℓ_θ(l) − ℓ_ref(l))] and
    d(−log σ(m))/dm = −σ(−m)."""
    w, w_ref, l, l_ref = losses
    m = -(beta / 2) * ((w - w_ref) - (l - l_ref))
    slope = -1 / (1 + math.exp(m))
    return math.log1p(math.exp(-m)), [slope * -(beta / 2) * sign for sign in (1, -1, -1, 1)]


@pytest.mark.parametrize("beta", [0.3, 7.0, 40.0])
def test_loss_and_gradient(beta: float) -> None:
    numbers = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    numbers.requires_grad_(True)
    w, w_ref, l, l_ref = numbers.unbind(1)
    rewards = implicit_rewards(w, w_ref, beta), implicit_rewards(l, l_ref, beta)
    losses = preference_losses(*rewards)
    losses.sum().backward()
    for row, loss, gradient in zip(numbers.tolist(), losses, numbers.grad, strict=True):
        expected, slopes = by_hand(row, beta)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-12)


def test_it_overflows_for_no_margin() -> None:
    """log(1 + exp(m)) written out would be infinite from m = 89 on in fp32."""
    far = torch.tensor([1e4, -1e4])
    assert preference_losses(-far, far).tolist() == [2e4, 0.0]
