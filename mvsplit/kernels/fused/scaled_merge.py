"""The merge without means: Z = X + γ⊙F, then RMSNorm; plain, LayerScale, ReZero, DeepNorm.

It is split-merge at β = α = γ, λ = 0, where neither direction needs a mean: one pass each way, and
F is read in backward only where γ learns. F may be absent: RMSNorm alone. The gradient of γ is
summed by a fixed number of blocks in a fixed order: deterministic.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import (
    block,
    differentiate,
    gain_stride,
    load_gain,
    locate,
    processors,
    real_tokens,
    register,
    rows_for,
    stages_for,
    store_merged,
    tiles,
    unit_stride,
    warps_for,
)
from mvsplit.kernels.reference import Gain
from mvsplit.kernels.segments import Segments


@triton.jit(do_not_specialize=["n_apply", "total"])
def scaled_merge_fwd_kernel(
    p_x, p_f, p_y, p_r, p_gain, p_valid, gain, s_gain, sx_b, sx_t, sf_b, sf_t,
    lengths, n_apply, total, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(lengths)
    i_b = (tl.program_id(0) // n_apply).to(tl.int64)
    i_s, start, local, length = locate(tl.program_id(0) % n_apply, lengths, ROWS)
    count = real_tokens(p_valid, i_b, i_s, length, S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_t = local + tl.arange(0, ROWS)
    m = (o_t < count)[:, None] & m_d[None, :]
    row = (start + o_t).to(tl.int64)
    z = tl.load(p_x + i_b * sx_b + row[:, None] * sx_t + o_d[None, :], m, 0.0).to(tl.float32)
    if p_f is not None:
        f = tl.load(p_f + i_b * sf_b + row[:, None] * sf_t + o_d[None, :], m, 0.0).to(tl.float32)
        z += load_gain(p_gain, gain, s_gain, o_d, m_d)[None, :] * f
    row += i_b * total
    store_merged(p_y, p_r, z, row, o_t < length, o_d, m_d, eps, D, NORM)


@triton.jit(do_not_specialize=["n_apply", "n_tiles", "total"])
def scaled_merge_bwd_kernel(
    p_g, p_y, p_f, p_r, p_gain, p_valid, p_dx, p_df, p_partial,
    gain, s_gain, sg_b, sg_t, sf_b, sf_t, lengths, n_apply, n_tiles, total,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    LEARNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(lengths)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_gain = load_gain(p_gain, gain, s_gain, o_d, m_d)[None, :]
    b_dgain = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        i_b = tl.cast(i // n_apply, tl.int64)
        i_s, start, local, length = locate(i % n_apply, lengths, ROWS)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        o_t = local + tl.arange(0, ROWS)
        real = o_t < count
        m = real[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)
        delta = tl.load(p_g + i_b * sg_b + row[:, None] * sg_t + o_d[None, :], m, 0.0)
        delta = delta.to(tl.float32)
        if LEARNS:
            f = tl.load(p_f + i_b * sf_b + row[:, None] * sf_t + o_d[None, :], m, 0.0)
        row += i_b * total
        out = row[:, None] * D + o_d[None, :]
        if NORM:
            y = tl.load(p_y + out, m, 0.0).to(tl.float32)
            r = tl.load(p_r + row, real, 0.0)
            along = tl.sum(delta * y, 1) / D
            delta = (delta - y * along[:, None]) * r[:, None]  # Eq. 50
        m = (o_t < length)[:, None] & m_d[None, :]
        tl.store(p_dx + out, delta.to(p_dx.dtype.element_ty), mask=m)
        if p_df is not None:
            tl.store(p_df + out, (b_gain * delta).to(p_df.dtype.element_ty), mask=m)
        if LEARNS:
            b_dgain += delta * f.to(tl.float32)
    if LEARNS:
        tl.store(p_partial + tl.program_id(0) * D + o_d, tl.sum(b_dgain, 0), mask=m_d)


@triton.jit
def scaled_merge_gain_kernel(p_partial, p_dgain, n, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds up the partial gain gradients [n, D], in order."""
    o_d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([64, COLUMNS], tl.float32)
    for i in range(0, n, 64):
        o_n = i + tl.arange(0, 64)
        m = (o_n < n)[:, None] & (o_d < D)[None, :]
        total += tl.load(p_partial + o_n[:, None] * D + o_d[None, :], m, 0.0)
    tl.store(p_dgain + o_d, tl.sum(total, 0).to(p_dgain.dtype.element_ty), mask=o_d < D)


