"""Leaves keys that are zero out of a finished softmax (`mvsplit.kernels.masked_attention`, Eq. 1).

Z − m is exact to rounding while the real keys have a share in Z; where they have next to none, it
would be what is left of two large numbers. Tiles with such a row are computed anew from their
queries over the real keys alone, which is slow and rare: the mean score has to be below −5 or so.

The log-sum-exp goes to another tensor than it comes from. There is one for a row, fewer than a
program has threads, so that several warps load the same: in place, some would load what others had
stored already. Of the output, every thread loads and stores elements of its own.

Shapes: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block

_ROWS = 32  # tokens of a head a program
_KEYS = 32  # at a time, where a tile is computed anew
LEAST = 1 / 64  # share of the real keys in Z; the log-sum-exp is right to some 1e-6
_WARPS = 4


@triton.jit
def _anew(
    p_q, p_k, p_v, p_mask, s_kt, s_vt, o_q, m_q, total, scale,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Softmax over the real keys alone: output [ROWS, K] and log-sum-exp [ROWS]."""
    o_k = tl.arange(0, BLOCK_K)
    b_q = tl.load(p_q + o_q[:, None] + o_k[None, :], m_q[:, None] & (o_k < K)[None, :], 0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    part = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for first in range(0, total, KEYS):
        o_n = first + tl.arange(0, KEYS)
        real = (o_n < total) & (tl.load(p_mask + o_n, o_n < total, 0) != 0)
        m_n = real[:, None] & (o_k < K)[None, :]
        b_k = tl.load(p_k + (o_n * s_kt)[:, None] + o_k[None, :], m_n, 0.0)
        b_v = tl.load(p_v + (o_n * s_vt)[:, None] + o_k[None, :], m_n, 0.0)
        score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        score = tl.where(real[None, :], score, float("-inf"))
        now = tl.maximum(most, tl.max(score, 1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        weight = tl.exp(score - safe[:, None])
        fade = tl.exp(most - safe)
        part = part * fade + tl.sum(weight, 1)
        b_out = b_out * fade[:, None]
        b_out += tl.dot(weight.to(b_v.dtype), b_v, input_precision="ieee")
        most = now
    some = tl.where(part > 0, part, 1.0)
    return b_out / some[:, None], tl.where(part > 0, most + tl.log(some), 0.0)


@triton.jit
def _share(lse, padding):
    """Of the real keys in Z, which is at least m: (Z − m)/Z."""
    return 1 - padding * tl.exp(tl.where(padding > 0, -lse, 0.0))


@triton.jit(do_not_specialize=["rows", "total"])
def zero_keys_kernel(
    p_out, p_lse, p_new, p_padding, s_ob, s_oh, s_ot, s_lb, s_lh, s_lt, rows, total,
    LEAST: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Eq. 1; finite, but no more than that, where the share of the real keys is below LEAST."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # in the order of memory: token, then head
    m = i < rows
    i_h = i % H
    i_t = i // H % total
    i_b = (i // H // total).to(tl.int64)
    o_l = i_b * s_lb + i_h * s_lh + i_t * s_lt
    lse = tl.load(p_lse + o_l, m, 0.0)
    share = _share(lse, tl.load(p_padding + i_b, m, 0.0))
    share = tl.where(share < LEAST / 2, LEAST / 2, share)
    tl.store(p_new + o_l, lse + tl.log(share), mask=m)
    o_k = tl.arange(0, BLOCK_K)
    m_o = m[:, None] & (o_k < K)[None, :]
    p_o = p_out + (i_b * s_ob + i_h * s_oh + i_t * s_ot)[:, None] + o_k[None, :]
    out = tl.load(p_o, m_o, 0.0).to(tl.float32) / share[:, None]
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=["total"])
def lost_rows_kernel(
    p_out, p_lse, p_new, p_padding, p_q, p_k, p_v, p_mask,
    s_ob, s_oh, s_ot, s_lb, s_lh, s_lt, s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt,
    total, scale, LEAST: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Computes the rows anew in which the share of the real keys is below LEAST; a kernel of its
    own, for it would slow the other down by the registers that it takes."""
    i_h = tl.program_id(0) % H
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0) // H * ROWS + tl.arange(0, ROWS)
    m_t = o_t < total
    o_l = i_b * s_lb + i_h * s_lh + o_t * s_lt
    lost = _share(tl.load(p_lse + o_l, m_t, 0.0), tl.load(p_padding + i_b)) < LEAST
    lost = lost & m_t
    if tl.max(lost.to(tl.int32), 0) > 0:
        out, lse = _anew(
            p_q + i_b * s_qb + i_h * s_qh, p_k + i_b * s_kb + i_h * s_kh,
            p_v + i_b * s_vb + i_h * s_vh, p_mask + i_b * total, s_kt, s_vt, o_t * s_qt, m_t,
            total, scale, K, BLOCK_K, ROWS, KEYS,
        )  # fmt: skip
        o_k = tl.arange(0, BLOCK_K)
        p_o = p_out + i_b * s_ob + i_h * s_oh + (o_t * s_ot)[:, None] + o_k[None, :]
        m_o = lost[:, None] & (o_k < K)[None, :]
        tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_o)
        tl.store(p_new + o_l, lse, mask=lost)


def leave_out_zero_keys_(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Tensor
) -> Tensor:
    """Corrects, in place, a softmax that padded keys and values, all zero, took part in.

    Args:
        out: [B, H, T, K], dense in K; of softmax(QKᵀ/√K)V over all keys.
        lse: [B, H, T] or [B, H, T, 1] fp32, the natural log-sum-exp of the scores.
        q, k, v: [B, H, T, K], dense in K.
        mask: [B, T] booleans, dense, true on real tokens.
        padding: [B] fp32, how many are not.

    Returns:
        The log-sum-exp over the real keys alone, laid out as `lse`.
    """
    batch, heads, total, width = out.shape
    rows = batch * heads * total
    new = torch.empty_like(lse)
    assert new.stride() == lse.stride()
    of = [s for t in (out, lse) for s in t.stride()[:3]]
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    sizes = {"LEAST": LEAST, "H": heads, "K": width, "BLOCK_K": block(width), "ROWS": _ROWS}
    with torch.no_grad():
        zero_keys_kernel[(triton.cdiv(rows, _ROWS),)](
            out, lse, new, padding, *of, rows, total, **sizes, num_warps=_WARPS
        )
        lost_rows_kernel[(triton.cdiv(total, _ROWS) * heads, batch)](
            out, lse, new, padding, q, k, v, mask.view(torch.uint8), *of, *strides, total,
            width**-0.5, KEYS=_KEYS, **sizes, num_warps=_WARPS,
        )  # fmt: skip
    return new
