from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvsplit.residuals import RuleConfig
from mvsplit.training import build_state
from mvsplit.training.gradient_families import family_norms
from mvsplit.training.nonfinite import families
from tests.training import runs

OUTSIDE = ("Embed", "Final")


@pytest.mark.parametrize("rule", ["mvsplit", "plain", "mvsplit-attention-only", "rezero"])
def test_norms_are_those_of_the_parameters_one_by_one(rule: str) -> None:
    model = replace(
        runs.MODEL, depth=3, rule=RuleConfig(name=rule), kv_heads=1, attention_bias=True
    )
    state = build_state(replace(runs.experiment(), model=model))
    chance = torch.Generator().manual_seed(5)
    expected: dict[tuple[str, int], float] = {}
    for name, parameter in state.model.named_parameters():
        parameter.grad.copy_(torch.randn(parameter.shape, generator=chance))
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        for family, part in families(state.model, name, parameter.grad, rows=0).items():
            square = float(part.double().square().sum())
            expected[family, layer] = expected.get((family, layer), 0.0) + square
    found = family_norms(state.model, state.optimizer.groups)
    assert {f: len(n) for f, n in found.items()} == {
        f: 1 if f in OUTSIDE else 3 for f, _ in expected
    }
    for (family, layer), square in expected.items():
        assert float(found[family][layer]) == pytest.approx(square**0.5, rel=1e-5)
