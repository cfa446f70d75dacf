"""The merge with means (`split_merge`) by blocks that wait for each other: for large batches.

One launch each way, in which a block has one of two or three kinds of task. Their order (see
`schedule`) lets the second read of a tensor follow the first so closely that it comes from the L2
cache: device memory sees each tensor about once.

    forward    reduce: column sums of X and F over a chunk of tokens and a slab of columns
               apply:  Z and its norm for a few whole rows
    backward   reduce: column sums of Δ and Δ⊙F over a chunk of whole rows
               apply:  ∂L/∂X and ∂L/∂F for a few whole rows
               gains:  ∂L/∂β, ∂L/∂α, ∂L/∂λ for a few columns, after all else

The last block to reduce a segment of a sample adds up the sums of all, in order of their chunk;
apply tasks of that segment wait for it. Results are deterministic.

Shapes: B batch, T tokens, D width, S segments, C chunks of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import (
    announce,
    block,
    fold,
    lag,
    load_gain,
    locate,
    processors,
    real_tokens,
    rows_for,
    schedule,
    stages_for,
    store_merged,
    tiles,
    tiles_before,
    total_tokens,
    wait_for,
    warps_for,
)
from mvsplit.kernels.fused.merge_parts import Gradients, Merged, Weights, store_gain_gradients

_VARYING = ["batch", "chunk", "n_chunks", "n_apply", "lag"]
_COLUMNS = 32  # that one gain task sums
# Measured on an H200. Values in a tile of an apply task and in one step of a reduce task; tiles of
# an apply task; blocks for each processor between a sample's two kinds of task.
_FORWARD = {"apply": 4096, "reduce": 4096, "steps": 4, "lag": 12}
_BACKWARD = {"apply": 4096, "reduce": 2048, "steps": 2, "lag": 8, "lag of few": 12}
_FEW = 1 << 24  # values of X, fewer of which are read again from the L2 cache in any case


@triton.jit
def _sum_columns(
    p_x, p_f, p_partial, sx_t, sf_t, i, chunk, i_chunk, count, start, local,
    D: tl.constexpr, SLAB: tl.constexpr, SUB: tl.constexpr, STAGES: tl.constexpr,
    LEAKS: tl.constexpr,
):  # fmt: skip
    """Column sums of F and, where the mean leaks, of X over one chunk of one slab of columns."""
    o_d = (i % tl.cdiv(D, SLAB)) * SLAB + tl.arange(0, SLAB)
    end = tl.minimum(local + chunk, count)
    b_f = tl.zeros([SUB, SLAB], tl.float32)
    b_x = tl.zeros([SUB, SLAB], tl.float32)
    for t in tl.range(local, end, SUB, num_stages=STAGES):
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
def _merge_rows(
    p_x, p_f, p_y, p_r, b_beta, shift, first, end, count, start, before, sx_t, sf_t, o_d, m_d, eps,
    D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Z = X + β⊙F + shift and its norm for tokens first … end − 1 of a segment that starts at
    `start`; `before`: tokens of the samples before this one."""
    for t in tl.range(first, end, ROWS, num_stages=STAGES):
        o_t = t + tl.arange(0, ROWS)
        m = (o_t < count)[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)
        x = tl.load(p_x + row[:, None] * sx_t + o_d[None, :], m, 0.0).to(tl.float32)
        f = tl.load(p_f + row[:, None] * sf_t + o_d[None, :], m, 0.0).to(tl.float32)
        z = tl.where(m, x + b_beta[None, :] * f + shift[None, :], 0.0)
        store_merged(p_y, p_r, z, row + before, o_t < end, o_d, m_d, eps, D, NORM)


