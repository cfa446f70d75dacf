"""Attention over heads of unit RMS: no score is above √K, so that no maximum is looked for.

With queries and keys that were normalised, exp of a score is at most e^√K, which bf16 and fp32 hold
(e^11.4 at K = 128; fp16 does not). So a softmax needs neither a running maximum nor what it was
scaled by: sums and products with the values are added up as they come. Padding is left out where
the scores are made. The output and the log-sum-exp are those from which the backward of any flash
attention computes its gradients.

Shapes: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block

WIDEST = 128  # K, beyond which a tile does not stay in registers


class Tile(NamedTuple):
    """Queries of a block, keys of a step, warps, steps that load at once, registers of a thread."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int


# So that two blocks, two and four are on a processor at once: one multiplies, one exponentiates.
TILES = {
    "128 queries": Tile(128, 64, 8, 2, 128),
    "64 queries": Tile(64, 64, 4, 2, 168),
    "64 queries, 32 keys": Tile(64, 32, 4, 2, 128),
}


@triton.jit(do_not_specialize=["total"])
def unit_attention_kernel(
    p_q, p_k, p_v, p_mask, p_out, p_lse,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, total, scale,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    n_t = tl.cdiv(total, ROWS)
    o_t = (tl.program_id(0) % n_t) * ROWS + tl.arange(0, ROWS)
    i_h = tl.program_id(0) // n_t % H
    i_b = (tl.program_id(0) // n_t // H).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_q = (o_t < total)[:, None] & (o_k < K)[None, :]
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    b_q = tl.load(p_q + (o_t * s_qt)[:, None] + o_k[None, :], m_q, 0.0)
    part = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for first in range(0, total, KEYS):
        o_n = first + tl.arange(0, KEYS)
        m_n = (o_n < total)[:, None] & (o_k < K)[None, :]
        b_k = tl.load(p_k + (o_n * s_kt)[:, None] + o_k[None, :], m_n, 0.0)
        b_v = tl.load(p_v + (o_n * s_vt)[:, None] + o_k[None, :], m_n, 0.0)
        real = o_n < total
        if p_mask is not None:
            real = real & (tl.load(p_mask + i_b * total + o_n, real, 0) != 0)
        score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        weight = tl.where(real[None, :], tl.exp2(score * scale), 0.0)
        part += tl.sum(weight, 1)
        b_out = tl.dot(weight.to(b_v.dtype), b_v, b_out, input_precision="ieee")
    some = tl.where(part > 0, part, 1.0)  # a sample without a real token
    p_out += i_b * s_ob + i_h * s_oh
    b_out = (b_out / some[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + (o_t * s_ot)[:, None] + o_k[None, :], b_out, mask=m_q)
    tl.store(p_lse + (i_b * H + i_h) * total + o_t, tl.log(some), mask=o_t < total)


def unit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√K)V over the real keys, and the natural log-sum-exp of the scores.

    Args:
        q, k, v: [B, H, T, K], dense in K; rows of q and k of at most the norm √K.
        mask: [B, T] booleans, dense, true on real tokens; None: all are.

    Returns:
        The output [B, H, T, K], tokens before heads in memory, and [B, H, T, 1] fp32, dense. Rows
        of padding hold values without meaning.
    """
    batch, heads, total, width = q.shape
    out = q.new_empty(batch, total, heads, width).transpose(1, 2)
    lse = torch.empty(batch, heads, total, 1, dtype=torch.float32, device=q.device)
    strides = [s for t in (q, k, v, out) for s in t.stride()[:3]]
    grid = (triton.cdiv(total, tile.rows) * heads * batch,)
    options = {"maxnreg": tile.registers} if q.is_cuda else {}
    unit_attention_kernel[grid](
        q, k, v, None if mask is None else mask.view(torch.uint8), out, lse, *strides, total,
        math.log2(math.e) / math.sqrt(width),
        H=heads, K=width, BLOCK_K=max(16, block(width)), ROWS=tile.rows, KEYS=tile.keys,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return out, lse
