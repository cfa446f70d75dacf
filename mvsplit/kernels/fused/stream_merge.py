"""The merge of the sampling engine: Z = X + β⊙PF + α⊙JF − λ⊙JX, then RMSNorm (paper Eq. 7–8).

The means are already there as sums: of X by segment, and of F by segment, or by chunk from the
epilogue of the product that made F. So a block reads a few rows of X and F once and writes the next
trunk over X.

Shapes: N rows, D width, C chunks, B samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block, gain_stride, load_gain
from mvsplit.kernels.fused.stream import (
    _CHUNK,
    SLAB,
    Stream,
    column_sums,
    is_real,
    lines,
    segment_of,
    sum_tasks,
    wait_for_inputs,
)
from mvsplit.kernels.reference import Gain, Gains

_VARYING = ["n_rows", "image", "text", "image_rows", "sample_rows", "beta", "alpha", "leak"]
_VARYING += ["n_lines"]


@dataclass(frozen=True)
class Rows:
    """How a merge is cut up: rows and warps of a block, and whether it starts early."""

    rows: int = 4
    warps: int = 4
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> Rows:
        return replace(self, pdl=pdl)


@triton.jit
def _mean_part(
    p_partial, first, n, n_chunks, o_d, m_d, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Adds up the sums of chunks first … first + n − 1, in order."""
    FOLD: tl.constexpr = 8 if BLOCK_D <= 1024 else 1
    total = tl.zeros([FOLD, BLOCK_D], tl.float32)
    for i_split in tl.static_range(SPLIT):
        for c in range(0, n, FOLD):
            o_c = c + tl.arange(0, FOLD)
            p = p_partial + (i_split * n_chunks + first + o_c)[:, None] * D + o_d[None, :]
            total += tl.load(p, mask=(o_c < n)[:, None] & m_d[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=_VARYING)
def merge_kernel(
    p_x, p_f, p_y, p_partial, p_sum, p_beta, p_alpha, p_leak, p_valid, p_ahead,
    beta, alpha, leak, s_beta, s_alpha, s_leak, n_rows, n_lines, image, text, image_rows,
    sample_rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    MEANS: tl.constexpr, TILES: tl.constexpr, LEAKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    o_row = row + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_beta = load_gain(p_beta, beta, s_beta, o_d, m_d)
    first, rows, count = segment_of(row, p_valid, image, text, image_rows, sample_rows)
    count = tl.maximum(count, 1)
    real = is_real(o_row, n_rows, p_valid, image, text, image_rows, sample_rows)
    m = real[:, None] & m_d[None, :]
    o_x = o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    if MEANS:
        b_alpha = load_gain(p_alpha, alpha, s_alpha, o_d, m_d)
    if LEAKS:
        b_leak = load_gain(p_leak, leak, s_leak, o_d, m_d)
    wait_for_inputs(p_ahead, n_lines, PDL)
    i_bs = 2 * (row // sample_rows) + (row % sample_rows >= image_rows).to(tl.int32)
    z = tl.load(p_x + o_x, m, 0.0).to(tl.float32)
    f = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_split in tl.static_range(SPLIT):
        p_plane = p_f + i_split * n_rows.to(tl.int64) * D
        f += tl.load(p_plane + o_x, m, 0.0).to(tl.float32)
    z += b_beta[None, :] * f
    if MEANS:
        if TILES == 0:  # by chunk
            sum_f = _mean_part(
                p_partial, first // _CHUNK, rows // _CHUNK, n_rows // _CHUNK, o_d, m_d, D, BLOCK_D,
                SPLIT,
            )  # fmt: skip
        else:
            sum_f = tl.zeros([BLOCK_D], tl.float32)
            for i in tl.static_range(SPLIT * TILES):
                i_part = (i // TILES * (n_rows // sample_rows) + i_bs // 2) * TILES + i % TILES
                sum_f += tl.load(p_partial + (2 * i_part + i_bs % 2) * D + o_d, m_d, 0.0)
        shift = (b_alpha - b_beta) * (sum_f / count)  # β⊙PF + α⊙JF = β⊙F + (α − β)⊙JF
        if LEAKS:
            shift -= b_leak * (tl.load(p_sum + i_bs * D + o_d, m_d, 0.0) / count)
        z = tl.where(m, z + shift[None, :], 0.0)
    r = tl.rsqrt(tl.sum(z * z, 1, keep_dims=True) / D + eps)
    inside = (o_row < n_rows)[:, None] & m_d[None, :]
    tl.store(p_y + o_x, (z * r).to(p_y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tasks", "image", "text", "image_rows", "sample_rows"])
def sums_kernel(
    p_x, p_f, p_sum_x, p_sum_f, p_valid, s_x, s_f, n_tasks, image, text, image_rows, sample_rows,
    D: tl.constexpr, SLAB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(None, 1, PDL)
    pid = tl.program_id(0)
    if pid < n_tasks:
        column_sums(pid, p_x, p_sum_x, p_valid, s_x, image, text, image_rows, sample_rows, D, SLAB)
    else:
        column_sums(
            pid - n_tasks, p_f, p_sum_f, p_valid, s_f, image, text, image_rows, sample_rows, D, SLAB
        )


def takes_means(gains: Gains) -> bool:
    """False where β and α are the same and nothing leaks, known without looking into tensors."""
    same = gains.alpha is gains.beta or _equal_numbers(gains.alpha, gains.beta)
    return not same or leaks(gains)


def leaks(gains: Gains) -> bool:
    """Whether the mean of the trunk is needed."""
    leak = gains.alpha if gains.leak is None else gains.leak
    return isinstance(leak, Tensor) or leak != 0


def _equal_numbers(a: Gain, b: Gain) -> bool:
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def merge(
    x: Tensor, f: Tensor, y: Tensor, partial: Tensor | None, sums: Tensor | None, gains: Gains,
    valid: Tensor | None, stream: Stream, eps: float, cut: Rows, *, ahead: Tensor | None = None,
    compile_only: bool = False,
) -> Any:  # fmt: skip
    """`y` [N, D] ← the next trunk; it may be `x` itself. Zero on rows that are no real token.

    Args:
        x: trunk [N, D], dense.
        f: branch in parts that add up, [split, N, D].
        partial: column sums of every part by chunk, [split, C, D], or by segment in tiles of a
            sample, [split, B, tiles, 2, D]; None where no mean is taken.
        sums: column sums of `x` by segment, [B, 2, D]; None where nothing leaks.
        valid: [B] int32, real text tokens of each sample; None: all.
        cut: its rows divide a chunk.
        ahead: weights that are needed next, for the L2 cache to fetch.
    """
    full = (gains.beta, gains.alpha, gains.alpha if gains.leak is None else gains.leak)
    pointers = [g if isinstance(g, Tensor) else None for g in full]
    numbers = [0.0 if isinstance(g, Tensor) else float(g) for g in full]
    width = x.shape[1]
    grid = (triton.cdiv(stream.rows, cut.rows),)
    options = {"launch_pdl": True} if cut.pdl else {}
    arguments = (
        x, f, y, partial, sums, *pointers, valid, ahead, *numbers, *map(gain_stride, pointers),
        stream.rows, lines(ahead), *stream.layout, eps,
    )  # fmt: skip
    constants = {
        "D": width, "BLOCK_D": block(width), "ROWS": cut.rows, "SPLIT": f.shape[0],
        "MEANS": partial is not None,
        "TILES": partial.shape[2] if partial is not None and partial.dim() == 5 else 0,
        "LEAKS": sums is not None, "PDL": cut.pdl,
        "num_warps": cut.warps,
    }  # fmt: skip
    if compile_only:
        return merge_kernel.warmup(*arguments, grid=grid, **constants, **options)
    return merge_kernel[grid](*arguments, **constants, **options)


def segment_sums(
    x: Tensor, sums: Tensor, valid: Tensor | None, stream: Stream, f: Tensor | None = None,
    sums_f: Tensor | None = None, *, pdl: bool = False, compile_only: bool = False,
) -> Any:  # fmt: skip
    """`sums` [B, 2, D] ← column sums of `x` [N, D] over the real rows of each segment, and `sums_f`
    those of `f`, if given, in one launch."""
    width = x.shape[1]
    n_tasks = sum_tasks(stream, width)
    options = {"launch_pdl": True} if pdl else {}
    grid = (n_tasks if f is None else 2 * n_tasks,)
    f, sums_f = (x, sums) if f is None else (f, sums_f)
    arguments = (x, f, sums, sums_f, valid, x.stride(0), f.stride(0), n_tasks, *stream.layout)
    constants = {"D": width, "SLAB": SLAB, "PDL": pdl, "num_warps": 4}
    if compile_only:
        return sums_kernel.warmup(*arguments, grid=grid, **constants, **options)
    return sums_kernel[grid](*arguments, **constants, **options)
