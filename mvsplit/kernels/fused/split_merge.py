"""Split-merge with means: Z = X + β⊙PF + α⊙JF − λ⊙JX, then RMSNorm (paper Eq. 7–8, 49–54).

One launch each way. A block takes a ticket; tickets interleave two kinds of task, so that the
second read of a tensor follows the first closely enough to come from the L2 cache, and device
memory sees each tensor once:

    forward    reduce: column sums of X and F over a chunk of tokens and a slab of columns
               apply:  Z and its norm for a few whole rows, once the sample's sums are complete
    backward   reduce: column sums of Δ and Δ⊙F over a chunk of whole rows; the last chunk of a
               segment to finish adds up all of them, in order
               apply:  ∂L/∂X and ∂L/∂F for a few whole rows
               gains:  ∂L/∂β, ∂L/∂α, ∂L/∂λ for a few columns, after all else

Partial sums have their own places and are added in a fixed order: results are deterministic.

Shapes: B batch, T tokens, D width, S segments, C chunks of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import (
    announce,
    block,
    differentiate,
    gain_stride,
    lag,
    load_gain,
    locate,
    processors,
    real_tokens,
    register,
    rows_for,
    schedule,
    tiles,
    tiles_before,
    total_tokens,
    unit_stride,
    wait_for,
)
from mvsplit.kernels.reference import Gain
from mvsplit.kernels.segments import Segments

_VARYING = ["batch", "chunk", "n_chunks", "n_apply", "lag"]
_COLUMNS = 32  # that one gain task sums
# Values in a tile of an apply task and in one step of a reduce task, and warps: measured on H200.
_FORWARD = {"apply": 8192, "reduce": 8192, "warps": 8}
_BACKWARD = {"apply": 4096, "reduce": 4096, "warps": 8}


@triton.jit
def _sum_columns(
    p_x, p_f, p_partial, sx_t, sf_t, i, chunk, i_chunk, count, start, local,
    D: tl.constexpr, SLAB: tl.constexpr, SUB: tl.constexpr, LEAKS: tl.constexpr,
):  # fmt: skip
    """Column sums of F and, where the mean leaks, of X over one chunk of one slab of columns."""
    o_d = (i % tl.cdiv(D, SLAB)) * SLAB + tl.arange(0, SLAB)
    end = tl.minimum(local + chunk, count)
    b_f = tl.zeros([SUB, SLAB], tl.float32)
    b_x = tl.zeros([SUB, SLAB], tl.float32)
    for t in range(local, end, SUB):
        o_t = t + tl.arange(0, SUB)
        m = (o_t < end)[:, None] & (o_d < D)[None, :]
        o_t = (start + o_t).to(tl.int64)
        b_f += tl.load(p_f + o_t[:, None] * sf_t + o_d[None, :], mask=m, other=0.0)
        if LEAKS:
            b_x += tl.load(p_x + o_t[:, None] * sx_t + o_d[None, :], mask=m, other=0.0)
    p_partial += i_chunk * 2 * D + o_d
    tl.store(p_partial, tl.sum(b_f, 0), mask=o_d < D)
    if LEAKS:
        tl.store(p_partial + D, tl.sum(b_x, 0), mask=o_d < D)


@triton.jit
def _segment_mean(p_partial, first, n, stride, count, o_d, m_d):
    """The mean over `count` tokens from the sums of n chunks."""
    total = tl.zeros_like(o_d).to(tl.float32)
    for c in range(first, first + n):
        total += tl.load(p_partial + c * stride + o_d, mask=m_d, other=0.0)
    return total / tl.maximum(count, 1)


@triton.jit(do_not_specialize=_VARYING)
def split_merge_fwd_kernel(
    p_x, p_f, p_y, p_r, p_beta, p_alpha, p_leak, p_valid, p_partial, p_mean_f, p_mean_x, p_sync,
    beta, alpha, leak, s_beta, s_alpha, s_leak, sx_b, sx_t, sf_b, sf_t,
    lengths, batch, chunk, n_chunks, n_apply, lag, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SLAB: tl.constexpr,
    SUB: tl.constexpr, LEAKS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(lengths)
    n_reduce = n_chunks * tl.cdiv(D, SLAB)
    ticket = tl.atomic_add(p_sync, 1, sem="relaxed")
    i_b, i, reduces = schedule(ticket, batch, n_reduce, n_apply, lag)
    i_b = i_b.to(tl.int64)
    p_x += i_b * sx_b
    p_f += i_b * sf_b
    p_partial += i_b * n_chunks * 2 * D
    if reduces:
        i_chunk = i // tl.cdiv(D, SLAB)
        i_s, start, local, length = locate(i_chunk, lengths, chunk)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        _sum_columns(
            p_x, p_f, p_partial, sx_t, sf_t, i, chunk, i_chunk, count, start, local,
            D, SLAB, SUB, LEAKS,
        )  # fmt: skip
        announce(p_sync + 1 + i_b)
    else:
        i_s, start, local, length = locate(i, lengths, ROWS)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        o_t = local + tl.arange(0, ROWS)
        m = (o_t < count)[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)
        b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
        b_alpha = load_gain(p_alpha, alpha, s_alpha, o_d, m_d)
        x = tl.load(
            p_x + row[:, None] * sx_t + o_d[None, :], m, 0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        f = tl.load(
            p_f + row[:, None] * sf_t + o_d[None, :], m, 0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        wait_for(p_sync + 1 + i_b, n_reduce)
        first = tiles_before(i_s, lengths, chunk)
        n = tl.cdiv(length, chunk)
        mean_f = _segment_mean(p_partial, first, n, 2 * D, count, o_d, m_d)
        shift = (b_alpha - b_beta) * mean_f
        p_mean = (i_b * S + i_s) * D + o_d
        if local == 0:
            tl.store(p_mean_f + p_mean, mean_f, mask=m_d)
        if LEAKS:
            b_leak = load_gain(p_leak, leak, s_leak, o_d, m_d)
            mean_x = _segment_mean(p_partial + D, first, n, 2 * D, count, o_d, m_d)
            shift -= b_leak * mean_x
            if local == 0:
                tl.store(p_mean_x + p_mean, mean_x, mask=m_d)
        z = tl.where(m, x + b_beta[None, :] * f + shift[None, :], 0.0)
        row += i_b * total_tokens(lengths)
        inside = o_t < length
        if NORM:
            r = tl.rsqrt(tl.sum(z * z, 1) / D + eps)  # Eq. 49
            z *= r[:, None]
            tl.store(p_r + row, r, mask=inside)
        m = inside[:, None] & m_d[None, :]
        tl.store(p_y + row[:, None] * D + o_d[None, :], z.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _delta(p_g, p_y, p_r, sg_t, row, o_d, m, real, D: tl.constexpr, NORM: tl.constexpr,
           LAST: tl.constexpr):  # fmt: skip
    """Δ_i = r_i (G_i − Y_i ⟨G_i, Y_i⟩/D) (Eq. 50) for some rows; zero on padding."""
    policy: tl.constexpr = "evict_first" if LAST else ""
    p_g += row[:, None] * sg_t + o_d[None, :]
    delta = tl.load(p_g, m, 0.0, eviction_policy=policy).to(tl.float32)
    if NORM:
        p_y += row[:, None] * D + o_d[None, :]
        y = tl.load(p_y, m, 0.0, eviction_policy=policy).to(tl.float32)
        r = tl.load(p_r + row, real, 0.0)
        along = tl.sum(delta * y, 1) / D
        delta = (delta - y * along[:, None]) * r[:, None]
    return delta


@triton.jit
def _fold(p_partial, p_sum, first, n, o_d, m_d, GAINS: tl.constexpr, D: tl.constexpr):
    """Adds up the sums of a segment's chunks, in order: of Δ and of Δ⊙F."""
    for part in tl.static_range(2 if GAINS else 1):
        total = tl.zeros_like(o_d).to(tl.float32)
        for c in range(first, first + n):
            o_c = (c * 2 + part) * D
            total += tl.load(p_partial + o_c + o_d, mask=m_d, other=0.0)
        tl.store(p_sum + part * D + o_d, total, mask=m_d)


