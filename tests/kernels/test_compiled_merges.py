"""Every rule of the registry in one graph of torch.compile, forward and backward, beside eager."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mvsplit.kernels import Segments, forced_backend
from mvsplit.residuals import RULES, MVSplit, RuleConfig, UnnormedMVSplit, build_rule
from tests.kernels.fused import draw

WIDTH = 6
LAYOUTS = {"all real": None, "padded": [[3, 5], [3, 2]]}
CONFIGS = {name: RuleConfig(name=name) for name in RULES}
CONFIGS["λ apart"] = RuleConfig(tied_leak=False)


class Join(nn.Module):
    """A branch and the rule that joins it to the trunk."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.branch = rule, nn.Linear(WIDTH, WIDTH, bias=False)
        for i, p in enumerate(self.parameters()):
            p.data = draw(*p.shape, seed=10 + i)

    def forward(self, x, segments):
        return self.rule.merge(x, self.branch(self.rule.enter(x)), segments)


def outcome(join, x, segments, upstream):
    y = join(x, segments)
    return [y, *torch.autograd.grad(y, (x, *join.parameters()), upstream)]


def compare(join, device, layout, backend):
    """Triton's kernels are the same ones, reference ops may be traced into other ones."""
    torch._dynamo.reset()
    valid = None if layout is None else torch.tensor(layout, device=device)
    segments = Segments((3, 5), valid)
    dtype, least = (torch.float64, 1e-12) if backend == "reference" else (torch.float32, 0)
    x, upstream = (draw(2, 8, WIDTH, seed=i, dtype=dtype).to(device) for i in (1, 2))
    join, x = join.to(device, dtype), x.requires_grad_()
    compiled = torch.compile(join, fullgraph=True, backend="aot_eager")
    with forced_backend(backend):
        eager = outcome(join, x, segments, upstream)
        traced = outcome(compiled, x, segments, upstream)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(b, a, rtol=least, atol=least)
    return len(eager)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_rule_compiles_into_one_graph(config, layout, backend, device):
    rule = build_rule(config, width=WIDTH, depth=4, branch="attention")
    gains = len(list(rule.parameters()))
    assert compare(Join(rule), device, layout, backend) == 3 + gains


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_gain_in_all_three_places_compiles_too(backend, device):
    rule = UnnormedMVSplit(RuleConfig(tied_leak=False), width=WIDTH, depth=4, branch="ffn")
    rule.alpha = rule.leak = rule.beta
    assert isinstance(rule, MVSplit)
    assert compare(Join(rule), device, None, backend) == 4
