"""The backward without the mean adjoint, against a stop-gradient and dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvsplit.diagnostics.counterfactual import CenteredAdjoints, centered
from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.diagnostics.taps import taps_for_dit
from mvsplit.kernels import Segments
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig


def network(rule: str = "plain") -> DiT:
    config = DiTConfig(
        depth=3,
        width=16,
        heads=2,
        ffn_width=24,
        channels=2,
        text_width=16,
        rule=RuleConfig(name=rule, alpha=0.0),
        writers="standard",
    )
    return DiT(config, torch.Generator().manual_seed(3)).double()


def inputs() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(4)
    return {
        "latents": torch.randn(3, 2, 2, 3, generator=chance, dtype=torch.float64),
        "text": torch.randn(3, 4, 16, generator=chance, dtype=torch.float64),
        "text_valid": torch.tensor([4, 1, 2]),
    }


def gradients(model: DiT) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs()).sin().square().sum()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def dense_mean(segments: Segments, samples: int) -> Tensor:
    """J of each sample, [B, T, T], element by element."""
    j = torch.zeros(samples, segments.total, segments.total, dtype=torch.float64)
    for b in range(samples):
        for s, tokens in enumerate(segments.slices):
            n = int(segments.valid[b, s]) if segments.valid is not None else segments.lengths[s]
            real = range(tokens.start, tokens.start + n)
            for t in real:
                for u in real:
                    j[b, t, u] = 1 / n
    return j


def test_centered_is_p_of_every_segment() -> None:
    segments = Segments((5, 3), torch.tensor([[5, 2], [5, 3]]))
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    expected = x - dense_mean(segments, 2) @ x
    torch.testing.assert_close(centered(x, segments), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rule", ["plain", "mvsplit", "prenorm"])
@pytest.mark.parametrize("branches", [("attn",), ("ffn",), ("attn", "ffn")])
def test_it_is_the_gradient_with_the_mean_of_the_branch_held_constant(
    rule: str, branches: tuple[Any, ...]
) -> None:
    """U = PU + J·stop(U) has the value U and the adjoint Pδ."""
    model = network(rule)
    valid = torch.tensor([[6, 4], [6, 1], [6, 2]])
    j = dense_mean(Segments((6, 4), valid), 3)

    def hold(_: Any, args: Any, update: Tensor) -> Tensor:
        return update - j @ update + (j @ update).detach()

    hooks = []
    for block in model.blocks:
        writers = {"attn": block.attention.proj, "ffn": block.ffn.w2}
        hooks += [writers[name].register_forward_hook(hold) for name in branches]
    expected_loss, expected = gradients(model)
    for hook in hooks:
        hook.remove()
    plain_loss, plain = gradients(model)
    with CenteredAdjoints(taps_for_dit(model), branches):
        loss, found = gradients(model)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    same = torch.allclose(found["patch_in.weight"], plain["patch_in.weight"], rtol=1e-3)
    assert same == (rule == "mvsplit"), "at α = 0 MV-Split lets no mean adjoint through anyway"
    after = gradients(model)[1]
    assert all(torch.equal(after[name], plain[name]) for name in plain), "a hook was left behind"


def test_the_mean_coherent_gradient_of_the_chosen_writers_is_zero() -> None:
    model = network()
    taps = taps_for_dit(model)
    fields = ("g_mean_attn", "g_ctr_attn", "g_mean_ffn")
    probe = LayerProbe(taps, fields=fields, per_segment=True)
    with probe, CenteredAdjoints(taps, ("attn",)):
        gradients(model)
    columns = probe.arrays()
    for s in (0, 1):
        for layer in range(3):
            mean, rest = (columns[f"{f}_attn_segment_{s}"][layer] for f in ("g_mean", "g_ctr"))
            assert mean is not None
            assert rest is not None
            if layer < 2 or s == 0:  # text tokens of the last layer reach no loss
                assert mean <= 1e-12 * rest
            assert (columns[f"g_mean_ffn_segment_{s}"][layer] or 0) > 0 or (layer == 2 and s == 1)
