"""Tiny random instances of the very classes that the released model uses, and of the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig

TEXT_WIDTH = 24
MISSING = "the extra is not installed: pip install 'mvsplit[hub]'"


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=MISSING)


def tiny_vae() -> Any:
    """AutoencoderKLFlux2 with 32 latent channels at 1/8, and statistics unlike 0 and 1."""
    torch.manual_seed(0)
    vae = library("diffusers").AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=32
    )
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.01, 4, generator=generator)
    vae.bn.running_var[::7] = 1e-3  # so small that the size of ε is seen
    return vae.eval().requires_grad_(False)


def tiny_text_encoder() -> Any:
    """Qwen3Model, two layers."""
    transformers = library("transformers")
    torch.manual_seed(2)
    config = transformers.Qwen3Config(
        vocab_size=257, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=256,
        eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3Model(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny_tokenizer() -> Any:
    """Qwen2Tokenizer, which Qwen3 uses, with a token for each byte and no merges."""
    alphabet = library("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: i for i, character in enumerate(sorted(alphabet))}
    return library("transformers").Qwen2Tokenizer(
        vocab={**vocabulary, "<|endoftext|>": 256}, merges=[]
    )


def tiny_dit(**changes: Any) -> DiT:
    """Two blocks, no value of which is a start value; for the latents of `tiny_vae`."""
    shape = {
        "depth": 2, "width": 32, "heads": 2, "ffn_width": 40, "channels": 128,
        "text_width": TEXT_WIDTH, "rule": RuleConfig(name="mvsplit"),
    }  # fmt: skip
    model = DiT(DiTConfig(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)
