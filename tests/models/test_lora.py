"""Adapters: the formula, what is shared, and what is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.models.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    fingerprint,
    lora_parameters,
    merge_lora,
    without_lora,
)
from tests.models.test_surgery import inputs, network

CONFIG = LoRAConfig(rank=3, alpha=5.0)


def adapted(rule: str = "mvsplit", config: LoRAConfig = CONFIG) -> DiT:
    """A network whose adapters have learned something."""
    model = network(rule, ffn_bias=True)
    generator = torch.Generator().manual_seed(1)
    add_lora(model, config, generator=generator)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def test_the_formula() -> None:
    """y = (W + (α/r)·BA)x + b, against fp64."""
    base = nn.Linear(7, 5)
    lora = LoRALinear(base, CONFIG)
    nn.init.normal_(lora.lora_B.weight)
    assert lora.weight is base.weight
    x = torch.randn(2, 3, 7)
    w, a, b = (m.weight.double() for m in (base, lora.lora_A, lora.lora_B))
    expected = x.double() @ (w + (5.0 / 3) * b @ a).mT + base.bias.double()
    torch.testing.assert_close(lora(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.merged()(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_network_was_and_can_be_put_aside() -> None:
    plain = network("mvsplit", ffn_bias=True)
    before = plain(*inputs())
    model = network("mvsplit", ffn_bias=True)
    assert len(add_lora(model, CONFIG)) == 4 * 3
    torch.testing.assert_close(model(*inputs()), before)  # by its parts, which round otherwise
    learned = adapted()
    assert (learned(*inputs()) - before).abs().max() > 1e-2
    with without_lora(learned):
        torch.testing.assert_close(learned(*inputs()), before)
    assert (learned(*inputs()) - before).abs().max() > 1e-2


def test_merging_changes_no_function_and_leaves_no_adapter() -> None:
    model = adapted().double()
    args = inputs(torch.float64)
    before = model(*args)
    merge_lora(model)
    assert not lora_parameters(model)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(*args), before)


def test_the_fingerprint_is_of_the_values_of_the_base() -> None:
    model, other = network("plain"), network("plain")
    sha256 = fingerprint(model)
    assert fingerprint(other) == sha256
    assert fingerprint(other.double()) == sha256
    add_lora(other, CONFIG)
    assert fingerprint(other) == sha256
    with torch.no_grad():
        model.head.bias[1] += 1e-3
    assert fingerprint(model) != sha256


def test_targets_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match=r"lora.targets: no linear map is named 'qvk'.*qkv"):
        add_lora(network("plain"), LoRAConfig(targets=("qvk",)))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}):
        with pytest.raises(UserError, match=rf"lora\.{next(iter(wrong))}"):
            LoRAConfig(**wrong)


@pytest.mark.parametrize("learns", ["attention.qkv", "attention.proj", "ffn.w13", "ffn.w2", "rule"])
def test_frozen_weights_of_a_block_cost_no_gradient(learns: str) -> None:
    """The block as one node: the gradients of the rest are what they are when all learn."""
    gradients = []
    for freeze in (False, True):
        model = network("mvsplit")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not freeze or f".{learns}" in name)
        latents, text, _ = inputs()
        model(latents, text).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    of_all, of_some = gradients
    named = {n for n in of_all if f".{learns}" in n}
    assert named
    for name, gradient in of_some.items():
        whole = of_all[name]
        assert (gradient is not None) == (name in named)
        assert whole is not None
        assert gradient is None or torch.equal(gradient, whole)
