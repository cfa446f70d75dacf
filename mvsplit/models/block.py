"""One block: attention joins the trunk by a rule, then the FFN joins it by a rule of its own."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mvsplit.kernels import Segments, qk_norm_rope, swiglu
from mvsplit.models.config import DiTConfig
from mvsplit.residuals import build_rule


class Attention(nn.Module):
    """Self-attention over all tokens with packed projections; padding is no key.

    `qkv` holds the rows of queries, then keys, then values; `proj` is the writer W_O.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.eps = config.heads, config.groups, config.qk_eps
        packed = (config.heads + 2 * config.groups) * config.head_width
        self.qkv = nn.Linear(config.width, packed, bias=config.attention_bias)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """x [B, T, D], tables [T, K/2] → [B, T, D]."""
        q, k, v = qk_norm_rope(self.qkv(x), cos, sin, self.heads, self.kv_heads, self.eps)
        keys = None if segments.mask is None else segments.mask[:, None, None, :]
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=keys, enable_gqa=self.heads != self.kv_heads
        )
        return self.proj(out.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """W_2(silu(gate)⊙value): `w13` packs the gate's rows, then the value's; `w2` is the writer."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.width, 2 * config.ffn_width, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x)))


class Block(nn.Module):
    """x ← rule(x, attention(x)), then x ← rule(x, FFN(x)). [B, T, D] → [B, T, D]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = {"width": config.width, "depth": config.depth}
        self.attention = Attention(config)
        self.rule_attention = build_rule(config.rule, **size, branch="attention")
        self.ffn = SwiGLU(config)
        self.rule_ffn = build_rule(config.rule, **size, branch="ffn")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        f = self.attention(self.rule_attention.enter(x), cos, sin, segments)
        x = self.rule_attention.merge(x, f, segments)
        f = self.ffn(self.rule_ffn.enter(x))
        return self.rule_ffn.merge(x, f, segments)
