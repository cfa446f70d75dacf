"""Rotary embedding, then RMSNorm of each head without affine, on the packed QKV: one pass each way.

Forward reads the projection once and writes queries, keys and values; backward reads their
gradients with the saved outputs and 1/RMS, and writes the gradient of the projection: the
projection itself is not kept. Since a rotation keeps lengths, Δ of the norm is rotated back.

In place, for code that has no other use for the projection: queries and keys take the place of what
they are made from, and values stay where they are. That moves two thirds of the bytes.

Shapes: B batch, T tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block, differentiate, register, unit_stride


@triton.jit
def _part(i_h, H: tl.constexpr, G: tl.constexpr):
    """Which of queries 0, keys 1, values 2 the packed head i_h is in, and its number there."""
    part = (i_h >= H).to(tl.int32) + (i_h >= H + G).to(tl.int32)
    return part, i_h - tl.where(part > 0, H, 0) - tl.where(part > 1, G, 0)


@triton.jit
def _tile(total, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr,
          BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr):  # fmt: skip
    """Of HEADS packed heads: sample, tokens [BT, 1, 1], first head, heads and columns within, and
    mask."""
    n_h: tl.constexpr = HEADS // BLOCK_H
    n_t = tl.cdiv(total, BLOCK_T)
    pid = tl.program_id(0)
    i_h = (pid % n_h) * BLOCK_H
    o_t = (pid // n_h % n_t) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    o_h = tl.arange(0, BLOCK_H)[None, :, None]
    o_k = tl.arange(0, BLOCK_HALF)[None, None, :]
    i_b = (pid // n_h // n_t).to(tl.int64)
    return i_b, o_t, i_h, o_h, o_k, (o_t < total) & (o_h < BLOCK_H) & (o_k < HALF)


@triton.jit
def _turned(x1, x2, p_cos, p_sin, m_t, eps, K: tl.constexpr):
    """Both halves of heads of K rotated, then normalised, and their 1/RMS."""
    cos = tl.load(p_cos, m_t, 0.0).to(tl.float32)
    sin = tl.load(p_sin, m_t, 0.0).to(tl.float32)
    y1 = x1 * cos + x2 * sin
    y2 = x2 * cos - x1 * sin
    r = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, 2, keep_dims=True) / K + eps)
    return y1 * r, y2 * r, r


@triton.jit(do_not_specialize=["total"])
def qk_norm_rope_fwd_kernel(
    p_qkv, p_cos, p_sin, p_q, p_k, p_v, p_r, s_b, s_t, s_cos, s_sin, total, eps,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 2 * HALF
    i_b, o_t, i_h, o_h, o_k, m = _tile(total, H + 2 * G, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF)
    part, first = _part(i_h, H, G)
    p_in = p_qkv + i_b * s_b + o_t.to(tl.int64) * s_t + (i_h + o_h) * K + o_k
    x1 = tl.load(p_in, m, 0.0).to(tl.float32)
    x2 = tl.load(p_in + HALF, m, 0.0).to(tl.float32)
    row = i_b * total + o_t
    if part < 2:
        m_t = (o_t < total) & (o_k < HALF)
        x1, x2, r = _turned(
            x1, x2, p_cos + o_t * s_cos + o_k, p_sin + o_t * s_sin + o_k, m_t, eps, K
        )
        tl.store(p_r + row * (H + G) + i_h + o_h, r, mask=o_t < total)
    if part == 0:
        p_out = p_q + (row * H + first + o_h) * K + o_k
    elif part == 1:
        p_out = p_k + (row * G + first + o_h) * K + o_k
    else:
        p_out = p_v + (row * G + first + o_h) * K + o_k
    tl.store(p_out, x1.to(p_q.dtype.element_ty), mask=m)
    tl.store(p_out + HALF, x2.to(p_q.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["total"])
def qk_norm_rope_in_place_kernel(
    p_qkv, p_cos, p_sin, p_r, s_b, s_t, s_cos, s_sin, total, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 2 * HALF
    i_b, o_t, i_h, o_h, o_k, m = _tile(total, HEADS, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF)
    p_x = p_qkv + i_b * s_b + o_t.to(tl.int64) * s_t + (i_h + o_h) * K + o_k
    x1 = tl.load(p_x, m, 0.0).to(tl.float32)
    x2 = tl.load(p_x + HALF, m, 0.0).to(tl.float32)
    m_t = (o_t < total) & (o_k < HALF)
    x1, x2, r = _turned(x1, x2, p_cos + o_t * s_cos + o_k, p_sin + o_t * s_sin + o_k, m_t, eps, K)
    tl.store(p_r + (i_b * total + o_t) * HEADS + i_h + o_h, r, mask=o_t < total)
    tl.debug_barrier()  # of a small tile several threads load the same element
    tl.store(p_x, x1.to(p_qkv.dtype.element_ty), mask=m)
    tl.store(p_x + HALF, x2.to(p_qkv.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["total"])
def qk_norm_rope_bwd_kernel(
    p_dq, p_dk, p_dv, p_q, p_k, p_r, p_cos, p_sin, p_dqkv,
    sdq_b, sdq_h, sdq_t, sdk_b, sdk_h, sdk_t, sdv_b, sdv_h, sdv_t,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, s_cos, s_sin, total,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 2 * HALF
    i_b, o_t, i_h, o_h, o_k, m = _tile(total, H + 2 * G, HALF, BLOCK_T, BLOCK_H, BLOCK_HALF)
    part, first = _part(i_h, H, G)
    o_row = o_t.to(tl.int64)
    o_head = first + o_h
    if part == 0:
        p_g = p_dq + i_b * sdq_b + o_row * sdq_t + o_head * sdq_h + o_k
        p_y = p_q + i_b * sq_b + o_row * sq_t + o_head * sq_h + o_k
    elif part == 1:
        p_g = p_dk + i_b * sdk_b + o_row * sdk_t + o_head * sdk_h + o_k
        p_y = p_k + i_b * sk_b + o_row * sk_t + o_head * sk_h + o_k
    else:
        p_g = p_dv + i_b * sdv_b + o_row * sdv_t + o_head * sdv_h + o_k
        p_y = p_g  # unused
    g1 = tl.load(p_g, m, 0.0).to(tl.float32)
    g2 = tl.load(p_g + HALF, m, 0.0).to(tl.float32)
    row = i_b * total + o_t
    if part < 2:
        y1 = tl.load(p_y, m, 0.0).to(tl.float32)
        y2 = tl.load(p_y + HALF, m, 0.0).to(tl.float32)
        r = tl.load(p_r + row * (H + G) + i_h + o_h, o_t < total, 0.0)
        m_t = (o_t < total) & (o_k < HALF)
        cos = tl.load(p_cos + o_t * s_cos + o_k, m_t, 0.0).to(tl.float32)
        sin = tl.load(p_sin + o_t * s_sin + o_k, m_t, 0.0).to(tl.float32)
        along = tl.sum(g1 * y1 + g2 * y2, 2, keep_dims=True) / K
        d1 = (g1 - y1 * along) * r
        d2 = (g2 - y2 * along) * r
        g1 = d1 * cos - d2 * sin  # the inverse rotation
        g2 = d2 * cos + d1 * sin
    p_out = p_dqkv + (row * (H + 2 * G) + i_h + o_h) * K + o_k
    tl.store(p_out, g1.to(p_dqkv.dtype.element_ty), mask=m)
    tl.store(p_out + HALF, g2.to(p_dqkv.dtype.element_ty), mask=m)


def _geometry(
    batch: int, total: int, heads: int, kv_heads: int, half: int
) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of about 4096 pairs: heads that are all queries, all keys or all values."""
    common = heads | kv_heads  # its lowest set bit is the largest power of two in both
    grid, tile = _tiles(batch, total, heads + 2 * kv_heads, common & -common, half)
    return grid, {"H": heads, "G": kv_heads, **tile}


