"""A network becomes MV-Split with no change of what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.surgery import gain_names, into_mvsplit, rules, writer_parameters
from mvsplit.residuals import MVSplit, RuleConfig

CONVERTIBLE = (
    "plain",
    "layerscale",
    "rezero",
    "deepnorm",
    "mvsplit",
    "mvsplit-attention-only",
    "hard-center",
)


def network(rule: str, *, ffn_bias: bool = False) -> DiT:
    """Three layers with writers and gains that are not at their start values."""
    config = DiTConfig(
        depth=3,
        width=24,
        heads=2,
        ffn_width=20,
        channels=2,
        patch=2,
        text_width=24,
        ffn_bias=ffn_bias,
        rule=RuleConfig(name=rule),
        writers="standard",
    )
    generator = torch.Generator().manual_seed(3)
    model = DiT(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".rule_" in name or name.endswith("bias"):
                parameter.normal_(0.5, 0.3, generator=generator)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(3, 2, 6, 4, generator=generator, dtype=dtype)
    text = torch.randn(3, 5, 24, generator=generator, dtype=dtype)
    return latents, text, torch.tensor([5, 1, 0])


@pytest.mark.parametrize("gain", [1.0, 2.0**-4])
@pytest.mark.parametrize("rule", CONVERTIBLE)
def test_the_function_stays_bit_for_bit(rule: str, gain: float) -> None:
    """Padding included; a whole network, so every merge in front of a norm."""
    model = network(rule, ffn_bias=True)
    latents, text, valid = inputs()
    before = [model(latents, text, valid), model(latents, text)]
    into_mvsplit(model, gain=gain)
    assert all(type(rule) is MVSplit for rule in rules(model))
    assert model.config.rule.name == "mvsplit"
    assert not model.config.rule.tied_leak
    assert torch.equal(model(latents, text, valid), before[0])
    assert torch.equal(model(latents, text), before[1])


@pytest.mark.parametrize(("rule", "value"), [("rezero", -0.5), ("mvsplit", 2.5)])
def test_learned_gains_that_no_start_may_have_are_taken_over(rule: str, value: float) -> None:
    model = network(rule)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".rule_" in name:
                parameter.fill_(value)
    latents, text, valid = inputs()
    before = model(latents, text, valid)
    into_mvsplit(model)
    assert torch.equal(model(latents, text, valid), before)


@pytest.mark.parametrize("rule", ["plain", "deepnorm"])
def test_another_gain_costs_a_rounding(rule: str) -> None:
    """W/g and g are each rounded once, 2⁻⁵³ in fp64; three layers magnify that a little."""
    model = network(rule).double()
    latents, text, valid = inputs(torch.float64)
    before = model(latents, text, valid)
    into_mvsplit(model, gain=0.3)
    torch.testing.assert_close(model(latents, text, valid), before, rtol=1e-12, atol=1e-13)


def test_gains_and_epsilon_are_those_of_the_rule_before() -> None:
    model = network("deepnorm")
    k = (2 * 3) ** 0.25
    into_mvsplit(model, gain=0.5)
    for rule in rules(model):
        assert isinstance(rule, MVSplit)
        assert rule.leak is not None
        torch.testing.assert_close(rule.beta, torch.full((24,), 0.5 / k))
        assert torch.equal(rule.alpha, rule.beta)
        assert not rule.leak.any()
        assert rule.eps == pytest.approx(1e-5 / k**2)


def test_gradients_of_the_writers_are_in_the_new_units() -> None:
    """F = gβ·(W/g)y, so ∂L/∂(W/g) = g·∂L/∂W; whatever is not a writer has the gradient it had."""
    plain = network("plain")
    split = copy.deepcopy(plain)
    new = into_mvsplit(split, gain=0.25)
    assert new == gain_names(split)
    assert len(new) == 3 * 2 * 3
    for model in (plain, split):
        model(*inputs()).square().mean().backward()
    ours = {id(p) for p in writer_parameters(split)}
    before = dict(plain.named_parameters())
    for name, parameter in split.named_parameters():
        if name not in new:
            scale = 0.25 if id(parameter) in ours else 1.0
            expected = before[name].grad * scale
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", ["prenorm", "sandwich", "keel"])
def test_other_rules_are_refused_and_left_alone(rule: str) -> None:
    model = network(rule)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=rf"model\.rule\.name='{rule}' cannot be turned"):
        into_mvsplit(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("gain", [0.0, 1.5, float("nan")])
def test_a_gain_outside_its_range_is_refused(gain: float) -> None:
    with pytest.raises(UserError, match="must be in"):
        into_mvsplit(network("plain"), gain=gain)
