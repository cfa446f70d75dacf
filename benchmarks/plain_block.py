"""The block as one would write it from the paper, for torch.compile: the rival of `train_step.py`.

Shapes: B batch, T tokens, D width, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from mvsplit.kernels import Segments


class PlainBlock(nn.Module):
    """The block of the paper as one would write it, for torch.compile."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def merge(self, x: Tensor, f: Tensor, rule: Any, segments: Segments) -> Tensor:
        rows = []
        for tokens in segments.slices:
            xs, fs = x[:, tokens].float(), f[:, tokens].float()
            mean_f, mean_x = fs.mean(1, keepdim=True), xs.mean(1, keepdim=True)
            rows.append(xs + rule.beta * (fs - mean_f) + rule.alpha * (mean_f - mean_x))
        z = torch.cat(rows, 1)
        return rms_norm(z, z.shape[-1:], None, rule.eps).to(x.dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        a, ffn = self.block.attention, self.block.ffn
        q, k, v = linear(x, a.qkv.weight).unflatten(-1, (3, a.heads, -1)).unbind(2)
        q, k = (self.rotate(t, cos, sin, a.eps) for t in (q, k))
        out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        f = linear(out.transpose(1, 2).flatten(-2), a.proj.weight)
        x = self.merge(x, f, self.block.rule_attention, segments)
        gate, value = linear(x, ffn.w13.weight).chunk(2, -1)
        return self.merge(
            x, linear(silu(gate) * value, ffn.w2.weight), self.block.rule_ffn, segments
        )

    def rotate(self, t: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        x1, x2 = t.float().chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        turned = torch.cat((x1 * c + x2 * s, x2 * c - x1 * s), -1)
        return rms_norm(turned, turned.shape[-1:], None, eps).to(t.dtype)