@triton.jit
def _gain_gradients(
    p_sum, p_mean_f, p_mean_x, p_dbeta, p_dalpha, p_dleak, i, lengths, batch,
    D: tl.constexpr, COLUMNS: tl.constexpr, LEAKS: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """Eq. 54 for a few columns: sums over samples and segments of what each has added up."""
    S: tl.constexpr = len(lengths)
    o_d = i * COLUMNS + tl.arange(0, COLUMNS)
    dbeta = tl.zeros([64, COLUMNS], tl.float32)
    dalpha = tl.zeros([64, COLUMNS], tl.float32)
    dleak = tl.zeros([64, COLUMNS], tl.float32)
    for s in tl.static_range(S):
        end = tl.where(lengths[s] > 0, batch, 0)
        for b in range(0, end, 64):
            o_b = b + tl.arange(0, 64)
            m = (o_b < batch)[:, None] & (o_d < D)[None, :]
            row = (o_b.to(tl.int64) * S + s)[:, None]
            delta = tl.load(p_sum + row * 2 * D + o_d[None, :], m, 0.0)
            delta_f = tl.load(p_sum + (row * 2 + 1) * D + o_d[None, :], m, 0.0)
            mean_part = delta * tl.load(p_mean_f + row * D + o_d[None, :], m, 0.0)
            dbeta += delta_f - mean_part
            dalpha += mean_part
            if LEAKS:
                dleak -= delta * tl.load(p_mean_x + row * D + o_d[None, :], m, 0.0)
    if TIED:
        dalpha += dleak
    m_d = o_d < D
    tl.store(p_dbeta + o_d, tl.sum(dbeta, 0).to(p_dbeta.dtype.element_ty), mask=m_d)
    tl.store(p_dalpha + o_d, tl.sum(dalpha, 0).to(p_dalpha.dtype.element_ty), mask=m_d)
    tl.store(p_dleak + o_d, tl.sum(dleak, 0).to(p_dleak.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=[*_VARYING, "filled"])
def split_merge_bwd_kernel(
    p_g, p_y, p_f, p_r, p_beta, p_alpha, p_leak, p_valid, p_mean_f, p_mean_x,
    p_dx, p_df, p_dbeta, p_dalpha, p_dleak, p_partial, p_sum, p_sync,
    beta, alpha, leak, s_beta, s_alpha, s_leak, sg_b, sg_t, sf_b, sf_t,
    lengths, batch, chunk, n_chunks, n_apply, lag, filled,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SUB: tl.constexpr,
    COLUMNS: tl.constexpr, LEAKS: tl.constexpr, TIED: tl.constexpr, NORM: tl.constexpr,
    GAINS: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(lengths)
    ticket = tl.atomic_add(p_sync, 1, sem="relaxed")
    p_done = p_sync + 1
    n_main = batch * (n_chunks + n_apply)
    i_b, i, reduces = schedule(ticket, batch, n_chunks, n_apply, lag)
    i_b = i_b.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    tokens = i_b * total_tokens(lengths)
    p_g += i_b * sg_b
    p_f += i_b * sf_b
    p_y += tokens * D
    p_r += tokens
    if ticket >= n_main:
        wait_for(p_done, filled)
        _gain_gradients(
            p_sum, p_mean_f, p_mean_x, p_dbeta, p_dalpha, p_dleak, ticket - n_main, lengths, batch,
            D, COLUMNS, LEAKS, TIED,
        )  # fmt: skip
    elif reduces:
        i_s, start, local, length = locate(i, lengths, chunk)
        end = tl.minimum(local + chunk, real_tokens(p_valid, i_b, i_s, length, S))
        b_delta = tl.zeros([SUB, BLOCK_D], tl.float32)
        b_delta_f = tl.zeros([SUB, BLOCK_D], tl.float32)
        for t in range(local, end, SUB):
            o_t = t + tl.arange(0, SUB)
            real = o_t < end
            m = real[:, None] & m_d[None, :]
            row = (start + o_t).to(tl.int64)
            if GAINS:
                f = tl.load(
                    p_f + row[:, None] * sf_t + o_d[None, :], m, 0.0, eviction_policy="evict_first"
                ).to(tl.float32)
            delta = _delta(p_g, p_y, p_r, sg_t, row, o_d, m, real, D, NORM, False)
            b_delta += delta
            if GAINS:
                b_delta_f += delta * f
        p_partial += i_b * n_chunks * 2 * D
        tl.store(p_partial + i * 2 * D + o_d, tl.sum(b_delta, 0), mask=m_d)
        if GAINS:
            tl.store(p_partial + (i * 2 + 1) * D + o_d, tl.sum(b_delta_f, 0), mask=m_d)
        i_bs = i_b * S + i_s
        n = tl.cdiv(length, chunk)
        if announce(p_sync + 2 + i_bs) == n - 1:
            first = tiles_before(i_s, lengths, chunk)
            _fold(p_partial, p_sum + i_bs * 2 * D, first, n, o_d, m_d, GAINS, D)
            announce(p_sync + 2 + i_bs)
            tl.atomic_add(p_done, 1, sem="release", scope="gpu")
    else:
        i_s, start, local, length = locate(i, lengths, ROWS)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        o_t = local + tl.arange(0, ROWS)
        real = o_t < count
        m = real[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)
        b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
        b_alpha = load_gain(p_alpha, alpha, s_alpha, o_d, m_d)
        delta = _delta(p_g, p_y, p_r, sg_t, row, o_d, m, real, D, NORM, True)
        i_bs = i_b * S + i_s
        wait_for(p_sync + 2 + i_bs, tl.cdiv(length, chunk) + 1)
        mean = tl.load(p_sum + i_bs * 2 * D + o_d, mask=m_d, other=0.0)
        mean /= tl.maximum(count, 1)  # Eq. 51
        df = b_beta[None, :] * delta + ((b_alpha - b_beta) * mean)[None, :]  # Eq. 53
        if LEAKS:
            b_leak = load_gain(p_leak, leak, s_leak, o_d, m_d)
            delta -= (b_leak * mean)[None, :]  # Eq. 52
        out = (tokens + row)[:, None] * D + o_d[None, :]
        m_out = (o_t < length)[:, None] & m_d[None, :]
        tl.store(p_dx + out, tl.where(m, delta, 0.0).to(p_dx.dtype.element_ty), mask=m_out)
        tl.store(p_df + out, tl.where(m, df, 0.0).to(p_df.dtype.element_ty), mask=m_out)


def _pointers(
    beta: Tensor | None, alpha: Tensor | None, leak: Tensor | None, values: list[float], tied: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...], bool]:
    """Gains for a launch: three pointers, then three values and three strides; whether J leaks."""
    gains = [beta, alpha, alpha if tied else leak]
    values = [*values[:2], values[1] if tied else values[2]]
    strides = [gain_stride(g) for g in gains]
    leaks = gains[2] is not None or values[2] != 0
    return tuple(gains), (*values, *strides), leaks


def _chunks(x: Tensor, lengths: list[int]) -> tuple[int, int]:
    """(tokens, columns) of a forward reduce task: few partial sums, yet a task a processor."""
    batch, total, width = x.shape
    chunk, slab = 256, 128
    if batch * tiles(lengths, chunk) * width < 2 * slab * processors(x.device):
        chunk, slab = 64, 64
    return max(chunk, triton.next_power_of_2(total) // 16), min(slab, block(width))


def _launch_forward(
    x: Tensor, f: Tensor, beta: Tensor | None, alpha: Tensor | None, leak: Tensor | None,
    values: list[float], tied: bool, valid: Tensor | None, lengths: list[int], eps: float,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, width = x.shape
    pointers, scalars, leaks = _pointers(beta, alpha, leak, values, tied)
    y, r, mean_f, mean_x = _outputs(x, len(lengths), leaks, norm)
    if x.numel() == 0:
        return y, r, mean_f, mean_x
    x, f = unit_stride(x), unit_stride(f)
    chunk, slab = _chunks(x, lengths)
    rows = rows_for(width, _FORWARD["apply"])
    n_chunks, n_apply = tiles(lengths, chunk), tiles(lengths, rows)
    n_reduce = n_chunks * triton.cdiv(width, slab)
    partial = torch.empty(batch, n_chunks, 2, width, dtype=torch.float32, device=x.device)
    sync = torch.zeros(1 + batch, dtype=torch.int32, device=x.device)
    split_merge_fwd_kernel[(batch * (n_reduce + n_apply),)](
        x, f, y, r, *pointers, valid, partial, mean_f, mean_x, sync,
        *scalars, x.stride(0), x.stride(1), f.stride(0), f.stride(1),
        tuple(lengths), batch, chunk, n_chunks, n_apply,
        lag(x.device, batch, n_reduce + n_apply), eps,
        D=width, BLOCK_D=block(width), ROWS=rows, SLAB=slab, SUB=_FORWARD["reduce"] // slab,
        LEAKS=leaks, NORM=norm, num_warps=_FORWARD["warps"],
    )  # fmt: skip
    return y, r, mean_f, mean_x


def _outputs(
    x: Tensor, segments: int, leaks: bool, norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y [B, T, D], r [B, T] and the means [B, S, D]; empty where not needed."""
    batch, total, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r, mean_f, mean_x = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in (
            (batch, total) if norm else (0,),
            (batch, segments, width),
            (batch, segments, width) if leaks else (0,),
        )
    )
    return y, r, mean_f, mean_x


def _fake_forward(x: Tensor, f: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, _, _, _, _, lengths, _, norm = rest
    return _outputs(x, len(lengths), _pointers(*rest[:5])[2], norm)


def _gradients(
    grad: Tensor, gains: tuple[Tensor | None, ...], learns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """∂L/∂X, ∂L/∂F [B, T, D] and of each gain [D], which is empty where no gain learns."""
    width = grad.shape[-1] if learns else 0
    dtypes = [torch.float32 if gain is None else gain.dtype for gain in gains]
    dbeta, dalpha, dleak = (torch.empty(width, dtype=t, device=grad.device) for t in dtypes)
    dx, df = (torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for _ in range(2))
    return dx, df, dbeta, dalpha, dleak


def _launch_backward(
    grad: Tensor, y: Tensor | None, f: Tensor | None, r: Tensor, mean_f: Tensor, mean_x: Tensor,
    beta: Tensor | None, alpha: Tensor | None, leak: Tensor | None, values: list[float],
    tied: bool, valid: Tensor | None, lengths: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, _, width = grad.shape
    pointers, scalars, leaks = _pointers(beta, alpha, leak, values, tied)
    out = _gradients(grad, (beta, alpha, leak), f is not None)
    if grad.numel() == 0:
        return (*out[:2], *(g.zero_() for g in out[2:]))
    learns = f is not None
    grad = unit_stride(grad)
    f = grad if f is None else unit_stride(f)
    rows, sub = (rows_for(width, _BACKWARD[task]) for task in ("apply", "reduce"))
    chunk = max(rows_for(width, 32768), triton.next_power_of_2(max(lengths)) // 64)
    n_chunks, n_apply = tiles(lengths, chunk), tiles(lengths, rows)
    n_gains = triton.cdiv(width, _COLUMNS) if learns else 0
    filled = batch * sum(n > 0 for n in lengths)
    partial = torch.empty(batch, n_chunks, 2, width, dtype=torch.float32, device=grad.device)
    sums = torch.empty(batch, len(lengths), 2, width, dtype=torch.float32, device=grad.device)
    sync = torch.zeros(2 + batch * len(lengths), dtype=torch.int32, device=grad.device)
    split_merge_bwd_kernel[(batch * (n_chunks + n_apply) + n_gains,)](
        grad, grad if y is None else y.contiguous(), f, r, *pointers, valid, mean_f, mean_x,
        *out, partial, sums, sync,
        *scalars, grad.stride(0), grad.stride(1), f.stride(0), f.stride(1),
        tuple(lengths), batch, chunk, n_chunks, n_apply,
        lag(grad.device, batch, n_chunks + n_apply), filled,
        D=width, BLOCK_D=block(width), ROWS=rows, SUB=sub, COLUMNS=_COLUMNS,
        LEAKS=leaks, TIED=tied, NORM=y is not None, GAINS=learns,
        num_warps=_BACKWARD["warps"],
    )  # fmt: skip
    return out


def _fake_backward(
    grad: Tensor, y: Tensor | None, f: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients(grad, rest[3:6], f is not None)


_GAINS = "Tensor? beta, Tensor? alpha, Tensor? leak, float[] values, bool tied"
_SEGMENTS = "Tensor? valid, SymInt[] lengths"
_forward_op = register(
    f"split_merge(Tensor x, Tensor f, {_GAINS}, {_SEGMENTS}, float eps, bool norm)"
    " -> (Tensor y, Tensor r, Tensor mean_f, Tensor mean_x)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "split_merge_backward(Tensor grad, Tensor? y, Tensor? f, Tensor r, Tensor mean_f,"
    f" Tensor mean_x, {_GAINS}, {_SEGMENTS})"
    " -> (Tensor dx, Tensor df, Tensor dbeta, Tensor dalpha, Tensor dleak)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, f, beta, alpha, leak, values, tied, valid, lengths, _, norm = inputs
    y, r, mean_f, mean_x = output
    learns = any(ctx.needs_input_grad[2:5])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        y if norm else None, f if learns else None, r, mean_f, mean_x, beta, alpha, leak, valid
    )
    ctx.settings = values, tied, lengths


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    y, f, r, mean_f, mean_x, beta, alpha, leak, valid = ctx.saved_tensors
    values, tied, lengths = ctx.settings
    dx, df, *per_gain = _backward_op(
        grad, y, f, r, mean_f, mean_x, beta, alpha, leak, values, tied, valid, lengths
    )
    gains = [
        g.sum_to_size(gain.shape) if needed else None
        for g, gain, needed in zip(
            per_gain, (beta, alpha, leak), ctx.needs_input_grad[2:5], strict=True
        )
    ]
    return dx, df, *gains, *(None,) * 6


differentiate(_forward_op, _backward, _setup_context)


def split_merge(
    x: Tensor,
    f: Tensor,
    beta: Gain,
    alpha: Gain,
    leak: Gain | None,
    segments: Segments,
    eps: float,
    norm: bool,
) -> Tensor:
    """`mvsplit.kernels.reference.split_merge` as one launch each way; same arguments and result."""
    segments.check(x)
    numbers = [0.0 if g is None or isinstance(g, Tensor) else float(g) for g in (beta, alpha, leak)]
    tensors = [g if isinstance(g, Tensor) else None for g in (beta, alpha, leak)]
    valid = None if segments.valid is None else segments.valid.contiguous()
    lengths = list(segments.lengths)
    y, *_ = _forward_op(
        x, f.to(x.dtype), *tensors, numbers, leak is None, valid, lengths, eps, norm
    )
    return y
