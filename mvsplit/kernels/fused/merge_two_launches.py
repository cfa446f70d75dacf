"""The merge with means (`split_merge`) in two plain launches each way: for small batches.

    forward    means:  JF and JX of a segment, for a slab of columns
               merge:  Z and its norm, for a few whole rows
    backward   sums:   column sums of Δ and Δ⊙F over a chunk of whole rows
               merge:  ∂L/∂X and ∂L/∂F for a tile; ∂L/∂β, ∂L/∂α, ∂L/∂λ for a few columns

No block waits for another. The second launch takes the samples from the last to the first, so that
it finds in the L2 cache what the first has read last. On Hopper its blocks start and read while the
first launch ends (programmatic dependent launch). Sums are added in a fixed order.

Shapes: B batch, T tokens, D width, S segments, C chunks of a sample.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import (
    block,
    load_gain,
    locate,
    processors,
    real_tokens,
    rows_for,
    stages_for,
    store_merged,
    tiles,
    tiles_before,
    total_tokens,
    warps_for,
)
from mvsplit.kernels.fused.merge_parts import Gradients, Merged, Weights, store_gain_gradients

_VARYING = ["n_tiles", "n_chunks", "batch", "chunk"]
# Measured on an H200: values in a tile, warps; columns of a slab, rows of a chunk or a tile.
MEANS = {"columns": 64, "columns of few": 32, "tile": 4096, "warps": 4}
FORWARD = {"tile": 8192, "warps": 8}
SUMS = {"rows": 32, "tile": 2048, "values": 16, "stages": 3}
BACKWARD = {"rows": 64, "tile": 8192, "warps": 8, "gains": 16}


@triton.jit
def segment(i_s, lengths):
    """Where a segment starts in its sample, and its length."""
    start = 0
    length = 0
    for s in tl.static_range(len(lengths)):
        start += tl.where(s < i_s, lengths[s], 0)
        length = tl.where(s == i_s, lengths[s], length)
    return start, length


@triton.jit
def split_merge_fwd_means_kernel(
    p_x, p_f, p_beta, p_alpha, p_leak, p_valid, p_mean_f, p_mean_x, p_shift,
    beta, alpha, leak, s_beta, s_alpha, s_leak, sx_b, sx_t, sf_b, sf_t, lengths,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, LEAKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Means [B, S, D] of F and, where they leak, of X; and what they add to X + β⊙F."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    S: tl.constexpr = len(lengths)
    N_C: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    i_bs = tl.program_id(0) // N_C
    i_b = (i_bs // S).to(tl.int64)
    start, length = segment(i_bs % S, lengths)
    count = real_tokens(p_valid, i_b, i_bs % S, length, S)
    o_d = (tl.program_id(0) % N_C) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    p_x += i_b * sx_b
    p_f += i_b * sf_b
    b_f = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for t in tl.range(0, count, ROWS, num_stages=1):
        o_t = t + tl.arange(0, ROWS)
        m = (o_t < count)[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)[:, None]
        b_f += tl.load(p_f + row * sf_t + o_d[None, :], m, 0.0)
        if LEAKS:
            b_x += tl.load(p_x + row * sx_t + o_d[None, :], m, 0.0)
    at = i_bs.to(tl.int64) * D + o_d
    real = tl.maximum(count, 1)
    mean = tl.sum(b_f, 0) / real
    tl.store(p_mean_f + at, mean, mask=m_d)
    b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
    shift = (load_gain(p_alpha, alpha, s_alpha, o_d, m_d) - b_beta) * mean
    if LEAKS:
        mean = tl.sum(b_x, 0) / real
        tl.store(p_mean_x + at, mean, mask=m_d)
        shift -= load_gain(p_leak, leak, s_leak, o_d, m_d) * mean
    tl.store(p_shift + at, shift, mask=m_d)


@triton.jit(do_not_specialize=_VARYING)
def split_merge_fwd_kernel(
    p_x, p_f, p_y, p_r, p_beta, p_valid, p_shift, beta, s_beta, sx_b, sx_t, sf_b, sf_t,
    lengths, n_tiles, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """β⊙PF + α⊙JF − λ⊙JX = β⊙F + shift, for a few rows."""
    S: tl.constexpr = len(lengths)
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b = (i // n_tiles).to(tl.int64)
    i_s, start, local, length = locate(i % n_tiles, lengths, ROWS)
    count = real_tokens(p_valid, i_b, i_s, length, S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
    o_t = local + tl.arange(0, ROWS)
    m = (o_t < count)[:, None] & m_d[None, :]
    row = (start + o_t).to(tl.int64)
    x = tl.load(p_x + i_b * sx_b + row[:, None] * sx_t + o_d[None, :], m, 0.0)
    f = tl.load(p_f + i_b * sf_b + row[:, None] * sf_t + o_d[None, :], m, 0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    shift = tl.load(p_shift + (i_b * S + i_s) * D + o_d, m_d, 0.0)
    z = x.to(tl.float32) + b_beta[None, :] * f.to(tl.float32) + shift[None, :]
    row += i_b * total_tokens(lengths)
    if p_valid is not None:
        z = tl.where(m, z, 0.0)
    store_merged(p_y, p_r, z, row, o_t < length, o_d, m_d, eps, D, NORM)


@triton.jit(do_not_specialize=_VARYING)
def split_merge_bwd_sums_kernel(
    p_g, p_y, p_f, p_r, p_valid, p_along, p_sums, sg_b, sg_t, sf_b, sf_t,
    lengths, chunk, n_chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, GAINS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """⟨G_i, Y_i⟩/D [B, T], and the sums of Δ and, where a gain learns, of Δ⊙F over the rows of a
    chunk [B, C, 2, D]."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    S: tl.constexpr = len(lengths)
    i_b = (tl.program_id(0) // n_chunks).to(tl.int64)
    i_s, start, local, length = locate(tl.program_id(0) % n_chunks, lengths, chunk)
    end = tl.minimum(local + chunk, real_tokens(p_valid, i_b, i_s, length, S))
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    tokens = i_b * total_tokens(lengths)
    b_delta = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_delta_f = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for t in tl.range(local, end, ROWS, num_stages=STAGES):
        o_t = t + tl.arange(0, ROWS)
        real = o_t < end
        m = real[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)
        g = tl.load(p_g + i_b * sg_b + row[:, None] * sg_t + o_d[None, :], m, 0.0)
        delta = g.to(tl.float32)
        if NORM:
            y = tl.load(p_y + (tokens + row)[:, None] * D + o_d[None, :], m, 0.0).to(tl.float32)
        if GAINS:
            f = tl.load(
                p_f + i_b * sf_b + row[:, None] * sf_t + o_d[None, :], m, 0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
        if NORM:
            r = tl.load(p_r + tokens + row, real, 0.0)
            along = tl.sum(delta * y, 1) / D
            tl.store(p_along + tokens + row, along, mask=real)
            delta = (delta - y * along[:, None]) * r[:, None]  # Eq. 50
        b_delta += delta
        if GAINS:
            b_delta_f += delta * f.to(tl.float32)
    p_sums += tl.program_id(0).to(tl.int64) * 2 * D + o_d
    tl.store(p_sums, tl.sum(b_delta, 0), mask=m_d)
    if GAINS:
        tl.store(p_sums + D, tl.sum(b_delta_f, 0), mask=m_d)


@triton.jit
def _add_chunks(p_sums, n, o_d, m_d, D: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of Δ over n chunks, in order."""
    total = tl.zeros([COLUMNS], tl.float32)
    for c in range(0, n, 8):
        for k in tl.static_range(8):
            total += tl.load(p_sums + (c + k) * 2 * D + o_d, m_d & (c + k < n), 0.0)
    return total


@triton.jit
def _gain_gradients(
    p_sums, p_mean_f, p_mean_x, p_dbeta, p_dalpha, p_dleak, i, lengths, batch, chunk, n_chunks,
    D: tl.constexpr, COLUMNS: tl.constexpr, LEAKS: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """Eq. 54 for a few columns, from the sums over every chunk of every sample."""
    ROWS: tl.constexpr = 64
    S: tl.constexpr = len(lengths)
    o_d = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    dbeta = tl.zeros([ROWS, COLUMNS], tl.float32)
    dalpha = tl.zeros([ROWS, COLUMNS], tl.float32)
    dleak = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, batch * n_chunks, ROWS):
        i_bc = first + tl.arange(0, ROWS)[:, None]
        m = (i_bc < batch * n_chunks) & (o_d < D)
        i_s = locate(i_bc % n_chunks, lengths, chunk)[0]
        p = p_sums + i_bc.to(tl.int64) * 2 * D + o_d
        at = ((i_bc // n_chunks).to(tl.int64) * S + i_s) * D + o_d
        delta = tl.load(p, m, 0.0)
        mean_part = delta * tl.load(p_mean_f + at, m, 0.0)
        dbeta += tl.load(p + D, m, 0.0) - mean_part
        dalpha += mean_part
        if LEAKS:
            dleak -= delta * tl.load(p_mean_x + at, m, 0.0)
    o_d = i * COLUMNS + tl.arange(0, COLUMNS)
    store_gain_gradients(p_dbeta, p_dalpha, p_dleak, dbeta, dalpha, dleak, o_d, D, TIED)


@triton.jit(do_not_specialize=_VARYING)
def split_merge_bwd_kernel(
    p_g, p_y, p_r, p_beta, p_alpha, p_leak, p_valid, p_along, p_sums, p_mean_f, p_mean_x,
    p_dx, p_df, p_dbeta, p_dalpha, p_dleak,
    beta, alpha, leak, s_beta, s_alpha, s_leak, sg_b, sg_t,
    lengths, batch, n_tiles, chunk, n_chunks,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GAIN_COLUMNS: tl.constexpr,
    N_GAINS: tl.constexpr, LEAKS: tl.constexpr, TIED: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """∂L/∂X and ∂L/∂F of a tile; the first N_GAINS blocks work on the gains."""
    S: tl.constexpr = len(lengths)
    N_C: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    if tl.program_id(0) < N_GAINS:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        _gain_gradients(
            p_sums, p_mean_f, p_mean_x, p_dbeta, p_dalpha, p_dleak, tl.program_id(0), lengths,
            batch, chunk, n_chunks, D, GAIN_COLUMNS, LEAKS, TIED,
        )  # fmt: skip
    else:
        i = tl.num_programs(0) - 1 - tl.program_id(0)
        i_b = (i // (n_tiles * N_C)).to(tl.int64)
        i_s, start, local, length = locate(i // N_C % n_tiles, lengths, ROWS)
        count = real_tokens(p_valid, i_b, i_s, length, S)
        o_d = (i % N_C) * COLUMNS + tl.arange(0, COLUMNS)
        m_d = o_d < D
        o_t = local + tl.arange(0, ROWS)
        real = o_t < count
        m = real[:, None] & m_d[None, :]
        row = (start + o_t).to(tl.int64)
        out = i_b * total_tokens(lengths) + row
        g = tl.load(p_g + i_b * sg_b + row[:, None] * sg_t + o_d[None, :], m, 0.0)
        delta = g.to(tl.float32)
        at = out[:, None] * D + o_d[None, :]
        if NORM:
            y = tl.load(p_y + at, m, 0.0)
            r = tl.load(p_r + out, real, 0.0)
        b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
        b_alpha = load_gain(p_alpha, alpha, s_alpha, o_d, m_d)
        b_leak = load_gain(p_leak, leak, s_leak, o_d, m_d)
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        p_sums += (i_b * n_chunks + tiles_before(i_s, lengths, chunk)) * 2 * D
        mean = _add_chunks(p_sums, tl.cdiv(length, chunk), o_d, m_d, D, COLUMNS)
        mean /= tl.maximum(count, 1)  # Eq. 51
        if NORM:
            along = tl.load(p_along + out, real, 0.0)
            delta = (delta - y.to(tl.float32) * along[:, None]) * r[:, None]  # Eq. 50
        df = b_beta[None, :] * delta + ((b_alpha - b_beta) * mean)[None, :]  # Eq. 53
        delta -= (b_leak * mean)[None, :]  # Eq. 52
        if p_valid is not None:
            delta = tl.where(m, delta, 0.0)
            df = tl.where(m, df, 0.0)
        m = (o_t < length)[:, None] & m_d[None, :]
        tl.store(p_dx + at, delta.to(p_dx.dtype.element_ty), mask=m)
        tl.store(p_df + at, df.to(p_df.dtype.element_ty), mask=m)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start while the one before it ends (programmatic dependent launch): on
    NVIDIA's Hopper and later. It waits with `gdc_wait` before it touches what that one wrote."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_after(overlap: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it ends."""
    return {"launch_pdl": True} if overlap else {}


def _slab(x: Tensor) -> int:
    """Columns whose means a block takes: fewer where there are few values for all processors."""
    few = x.numel() < 65536 * processors(x.device)
    return min(MEANS["columns of few" if few else "columns"], block(x.shape[-1]))


def forward(
    x: Tensor, f: Tensor, out: Merged, gains: Weights, valid: Tensor | None, lengths: list[int],
    eps: float,
) -> None:  # fmt: skip
    """Fills `out`; without the norm where its 1/RMS is empty."""
    batch, _, width = x.shape
    strides = x.stride(0), x.stride(1), f.stride(0), f.stride(1)
    overlap = overlaps(x.device)
    shift = torch.empty_like(out.mean_f)
    columns = _slab(x)
    split_merge_fwd_means_kernel[(batch * len(lengths) * triton.cdiv(width, columns),)](
        x, f, *gains.pointers, valid, out.mean_f, out.mean_x, shift, *gains.scalars, *strides,
        tuple(lengths), D=width, COLUMNS=columns, ROWS=MEANS["tile"] // columns,
        LEAKS=gains.leaks, OVERLAP=overlap, num_warps=MEANS["warps"],
    )  # fmt: skip
    rows = rows_for(width, FORWARD["tile"])
    n_tiles = tiles(lengths, rows)
    split_merge_fwd_kernel[(batch * n_tiles,)](
        x, f, out.y, out.r, gains.pointers[0], valid, shift, gains.values[0], gains.strides[0],
        *strides, tuple(lengths), n_tiles, eps, D=width, BLOCK_D=block(width), ROWS=rows,
        NORM=out.r.numel() > 0, OVERLAP=overlap, num_warps=FORWARD["warps"],
        **launch_after(overlap),
    )  # fmt: skip


def backward(
    grad: Tensor, f: Tensor | None, found: Merged, out: Gradients, gains: Weights,
    valid: Tensor | None, lengths: list[int],
) -> None:  # fmt: skip
    """Fills `out` from what a forward has `found`, 1/RMS empty where there was no norm; `f` is None
    where no gain learns."""
    batch, _, width = grad.shape
    learns, norm = f is not None, found.r.numel() > 0
    f = grad if f is None else f
    overlap = overlaps(grad.device)
    chunk = max(SUMS["rows"], triton.next_power_of_2(max(lengths)) // 64)
    n_chunks = tiles(lengths, chunk)
    sums = torch.empty(batch, n_chunks, 2, width, dtype=torch.float32, device=grad.device)
    along = torch.empty_like(found.r)
    rows = rows_for(width, SUMS["tile"])
    split_merge_bwd_sums_kernel[(batch * n_chunks,)](
        grad, found.y, f, found.r, valid, along, sums,
        grad.stride(0), grad.stride(1), f.stride(0), f.stride(1), tuple(lengths), chunk, n_chunks,
        D=width, BLOCK_D=block(width), ROWS=rows,
        STAGES=stages_for(3 * rows * block(width) * grad.element_size(), SUMS["stages"]),
        NORM=norm, GAINS=learns, OVERLAP=overlap, num_warps=warps_for(rows, width, SUMS["values"]),
    )  # fmt: skip
    rows = BACKWARD["rows"]
    columns = min(block(width), BACKWARD["tile"] // rows)
    n_tiles, n_gains = tiles(lengths, rows), triton.cdiv(width, BACKWARD["gains"]) if learns else 0
    split_merge_bwd_kernel[(n_gains + batch * n_tiles * triton.cdiv(width, columns),)](
        grad, found.y, found.r, *gains.pointers, valid, along, sums, found.mean_f, found.mean_x,
        *out, *gains.scalars, grad.stride(0), grad.stride(1), tuple(lengths), batch, n_tiles, chunk,
        n_chunks, D=width, COLUMNS=columns, ROWS=rows, GAIN_COLUMNS=BACKWARD["gains"],
        N_GAINS=n_gains, LEAKS=gains.leaks, TIED=gains.tied, NORM=norm, OVERLAP=overlap,
        num_warps=BACKWARD["warps"], **launch_after(overlap),
    )  # fmt: skip
