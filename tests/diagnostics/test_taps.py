"""The norms that are read every step, against plain loops over the parameters."""

from __future__ import annotations

import pytest
import torch

from mvsplit.diagnostics.taps import LayerTap, gradient_norms, taps_for_dit
from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig


def dit(depth: int, kv_heads: int = 1) -> DiT:
    config = DiTConfig(
        depth=depth, width=8, heads=2, kv_heads=kv_heads, ffn_width=6, channels=2, text_width=4
    )
    model = DiT(config)
    generator = torch.Generator().manual_seed(depth)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def explicit(model: DiT, deepest: int) -> dict[str, float]:
    squares = dict.fromkeys(("writer_attn", "writer_ffn", "query", "key"), 0.0)
    for block in model.blocks[-deepest:]:
        packed = block.attention.qkv.weight.grad
        kv_heads = (packed.shape[0] - 8) // 8
        parts = (
            block.attention.proj.weight.grad,
            block.ffn.w2.weight.grad,
            packed[:8],
            packed[8 : 8 + 4 * kv_heads],
        )
        for name, part in zip(squares, parts, strict=True):
            squares[name] += sum(float(g) ** 2 for g in part.flatten())
    return {f"grad_{name}": square**0.5 for name, square in squares.items()}


@pytest.mark.parametrize(("depth", "deepest"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_norms_of_the_deepest_quarter(depth: int, deepest: int, kv_heads: int) -> None:
    model = dit(depth, kv_heads)
    actual = gradient_norms(taps_for_dit(model))
    assert actual == pytest.approx(explicit(model, deepest), rel=1e-6)


def test_half_precision_gradients_are_summed_in_fp32() -> None:
    model = dit(4)
    rounded = model.to(torch.bfloat16)
    assert gradient_norms(taps_for_dit(rounded)) == pytest.approx(explicit(rounded, 1), rel=1e-6)


def test_non_finite_gradients_show() -> None:
    model = dit(4)
    model.blocks[-1].ffn.w2.weight.grad[0, 0] = torch.inf
    found = gradient_norms(taps_for_dit(model))
    assert found["grad_writer_ffn"] == float("inf")
    assert found["grad_query"] < 100


def test_a_model_without_attention_reports_what_it_has() -> None:
    model = dit(1)
    (tap,) = taps_for_dit(model)
    ffn_only = LayerTap(layer=0, block=tap.block, branches=tap.branches[1:])
    assert set(gradient_norms([ffn_only])) == {"grad_writer_ffn"}


def test_missing_gradients_are_explained() -> None:
    model = dit(2)
    model.blocks[1].attention.qkv.weight.grad = None
    with pytest.raises(UserError, match="grad_query of layer 1 has no gradient"):
        gradient_norms(taps_for_dit(model))
    with pytest.raises(UserError, match="no layer to watch"):
        gradient_norms([])
