"""A small network of ours and a step of it, for the tests of the probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.diagnostics.taps import LayerTap
from mvsplit.kernels import Segments
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig

DEPTH, BATCH, SIDE, TEXT = 3, 4, 3, 5
VALID = torch.tensor([5, 1, 0, 3])


def dit(rule: str = "mvsplit", dtype: torch.dtype = torch.float64) -> DiT:
    config = DiTConfig(
        depth=DEPTH,
        width=16,
        heads=4,
        kv_heads=2,
        ffn_width=24,
        channels=3,
        text_width=6,
        rule=RuleConfig(name=rule),
        writers="standard",
    )
    return DiT(config, torch.Generator().manual_seed(0)).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return latents.to(dtype), torch.randn(BATCH, TEXT, 6, generator=generator).to(dtype)


def step(model: nn.Module, valid: Tensor | None = VALID) -> None:
    latents, text = inputs(next(model.parameters()).dtype)
    model(latents, text, valid).square().mean().backward()


def first_two(segments: Segments) -> Segments:
    return Segments(segments.lengths, None if segments.valid is None else segments.valid[:2])


def segments_of(valid: Tensor | None) -> Segments:
    lengths = (SIDE * SIDE, TEXT)
    if valid is None:
        return Segments(lengths)
    return Segments(lengths, torch.stack((torch.full_like(valid, lengths[0]), valid), dim=1))


def assert_close(arrays: dict[str, list], other: dict[str, list], rtol: float = 1e-9) -> None:
    assert arrays.keys() == other.keys()
    for name, values in arrays.items():
        assert values == pytest.approx(other[name], rel=rtol, abs=1e-15, nan_ok=True), name


def probed(model: nn.Module, taps: list[LayerTap], **options: Any) -> dict[str, list]:
    model.zero_grad()
    with LayerProbe(taps, **options) as probe:
        step(model)
    return probe.arrays()