def _tiles(
    batch: int, total: int, heads: int, together: int, half: int
) -> tuple[tuple[int], dict[str, int]]:
    """Of `heads` packed heads, of which at most `together` are in a tile."""
    block_half = block(half)
    block_h = min(together, max(1, 4096 // block_half))
    block_t = min(max(1, 4096 // (block_half * block_h)), triton.next_power_of_2(total))
    grid = (batch * triton.cdiv(total, block_t) * (heads // block_h),)
    tile = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_HALF": block_half}
    return grid, {"HALF": half, **tile, "num_warps": 4}


def _launch_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = q, k, v, r = _fake_forward(qkv, cos, sin, heads, kv_heads, eps)
    if qkv.numel():
        qkv, cos, sin = unit_stride(qkv), unit_stride(cos), unit_stride(sin)
        batch, total, _ = qkv.shape
        grid, meta = _geometry(batch, total, heads, kv_heads, q.shape[-1] // 2)
        qk_norm_rope_fwd_kernel[grid](
            qkv, cos, sin, q, k, v, r, qkv.stride(0), qkv.stride(1), cos.stride(0), sin.stride(0),
            total, eps, **meta,
        )  # fmt: skip
    return out


def _fake_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token-major memory seen head-major, as attention and its output projection like it."""
    batch, total, packed = qkv.shape
    shape = (batch, total, heads + 2 * kv_heads, packed // (heads + 2 * kv_heads))
    q, k, v = (
        torch.empty(batch, total, n, shape[-1], dtype=qkv.dtype, device=qkv.device).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    r = torch.empty(batch, total, heads + kv_heads, dtype=torch.float32, device=qkv.device)
    return q, k, v, r


def _launch_in_place(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> Tensor:
    r = _fake_in_place(qkv, cos, sin, heads, kv_heads, eps)
    if qkv.stride(-1) != 1:
        raise ValueError(f"the last axis has to be dense, not of stride {qkv.stride(-1)}")
    if qkv.numel():
        cos, sin = unit_stride(cos), unit_stride(sin)
        batch, total, packed = qkv.shape
        both = heads + kv_heads
        half = packed // (both + kv_heads) // 2
        grid, meta = _tiles(batch, total, both, both & -both, half)
        qk_norm_rope_in_place_kernel[grid](
            qkv, cos, sin, r, qkv.stride(0), qkv.stride(1), cos.stride(0), sin.stride(0), total,
            eps, HEADS=both, **meta,
        )  # fmt: skip
    return r


def _fake_in_place(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> Tensor:
    shape = (*qkv.shape[:2], heads + kv_heads)
    return torch.empty(shape, dtype=torch.float32, device=qkv.device)


def _launch_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, r: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    out = _fake_backward(dq, dk, dv, q, k, r, cos, sin)
    if out.numel():
        dq, dk, dv, q, k, cos, sin = map(unit_stride, (dq, dk, dv, q, k, cos, sin))
        batch, heads, total, width = q.shape
        grid, meta = _geometry(batch, total, heads, k.shape[1], width // 2)
        strides = [s for x in (dq, dk, dv, q, k) for s in x.stride()[:3]]
        qk_norm_rope_bwd_kernel[grid](
            dq, dk, dv, q, k, r, cos, sin, out, *strides, cos.stride(0), sin.stride(0), total,
            **meta,
        )  # fmt: skip
    return out


def _fake_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, r: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    batch, heads, total, width = q.shape
    packed = (heads + 2 * k.shape[1]) * width
    return torch.empty(batch, total, packed, dtype=q.dtype, device=q.device)


_forward_op = register(
    "qk_norm_rope(Tensor qkv, Tensor cos, Tensor sin, SymInt heads, SymInt kv_heads, float eps)"
    " -> (Tensor q, Tensor k, Tensor v, Tensor r)",
    _launch_forward,
    _fake_forward,
)
_in_place_op = register(
    "qk_norm_rope_(Tensor(a!) qkv, Tensor cos, Tensor sin, SymInt heads, SymInt kv_heads,"
    " float eps) -> Tensor r",
    _launch_in_place,
    _fake_in_place,
)
_backward_op = register(
    "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor r,"
    " Tensor cos, Tensor sin) -> Tensor",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, cos, sin, *_ = inputs
    q, k, _, r = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, r, cos, sin)


def _backward(
    ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    q, k, r, cos, sin = ctx.saved_tensors
    dq, dk, dv = (  # an output that the loss does not use has no gradient
        torch.zeros_like(like) if grad is None else grad
        for grad, like in ((dq, q), (dk, k), (dv, k))
    )
    return _backward_op(dq, dk, dv, q, k, r, cos, sin), *(None,) * 5


differentiate(_forward_op, _backward, _setup_context)


def qk_norm_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`mvsplit.kernels.reference.qk_norm_rope` in one pass; same arguments and results."""
    q, k, v, _ = _forward_op(qkv, cos, sin, heads, kv_heads, eps)
    return q, k, v


def qk_norm_rope_(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in place and without autograd.

    Args:
        qkv: [B, T, (H + 2G)·K], dense in its last axis; overwritten.

    Returns:
        q [B, H, T, K], k and v [B, G, T, K] as views of `qkv`, and the 1/RMS [B, T, H + G] that
        `_backward_op` needs.
    """
    r = _in_place_op(qkv, cos, sin, heads, kv_heads, eps)
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = parts.split((heads, kv_heads, kv_heads), 1)
    return q, k, v, r