def _outputs(x: Tensor, norm: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = x.shape[:2] if norm else (0,)
    return y, torch.empty(shape, dtype=torch.float32, device=x.device)


def _launch_forward(
    x: Tensor, f: Tensor | None, gain: Tensor | None, value: float, valid: Tensor | None,
    lengths: list[int], eps: float, norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, total, width = x.shape
    y, r = _outputs(x, norm)
    if x.numel() == 0:
        return y, r
    x = unit_stride(x)
    f = None if f is None else unit_stride(f)
    rows = rows_for(width, 8192)
    n_apply = tiles(lengths, rows)
    scaled_merge_fwd_kernel[(batch * n_apply,)](
        x, f, y, r, gain, valid, value, gain_stride(gain), *_strides(x), *_strides(f),
        tuple(lengths), n_apply, total, eps,
        D=width, BLOCK_D=block(width), ROWS=rows, NORM=norm, num_warps=warps_for(rows, width, 32),
    )  # fmt: skip
    return y, r


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _fake_forward(
    x: Tensor, f: Tensor | None, gain: Tensor | None, value: float, valid: Tensor | None,
    lengths: list[int], eps: float, norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(x, norm)


def _gradients(
    grad: Tensor, f: Tensor | None, gain: Tensor | None, value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂X; ∂L/∂F, empty where it equals ∂L/∂X; ∂L/∂γ [D], empty where γ does not learn."""
    same = gain is None and value == 1
    learns = gain is not None and f is not None
    dx = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    df = torch.empty((0,) if same else grad.shape, dtype=grad.dtype, device=grad.device)
    dtype = torch.float32 if gain is None else gain.dtype
    dgain = torch.empty(grad.shape[-1] if learns else 0, dtype=dtype, device=grad.device)
    return dx, df, dgain


def _launch_backward(
    grad: Tensor, y: Tensor | None, f: Tensor | None, r: Tensor, gain: Tensor | None,
    value: float, valid: Tensor | None, lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, total, width = grad.shape
    dx, df, dgain = _gradients(grad, f, gain, value)
    if grad.numel() == 0:
        return dx, df, dgain.zero_()
    learns = dgain.numel() > 0
    grad = unit_stride(grad)
    f = unit_stride(f) if f is not None and learns else None
    rows = rows_for(width, 2048)
    n_apply = tiles(lengths, rows)
    n_tiles = batch * n_apply
    programs = min(n_tiles, 5 * processors(grad.device)) if learns else n_tiles
    partial = torch.empty(programs if learns else 0, width, dtype=torch.float32, device=grad.device)
    scaled_merge_bwd_kernel[(programs,)](
        grad, None if y is None else y.contiguous(), f, r, gain, valid, dx,
        df if df.numel() else None, partial,
        value, gain_stride(gain), *_strides(grad), *_strides(f),
        tuple(lengths), n_apply, n_tiles, total,
        D=width, BLOCK_D=block(width), ROWS=rows, NORM=y is not None, LEARNS=learns,
        STAGES=stages_for(3 * rows * block(width) * grad.element_size(), 3),
        num_warps=warps_for(rows, width, 16),
    )  # fmt: skip
    if learns:
        scaled_merge_gain_kernel[(triton.cdiv(width, 32),)](
            partial, dgain, programs, D=width, COLUMNS=32, num_warps=8
        )
    return dx, df, dgain


def _fake_backward(
    grad: Tensor, y: Tensor | None, f: Tensor | None, r: Tensor, gain: Tensor | None,
    value: float, valid: Tensor | None, lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(grad, f, gain, value)


_forward_op = register(
    "scaled_merge(Tensor x, Tensor? f, Tensor? gain, float value, Tensor? valid,"
    " SymInt[] lengths, float eps, bool norm) -> (Tensor y, Tensor r)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "scaled_merge_backward(Tensor grad, Tensor? y, Tensor? f, Tensor r, Tensor? gain, float value,"
    " Tensor? valid, SymInt[] lengths) -> (Tensor dx, Tensor df, Tensor dgain)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, f, gain, value, valid, lengths, _, norm = inputs
    y, r = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        y if norm else None, f if ctx.needs_input_grad[2] else None, r, gain, valid
    )
    ctx.settings = value, lengths


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    y, f, r, gain, valid = ctx.saved_tensors
    value, lengths = ctx.settings
    dx, df, dgain = _backward_op(grad, y, f, r, gain, value, valid, lengths)
    if not ctx.needs_input_grad[1]:
        df = None
    elif df.numel() == 0:
        df = dx
    dgain = dgain.sum_to_size(gain.shape) if ctx.needs_input_grad[2] else None
    return dx, df, dgain, *(None,) * 5


differentiate(_forward_op, _backward, _setup_context)


def scaled_merge(
    x: Tensor, f: Tensor | None, gain: Gain, segments: Segments, eps: float, norm: bool
) -> Tensor:
    """Z = X + γ⊙F, then RMSNorm unless `norm` is False; zero on padding. `x`, `f` [B, T, D], γ a
    tensor [D] or of one element, or a number; without `f`, RMSNorm of `x`."""
    segments.check(x, f)
    tensor, value = (gain, 0.0) if isinstance(gain, Tensor) else (None, float(gain))
    valid = None if segments.valid is None else segments.valid.contiguous()
    f = None if f is None else f.to(x.dtype)
    y, _ = _forward_op(x, f, tensor, value, valid, list(segments.lengths), eps, norm)
    return y
