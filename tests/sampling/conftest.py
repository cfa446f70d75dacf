"""A small network that does not start at zero, and the words it knows."""

from __future__ import annotations

import pytest
import torch

from mvsplit.data import WordEmbedder
from mvsplit.kernels.hopper import driver
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig


@pytest.fixture(scope="module")
def embedder() -> WordEmbedder:
    return WordEmbedder(("zero", "one", "two", "red", "circle", "left", "of"), 24, max_tokens=5)


@pytest.fixture(scope="module")
def model() -> DiT:
    config = DiTConfig(
        depth=3,
        width=32,
        heads=2,
        ffn_width=40,
        channels=1,
        text_width=24,
        patch=2,
        rule=RuleConfig(name="mvsplit", alpha=0.3),
        writers="standard",
    )
    return DiT(config, torch.Generator().manual_seed(1)).eval().requires_grad_(False)


@pytest.fixture
def word(monkeypatch):
    """Where kernels tell that a wait did not end."""
    word = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(driver, "_faults", [word])
    return word
