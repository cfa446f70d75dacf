"""The block as one would write it from the paper, as a function of its weights, so that one
torch.compile serves all layers: the rival of `engine.py`.

Shapes: B batch, T tokens, D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.models import DiT
from mvsplit.models.rope import rope_tables

IMAGE, TEXT = 256, 32  # tokens


def normalise(z: Tensor, eps: float) -> Tensor:
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)


def merge_formula(x: Tensor, f: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """Eq. 7–8 on two segments."""
    out = []
    for tokens in (slice(0, IMAGE), slice(IMAGE, None)):
        xs, fs = x[:, tokens].float(), f[:, tokens].float()
        mean_x, mean_f = xs.mean(1, keepdim=True), fs.mean(1, keepdim=True)
        out.append(xs + beta * (fs - mean_f) + alpha * (mean_f - mean_x))
    return normalise(torch.cat(out, 1), 1e-5).to(x.dtype)


def block_formula(
    x: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor, proj: Tensor, w13: Tensor, w2: Tensor,
    beta_a: Tensor, alpha_a: Tensor, beta_f: Tensor, alpha_f: Tensor,
) -> Tensor:  # fmt: skip
    """A block as one writes it."""
    q, k, v = functional.linear(x, qkv).unflatten(-1, (3, 8, 128)).permute(2, 0, 3, 1, 4)

    def rotated(h: Tensor) -> Tensor:
        h1, h2 = h.float().chunk(2, -1)
        return normalise(torch.cat((h1 * cos + h2 * sin, h2 * cos - h1 * sin), -1), 1e-6).to(
            h.dtype
        )

    mixed = functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
    x = merge_formula(
        x, functional.linear(mixed.transpose(1, 2).flatten(-2), proj), beta_a, alpha_a
    )
    gate, value = functional.linear(x, w13).float().chunk(2, -1)
    hidden = (functional.silu(gate) * value).to(x.dtype)
    return merge_formula(x, functional.linear(hidden, w2), beta_f, alpha_f)


def compiled_blocks(model: DiT, batch: int) -> Callable[[], None]:
    """All blocks of a model by one compiled function, for a CUDA graph."""
    step: Any = torch.compile(block_formula, dynamic=False)
    arguments = [
        (b.attention.qkv.weight, b.attention.proj.weight, b.ffn.w13.weight, b.ffn.w2.weight,
         b.rule_attention.beta, b.rule_attention.alpha, b.rule_ffn.beta, b.rule_ffn.alpha)
        for b in model.blocks
    ]  # fmt: skip
    side = int(IMAGE**0.5)
    cos, sin = rope_tables(side, side, TEXT, 128, 10_000.0, torch.device("cuda"))
    x = torch.randn(batch, IMAGE + TEXT, 1024, device="cuda").bfloat16()

    def run() -> None:
        z = x
        for tensors in arguments:
            z = step(z, cos, sin, *tensors)

    return run
