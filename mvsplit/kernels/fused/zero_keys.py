"""Leaves keys that are zero out of a finished softmax (`mvsplit.kernels.masked_attention`, Eq. 1).

Shapes: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block

_ROWS = 32  # rows (a token of a head) a program


@triton.jit(do_not_specialize=["rows", "total"])
def zero_keys_kernel(
    p_out, p_lse, p_padding, s_ob, s_oh, s_ot, s_lb, s_lh, s_lt, rows, total,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Rows in the order of memory: sample, token, head.
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = i < rows
    i_h = i % H
    i_t = i // H % total
    i_b = (i // H // total).to(tl.int64)
    p = p_lse + i_b * s_lb + i_h * s_lh + i_t * s_lt
    lse = tl.load(p, m, 0.0)
    share = tl.load(p_padding + i_b, m, 0.0) * tl.exp(-lse)  # m/Z
    tl.store(p, lse + tl.log(1 - share), mask=m)
    o_k = tl.arange(0, BLOCK_K)
    m_o = m[:, None] & (o_k < K)[None, :]
    p_o = p_out + (i_b * s_ob + i_h * s_oh + i_t * s_ot)[:, None] + o_k[None, :]
    out = tl.load(p_o, m_o, 0.0).to(tl.float32) / (1 - share)[:, None]
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_o)


def leave_out_zero_keys_(out: Tensor, lse: Tensor, padding: Tensor) -> None:
    """Corrects, in place, a softmax that `padding` keys and values of zero took part in.

    Args:
        out: [B, H, T, K], dense in K.
        lse: [B, H, T] or [B, H, T, 1] fp32, the natural log-sum-exp of the scores.
        padding: [B] fp32, such keys of each sample; fewer than all.
    """
    batch, heads, total, width = out.shape
    rows = batch * heads * total
    with torch.no_grad():
        zero_keys_kernel[(triton.cdiv(rows, _ROWS),)](
            out, lse, padding, *out.stride()[:3], *lse.stride()[:3], rows, total,
            H=heads, K=width, BLOCK_K=block(width), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
