"""Blocks that do nothing at first: what a deeper network computes, and that it can learn."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.models.growth import REFUSED, grown, new_layers, places
from mvsplit.models.surgery import into_mvsplit
from mvsplit.residuals import RULES
from tests.models.test_surgery import inputs, network

KEPT = [name for name in RULES if name not in REFUSED]
EXACT = ("prenorm", "sandwich")
EPS = 1e-5  # of every norm here


def deeper(model: DiT, depth: int, where: str = "evenly") -> DiT:
    generator = torch.Generator().manual_seed(8)
    return grown(model, depth, where=where, generator=generator)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["evenly", "end"])
@pytest.mark.parametrize("rule", KEPT)
def test_the_function_stays(rule: str, where: str) -> None:
    """To the bit where the trunk is not normalised; else up to ε/2 at each place, which three
    layers magnify a little, in fp32 as in fp64. Padding included."""
    model = network(rule, ffn_bias=True)
    for dtype in (torch.float32, torch.float64):
        shallow, args = copy.deepcopy(model).to(dtype), inputs(dtype)
        with torch.no_grad():
            before, after = shallow(*args), deeper(shallow, 11, where)(*args)
        if rule in EXACT:
            assert torch.equal(after, before)
        else:
            assert float((after - before).norm() / before.norm()) < EPS / 2


def test_gains_of_new_blocks_start_where_asked() -> None:
    """A deeper network wants a smaller β in its new blocks; the old keep what they have learned."""
    model = network("mvsplit")
    rule = replace(model.config.rule, beta=0.125)
    after = grown(model, 5, rule=rule, generator=torch.Generator().manual_seed(8))
    assert after.config.rule == rule
    old = {0: 0, 1: 1, 3: 2}  # places(3, 5, "evenly")
    for layer, block in enumerate(after.blocks):
        for branch in ("attention", "ffn"):
            beta = block.get_parameter(f"rule_{branch}.beta")
            if layer in old:
                before = model.get_parameter(f"blocks.{old[layer]}.rule_{branch}.beta")
                assert torch.equal(beta, before)
            else:
                assert (beta == 0.125).all()


def test_a_free_leak_is_closed_in_new_blocks() -> None:
    """A protected network leaks the mean by λ of its own; new blocks may not."""
    model = network("plain").double()
    into_mvsplit(model, gain=0.25)
    model.config = replace(model.config, rule=replace(model.config.rule, leak=0.3, alpha=0.4))
    args = inputs(torch.double)
    with torch.no_grad():
        before, after = model(*args), deeper(model, 7)(*args)
    assert float((after - before).norm() / before.norm()) < EPS / 2


def test_the_difference_is_that_of_one_norm_however_many_blocks() -> None:
    """δ = ε(1 − 1/m)/2 of X = Z/√(m + ε): computed here from the trunk itself, in fp64."""
    model = network("plain").double()
    trunks: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda *args: trunks.append(args[-1]))
    args = inputs(torch.double)
    model(*args)
    (x,) = trunks
    shrunk = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    expected = model.read_out(shrunk, (6, 4))
    for depth in (4, 20):
        torch.testing.assert_close(deeper(model, depth, "end")(*args), expected, rtol=0, atol=1e-9)
    assert 0 < (shrunk - x).norm() / x.norm() < EPS / 2


@pytest.mark.parametrize("rule", KEPT)
def test_new_blocks_can_learn(rule: str) -> None:
    """Every new branch has a parameter with a gradient; only its writer, or its gain, has."""
    model = deeper(network(rule), 5)
    model(*inputs()).square().sum().backward()
    ends = {"rezero": ("rule_attention.gain", "rule_ffn.gain")}
    for layer in new_layers(places(3, 5, "evenly"), 5):
        for end in ends.get(rule, ("attention.proj.weight", "ffn.w2.weight")):
            gradient = model.get_parameter(f"blocks.{layer}.{end}").grad
            assert gradient is not None
            assert gradient.norm() > 0


@pytest.mark.parametrize("rule", REFUSED)
def test_rules_that_cannot_keep_the_function_say_why(rule: str) -> None:
    with pytest.raises(UserError, match=rf"model.rule.name='{rule}' cannot grow in depth: .*"):
        deeper(network(rule), 5)
    reason = REFUSED[rule]
    assert "depends on the depth" in reason or "removes the token mean" in reason


def test_where_the_old_blocks_stand() -> None:
    assert places(2, 10, "evenly") == [0, 5]
    assert places(3, 7, "evenly") == [0, 2, 4]
    assert places(3, 7, "end") == [0, 1, 2]
    assert new_layers([0, 2, 4], 7) == [1, 3, 5, 6]
    for depth in (3, 2):
        with pytest.raises(UserError, match=f"depth={depth}: the network has 3 layers already"):
            places(3, depth, "evenly")