@triton.jit(do_not_specialize=_VARYING)
def split_merge_waiting_fwd_kernel(
    p_x, p_f, p_y, p_r, p_beta, p_alpha, p_leak, p_valid, p_partial, p_mean_f, p_mean_x, p_count,
    beta, alpha, leak, s_beta, s_alpha, s_leak, sx_b, sx_t, sf_b, sf_t,
    lengths, batch, chunk, n_chunks, n_apply, lag, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SLAB: tl.constexpr,
    SUB: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, LEAKS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(lengths)
    n_slabs: tl.constexpr = (D + SLAB - 1) // SLAB
    i_b, i, reduces = schedule(tl.program_id(0), batch, n_chunks * n_slabs, n_apply, lag)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_x += i_b * sx_b
    p_f += i_b * sf_b
    if reduces:
        p_partial += i_b * n_chunks * 2 * D
        i_s, start, local, length = locate(i // n_slabs, lengths, chunk)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        _sum_columns(
            p_x, p_f, p_partial, sx_t, sf_t, i, chunk, i // n_slabs, count, start, local,
            D, SLAB, SUB, STAGES, LEAKS,
        )  # fmt: skip
        i_bs = i_b * S + i_s
        n = tl.cdiv(length, chunk)
        if announce(p_count + i_bs) == n * n_slabs - 1:
            first = tiles_before(i_s, lengths, chunk)
            sum_f, sum_x = fold(p_partial, first, n, o_d, m_d, D, BLOCK_D, LEAKS)
            count = tl.maximum(count, 1)
            tl.store(p_mean_f + i_bs * D + o_d, sum_f / count, mask=m_d)
            if LEAKS:
                tl.store(p_mean_x + i_bs * D + o_d, sum_x / count, mask=m_d)
            announce(p_count + i_bs)
    else:
        i_s, start, local, length = locate(i, lengths, ROWS * STEPS)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        i_bs = i_b * S + i_s
        b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
        b_alpha = load_gain(p_alpha, alpha, s_alpha, o_d, m_d)
        wait_for(p_count + i_bs, tl.cdiv(length, chunk) * n_slabs + 1)
        mean_f = tl.load(p_mean_f + i_bs * D + o_d, m_d, 0.0)
        shift = (b_alpha - b_beta) * mean_f  # β⊙PF + α⊙JF = β⊙F + (α − β)⊙JF
        if LEAKS:
            b_leak = load_gain(p_leak, leak, s_leak, o_d, m_d)
            shift -= b_leak * tl.load(p_mean_x + i_bs * D + o_d, m_d, 0.0)
        _merge_rows(
            p_x, p_f, p_y, p_r, b_beta, shift, local, tl.minimum(local + ROWS * STEPS, length),
            count, start, i_b * total_tokens(lengths), sx_t, sf_t, o_d, m_d, eps,
            D, ROWS, STAGES, NORM,
        )  # fmt: skip


@triton.jit
def _deltas(
    p_g, p_y, p_r, t, end, start, sg_t, o_d, m_d,
    D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Δ_i = r_i (G_i − Y_i ⟨G_i, Y_i⟩/D) (Eq. 50) for ROWS tokens of a segment from `t` on,
    zero from `end` on; with their rows, and the mask of what is real."""
    o_t = t + tl.arange(0, ROWS)
    real = o_t < end
    m = real[:, None] & m_d[None, :]
    row = (start + o_t).to(tl.int64)
    delta = tl.load(p_g + row[:, None] * sg_t + o_d[None, :], m, 0.0).to(tl.float32)
    if NORM:
        y = tl.load(p_y + row[:, None] * D + o_d[None, :], m, 0.0).to(tl.float32)
        r = tl.load(p_r + row, real, 0.0)
        along = tl.sum(delta * y, 1) / D
        delta = (delta - y * along[:, None]) * r[:, None]
    return delta, row, m


@triton.jit
def _sum_deltas(
    p_g, p_y, p_f, p_r, p_sums, first, end, start, sg_t, sf_t, o_d, m_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SUB: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, GAINS: tl.constexpr,
):  # fmt: skip
    """Column sums of Δ and, where gains learn, of Δ⊙F over tokens first … end − 1 of a segment."""
    b_delta = tl.zeros([SUB, BLOCK_D], tl.float32)
    b_delta_f = tl.zeros([SUB, BLOCK_D], tl.float32)
    for t in tl.range(first, end, SUB, num_stages=STAGES):
        delta, row, m = _deltas(p_g, p_y, p_r, t, end, start, sg_t, o_d, m_d, D, SUB, NORM)
        b_delta += delta
        if GAINS:
            f = tl.load(p_f + row[:, None] * sf_t + o_d[None, :], m, 0.0)
            b_delta_f += delta * f.to(tl.float32)
    tl.store(p_sums + o_d, tl.sum(b_delta, 0), mask=m_d)
    if GAINS:
        tl.store(p_sums + D + o_d, tl.sum(b_delta_f, 0), mask=m_d)


@triton.jit
def _store_deltas(
    p_g, p_y, p_r, p_dx, p_df, b_beta, shift, leaked, first, end, count, start, sg_t, o_d, m_d,
    D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """∂L/∂F = β⊙Δ + shift (Eq. 53) and ∂L/∂X = Δ − leaked (Eq. 52) for tokens first … end − 1 of a
    segment; zero on padding."""
    for t in tl.range(first, end, ROWS, num_stages=STAGES):
        delta, row, m = _deltas(p_g, p_y, p_r, t, count, start, sg_t, o_d, m_d, D, ROWS, NORM)
        df = b_beta * delta + shift
        out = row[:, None] * D + o_d[None, :]
        inside = (t + tl.arange(0, ROWS) < end)[:, None] & m_d[None, :]
        dx = tl.where(m, delta - leaked, 0.0)
        tl.store(p_dx + out, dx.to(p_dx.dtype.element_ty), mask=inside)
        tl.store(p_df + out, tl.where(m, df, 0.0).to(p_df.dtype.element_ty), mask=inside)


@triton.jit
def _gain_gradients(
    p_sum, p_mean_f, p_mean_x, p_dbeta, p_dalpha, p_dleak, i, lengths, batch,
    D: tl.constexpr, COLUMNS: tl.constexpr, LEAKS: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """Eq. 54 for a few columns: sums over samples and segments of what each has added up."""
    S: tl.constexpr = len(lengths)
    o_d = i * COLUMNS + tl.arange(0, COLUMNS)
    dbeta = tl.zeros([32, COLUMNS], tl.float32)
    dalpha = tl.zeros([32, COLUMNS], tl.float32)
    dleak = tl.zeros([32, COLUMNS], tl.float32)
    for s in tl.static_range(S):
        end = tl.where(lengths[s] > 0, batch, 0)
        for b in range(0, end, 32):
            o_b = b + tl.arange(0, 32)
            m = (o_b < batch)[:, None] & (o_d < D)[None, :]
            row = (o_b.to(tl.int64) * S + s)[:, None]
            delta = tl.load(p_sum + row * 2 * D + o_d[None, :], m, 0.0)
            delta_f = tl.load(p_sum + (row * 2 + 1) * D + o_d[None, :], m, 0.0)
            mean_part = delta * tl.load(p_mean_f + row * D + o_d[None, :], m, 0.0)
            dbeta += delta_f - mean_part
            dalpha += mean_part
            if LEAKS:
                dleak -= delta * tl.load(p_mean_x + row * D + o_d[None, :], m, 0.0)
    store_gain_gradients(p_dbeta, p_dalpha, p_dleak, dbeta, dalpha, dleak, o_d, D, TIED)


@triton.jit(do_not_specialize=[*_VARYING, "filled"])
def split_merge_waiting_bwd_kernel(
    p_g, p_y, p_f, p_r, p_beta, p_alpha, p_leak, p_valid, p_mean_f, p_mean_x,
    p_dx, p_df, p_dbeta, p_dalpha, p_dleak, p_partial, p_sum, p_count,
    beta, alpha, leak, s_beta, s_alpha, s_leak, sg_b, sg_t, sf_b, sf_t,
    lengths, batch, chunk, n_chunks, n_apply, lag, filled,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SUB: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, COLUMNS: tl.constexpr, LEAKS: tl.constexpr,
    TIED: tl.constexpr, NORM: tl.constexpr, GAINS: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = len(lengths)
    task = tl.program_id(0)
    n_main = batch * (n_chunks + n_apply)
    i_b, i, reduces = schedule(task, batch, n_chunks, n_apply, lag)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    tokens = i_b * total_tokens(lengths)
    p_g += i_b * sg_b
    p_f += i_b * sf_b
    p_y += tokens * D
    p_r += tokens
    if task >= n_main:
        wait_for(p_count, filled)
        _gain_gradients(
            p_sum, p_mean_f, p_mean_x, p_dbeta, p_dalpha, p_dleak, task - n_main, lengths, batch,
            D, COLUMNS, LEAKS, TIED,
        )  # fmt: skip
    elif reduces:
        i_s, start, local, length = locate(i, lengths, chunk)
        end = tl.minimum(local + chunk, real_tokens(p_valid, i_b, i_s, length, S))
        p_partial += i_b * n_chunks * 2 * D
        _sum_deltas(
            p_g, p_y, p_f, p_r, p_partial + i * 2 * D, local, end, start, sg_t, sf_t, o_d, m_d,
            D, BLOCK_D, SUB, STAGES, NORM, GAINS,
        )  # fmt: skip
        i_bs = i_b * S + i_s
        n = tl.cdiv(length, chunk)
        if announce(p_count + 1 + i_bs) == n - 1:
            first = tiles_before(i_s, lengths, chunk)
            sum_0, sum_1 = fold(p_partial, first, n, o_d, m_d, D, BLOCK_D, GAINS)
            tl.store(p_sum + i_bs * 2 * D + o_d, sum_0, mask=m_d)
            if GAINS:
                tl.store(p_sum + (i_bs * 2 + 1) * D + o_d, sum_1, mask=m_d)
            announce(p_count + 1 + i_bs)
            tl.atomic_add(p_count, 1, sem="release", scope="gpu")
    else:
        i_s, start, local, length = locate(i, lengths, ROWS * STEPS)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        i_bs = i_b * S + i_s
        b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)[None, :]
        b_alpha = load_gain(p_alpha, alpha, s_alpha, o_d, m_d)[None, :]
        b_leak = load_gain(p_leak, leak, s_leak, o_d, m_d)[None, :]
        wait_for(p_count + 1 + i_bs, tl.cdiv(length, chunk) + 1)
        mean = tl.load(p_sum + i_bs * 2 * D + o_d, mask=m_d, other=0.0)
        mean = (mean / tl.maximum(count, 1))[None, :]  # Eq. 51
        _store_deltas(
            p_g, p_y, p_r, p_dx + tokens * D, p_df + tokens * D, b_beta, (b_alpha - b_beta) * mean,
            b_leak * mean, local, tl.minimum(local + ROWS * STEPS, length), count, start, sg_t,
            o_d, m_d, D, ROWS, STAGES, NORM,
        )  # fmt: skip


def _is_small(x: Tensor) -> bool:
    """Whether `x` [B, T, D] has too few values for long tasks to occupy every processor."""
    return x.numel() < 2 * 32768 * processors(x.device)


def forward(
    x: Tensor, f: Tensor, out: Merged, gains: Weights, valid: Tensor | None, lengths: list[int],
    eps: float,
) -> None:  # fmt: skip
    """Fills `out`; without the norm where its 1/RMS is empty."""
    batch, _, width = x.shape
    small = _is_small(x)
    slab = min(64, block(width))
    rows, steps = rows_for(width, _FORWARD["apply"]), 1 if small else _FORWARD["steps"]
    chunk = max(64 if small else 256, triton.next_power_of_2(max(lengths)) // 16)
    n_chunks, n_apply = tiles(lengths, chunk), tiles(lengths, rows * steps)
    n_reduce = n_chunks * triton.cdiv(width, slab)
    partial = torch.empty(batch, n_chunks, 2, width, dtype=torch.float32, device=x.device)
    done = torch.zeros(batch * len(lengths), dtype=torch.int32, device=x.device)
    split_merge_waiting_fwd_kernel[(batch * (n_reduce + n_apply),)](
        x, f, out.y, out.r, *gains.pointers, valid, partial, out.mean_f, out.mean_x, done,
        *gains.scalars, x.stride(0), x.stride(1), f.stride(0), f.stride(1),
        tuple(lengths), batch, chunk, n_chunks, n_apply,
        lag(x.device, batch, n_reduce + n_apply, _FORWARD["lag"]), eps,
        D=width, BLOCK_D=block(width), ROWS=rows, SLAB=slab, SUB=_FORWARD["reduce"] // slab,
        STEPS=steps, STAGES=stages_for(2 * rows * block(width) * x.element_size(), 3),
        LEAKS=gains.leaks, NORM=out.r.numel() > 0, num_warps=warps_for(rows, width, 32),
    )  # fmt: skip


def backward(
    grad: Tensor, f: Tensor | None, found: Merged, out: Gradients, gains: Weights,
    valid: Tensor | None, lengths: list[int],
) -> None:  # fmt: skip
    """Fills `out` from what a forward has `found`, 1/RMS empty where there was no norm; `f` is None
    where no gain learns."""
    batch, _, width = grad.shape
    learns = f is not None
    small = _is_small(grad)
    rows, sub = (rows_for(width, _BACKWARD[task]) for task in ("apply", "reduce"))
    steps = 1 if small else _BACKWARD["steps"]
    chunk = rows_for(width, 8192 if small else 32768)
    chunk = max(chunk, triton.next_power_of_2(max(lengths)) // 64)
    n_chunks, n_apply = tiles(lengths, chunk), tiles(lengths, rows * steps)
    n_gains = triton.cdiv(width, _COLUMNS) if learns else 0
    filled = batch * sum(n > 0 for n in lengths)
    pace = "lag of few" if grad.numel() < _FEW else "lag"
    partial = torch.empty(batch, n_chunks, 2, width, dtype=torch.float32, device=grad.device)
    sums = torch.empty(batch, len(lengths), 2, width, dtype=torch.float32, device=grad.device)
    done = torch.zeros(1 + batch * len(lengths), dtype=torch.int32, device=grad.device)
    other = grad if f is None else f
    split_merge_waiting_bwd_kernel[(batch * (n_chunks + n_apply) + n_gains,)](
        grad, found.y, other, found.r, *gains.pointers, valid, found.mean_f,
        found.mean_x, *out, partial, sums, done,
        *gains.scalars, grad.stride(0), grad.stride(1), other.stride(0), other.stride(1),
        tuple(lengths), batch, chunk, n_chunks, n_apply,
        lag(grad.device, batch, n_chunks + n_apply, _BACKWARD[pace]), filled,
        D=width, BLOCK_D=block(width), ROWS=rows, SUB=sub, STEPS=steps,
        STAGES=stages_for(3 * sub * block(width) * grad.element_size(), 4), COLUMNS=_COLUMNS,
        LEAKS=gains.leaks, TIED=gains.tied, NORM=found.r.numel() > 0, GAINS=learns,
        num_warps=warps_for(rows, width, 32),
    )  # fmt: skip
