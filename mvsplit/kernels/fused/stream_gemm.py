"""Matrix products of few rows with what follows them fused in, for the sampling engine.

    qkv      rotation and QK-norm on the packed heads
    swiglu   silu(gate)⊙value: the two columns of a hidden unit are computed by one block
    writer   W_O and W_2: beside F, its column sums over each chunk of the stream's real rows

All are Y = A·Wᵀ for weights as the model holds them, [out, in]: nothing is packed or copied. A tile
takes its weight rows in whatever order brings together what the epilogue combines, since each row
is a run of its own in memory. Sums are in fp32; outputs are rounded once, after the epilogue.

Shapes: N rows, K columns of A, H query heads, G key/value heads, F hidden width of the FFN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block
from mvsplit.kernels.fused.stream import (
    _CHUNK,
    CHUNK,
    SLAB,
    Stream,
    column_sums,
    is_real,
    lines,
    sum_tasks,
    wait_for_inputs,
)

_VARYING = ["n_rows", "k_size", "n_tiles", "n_products", "n_lines"]
_VARYING += ["image", "text", "image_rows", "sample_rows"]


@dataclass(frozen=True)
class Tile:
    """How a product is cut up.

    Attributes:
        rows, columns: of the output that one block computes.
        depth: of one step along K.
        warps, stages: of a block; steps that load at once.
        split: blocks that share one output tile, each with a part of K (writers only).
        tma: whether the bulk copy engine loads the tiles.
        pdl: whether the kernel starts before the one before it has ended.
    """

    rows: int = 64
    columns: int = 128
    depth: int = 64
    warps: int = 4
    stages: int = 3
    split: int = 1
    tma: bool = False
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> Tile:
        return replace(self, pdl=pdl)

    @property
    def options(self) -> dict[str, Any]:
        """Of the launch."""
        pdl = {"launch_pdl": True} if self.pdl else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **pdl}

    def fits_tma(self, *operands: Tensor) -> bool:
        """The bulk copy engine wants rows that begin at multiples of 16 bytes."""
        return all(
            x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in operands
        )


@triton.jit
def _product(
    a, w, row, o_m, column, o_w, m_w, first, last, k_size, s_a, s_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A·Wᵀ over columns first … last − 1 of K, for BM rows and BN weight rows. [BM, BN]"""
    acc = tl.zeros([BM, BN], tl.float32)
    o_k = tl.arange(0, BK)
    for k in range(first, last, BK):
        if TMA:
            b_a = a.load([row, k])
            b_w = w.load([column, k])
        elif EVEN:
            b_a = tl.load(a + o_m[:, None] * s_a + (k + o_k)[None, :])
            b_w = tl.load(w + o_w[:, None] * s_w + (k + o_k)[None, :])
        else:
            m_k = (k + o_k < k_size)[None, :]
            b_a = tl.load(a + o_m[:, None] * s_a + (k + o_k)[None, :], m_k, 0.0)
            b_w = tl.load(w + o_w[:, None] * s_w + (k + o_k)[None, :], m_w[:, None] & m_k, 0.0)
        acc = tl.dot(b_a, b_w.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=_VARYING)
def qkv_kernel(
    a, w, p_out, p_cos, p_sin, n_rows, k_size, s_a, s_w, n_tiles, sample_rows, eps,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BN: tl.constexpr = HEADS * 2 * BLOCK_HALF
    row = (tl.program_id(0) % n_tiles) * BM
    head = (tl.program_id(0) // n_tiles) * HEADS
    o_row = row + tl.arange(0, BM)
    o_m = tl.minimum(o_row, n_rows - 1).to(tl.int64)
    o_c = tl.arange(0, BN)
    if TMA:  # halves of a head one after the other, as they lie
        o_h, o_i, o_p = o_c // (2 * BLOCK_HALF), o_c % BLOCK_HALF, o_c // BLOCK_HALF % 2
    else:  # the two columns that a rotation combines are neighbours
        o_h, o_i, o_p = o_c // (2 * BLOCK_HALF), o_c // 2 % BLOCK_HALF, o_c % 2
    m_w = (o_i < HALF) & (head + o_h < H + 2 * G)
    o_w = tl.where(m_w, (head + o_h) * 2 * HALF + o_p * HALF + o_i, 0).to(tl.int64)
    wait_for_inputs(None, 1, PDL)
    acc = _product(
        a, w, row, o_m, head * 2 * HALF, o_w, m_w, 0, k_size, k_size, s_a, s_w, BM, BN, BK, EVEN,
        TMA,
    )  # fmt: skip
    if TMA:
        acc = tl.permute(tl.reshape(acc, (BM, HEADS, 2, BLOCK_HALF)), (0, 1, 3, 2))
    else:
        acc = tl.reshape(acc, (BM, HEADS, BLOCK_HALF, 2))
    x1, x2 = tl.split(acc)  # [BM, HEADS, BLOCK_HALF]
    o_h = (head + tl.arange(0, HEADS))[None, :, None]
    o_i = tl.arange(0, BLOCK_HALF)[None, None, :]
    o_r = o_row[:, None, None]
    if head < H + G:
        o_t = (o_r % sample_rows) * HALF + o_i
        cos = tl.load(p_cos + o_t, o_i < HALF, 1.0)
        sin = tl.load(p_sin + o_t, o_i < HALF, 0.0)
        y1 = x1 * cos + x2 * sin
        y2 = x2 * cos - x1 * sin
        r = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, 2, keep_dims=True) / (2 * HALF) + eps)
        x1 = tl.where(o_h < H + G, y1 * r, x1)
        x2 = tl.where(o_h < H + G, y2 * r, x2)
    m = (o_r < n_rows) & (o_h < H + 2 * G) & (o_i < HALF)
    p_out += o_r.to(tl.int64) * ((H + 2 * G) * 2 * HALF) + o_h * 2 * HALF + o_i
    tl.store(p_out, x1.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + HALF, x2.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_VARYING)
def swiglu_kernel(
    a, w, p_out, p_sum, p_x, p_valid, p_ahead, n_rows, k_size, s_a, s_w, n_tiles, n_products,
    n_lines, image, text, image_rows, sample_rows,
    F: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, SUMS: tl.constexpr, SLAB: tl.constexpr, TMA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(p_ahead, n_lines, PDL)
    pid = tl.program_id(0)
    if SUMS:  # noqa: SIM102 (`and` would need p_sum even where there is none)
        if pid >= n_products:  # last, so that no product waits for them
            column_sums(
                pid - n_products, p_x, p_sum, p_valid, s_a, image, text, image_rows, sample_rows,
                D, SLAB,
            )  # fmt: skip
            return
    row = (pid % n_tiles) * BM
    first = (pid // n_tiles) * HALF
    o_row = row + tl.arange(0, BM)
    o_m = tl.minimum(o_row, n_rows - 1).to(tl.int64)
    o_h = first + tl.arange(0, HALF)
    if TMA:
        gate = tl.zeros([BM, HALF], tl.float32)
        value = tl.zeros([BM, HALF], tl.float32)
        for k in range(0, k_size, BK):
            b_a = a.load([row, k])
            gate = tl.dot(b_a, w.load([first, k]).T, gate, input_precision="ieee")
            value = tl.dot(b_a, w.load([F + first, k]).T, value, input_precision="ieee")
    else:
        o_c = tl.arange(0, 2 * HALF)
        m_w = first + o_c // 2 < F
        o_w = tl.where(m_w, (o_c % 2) * F + first + o_c // 2, 0).to(tl.int64)
        acc = _product(
            a, w, row, o_m, 0, o_w, m_w, 0, k_size, k_size, s_a, s_w, BM, 2 * HALF, BK, EVEN, TMA
        )
        gate, value = tl.split(tl.reshape(acc, (BM, HALF, 2)))
    out = gate * tl.sigmoid(gate) * value
    m = (o_row < n_rows)[:, None] & (o_h < F)[None, :]
    p_out += o_row.to(tl.int64)[:, None] * F + o_h[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_VARYING)
def writer_kernel(
    a, w, p_out, p_partial, p_valid, n_rows, k_size, s_a, s_w, n_tiles,
    image, text, image_rows, sample_rows,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, SUMS: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n_columns: tl.constexpr = (D + BN - 1) // BN
    pid = tl.program_id(0)
    row = (pid % n_tiles) * BM
    column = (pid // n_tiles % n_columns) * BN
    i_split = pid // n_tiles // n_columns
    o_row = row + tl.arange(0, BM)
    o_m = tl.minimum(o_row, n_rows - 1).to(tl.int64)
    o_n = column + tl.arange(0, BN)
    m_n = o_n < D
    part = tl.cdiv(tl.cdiv(k_size, BK), SPLIT) * BK
    first = i_split * part
    wait_for_inputs(None, 1, PDL)
    acc = _product(
        a, w, row, o_m, column, tl.where(m_n, o_n, 0).to(tl.int64), m_n, first,
        tl.minimum(first + part, k_size), k_size, s_a, s_w, BM, BN, BK, EVEN, TMA,
    )  # fmt: skip
    o_out = (i_split * n_rows + o_row).to(tl.int64)
    p_out += o_out[:, None] * D + o_n[None, :]
    m = (o_row < n_rows)[:, None] & m_n[None, :]
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=m)
    if SUMS:
        real = is_real(o_row, n_rows, p_valid, image, text, image_rows, sample_rows)
        acc = tl.where(real[:, None], acc, 0.0)
        sums = tl.sum(tl.reshape(acc, (BM // _CHUNK, _CHUNK, BN)), 1)
        o_c = row // _CHUNK + tl.arange(0, BM // _CHUNK)
        n_chunks = n_rows // _CHUNK
        p_partial += (i_split * n_chunks + o_c[:, None]) * D + o_n[None, :]
        tl.store(p_partial, sums, mask=(o_c < n_chunks)[:, None] & m_n[None, :])


def _operands(a: Tensor, w: Tensor, tile: Tile, columns: int) -> tuple[Any, Any, bool]:
    """A and W as the kernel takes them, and whether K needs no mask."""
    even = a.shape[1] % tile.depth == 0 and w.shape[0] % columns == 0
    if not tile.tma:
        return a, w, even
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(a, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w, [columns, tile.depth]),
        even,
    )


def qkv(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, out: Tensor, stream: Stream, heads: int,
    kv_heads: int, eps: float, tile: Tile, *, compile_only: bool = False,
) -> Any:  # fmt: skip
    """`out` [N, (H + 2G)·K] ← X·W_qkvᵀ with queries and keys rotated, then normalised.

    Args:
        x: [N, D].
        w: [(H + 2G)·K, D], rows of queries, then keys, then values.
        cos, sin: [rows of a sample, K/2] in fp32.
        tile: its columns are whole heads.
        compile_only: compile for these arguments and launch nothing.
    """
    half = w.shape[0] // (heads + 2 * kv_heads) // 2
    block_half = block(half)
    per_tile = max(1, tile.columns // (2 * block_half))
    columns = per_tile * 2 * block_half
    a, b, even = _operands(x, w, tile, columns)
    n_tiles = triton.cdiv(stream.rows, tile.rows)
    grid = (n_tiles * triton.cdiv(heads + 2 * kv_heads, per_tile),)
    launch = _launcher(qkv_kernel, grid, compile_only)
    return launch(
        a, b, out, cos, sin, stream.rows, x.shape[1], x.stride(0), w.stride(0), n_tiles,
        stream.sample_rows, eps,
        H=heads, G=kv_heads, HALF=half, BLOCK_HALF=block_half, HEADS=per_tile, BM=tile.rows,
        BK=tile.depth, EVEN=even and block_half == half, TMA=tile.tma, PDL=tile.pdl,
        **tile.options,
    )  # fmt: skip


def swiglu(
    x: Tensor, w: Tensor, out: Tensor, sums: Tensor | None, valid: Tensor | None, stream: Stream,
    tile: Tile, *, ahead: Tensor | None = None, compile_only: bool = False,
) -> Any:  # fmt: skip
    """`out` [N, F] ← silu(gate)⊙value of X·W₁₃ᵀ; `sums` [B, 2, D] ← column sums of X by segment.

    Args:
        x: [N, D].
        w: [2F, D], gates first.
        sums: None where the merge that follows leaks no mean.
        valid: [B] int32, real text tokens of each sample; None: all.
        tile: its columns are half gates, half values.
        ahead: weights that are needed next, for the L2 cache to fetch.
    """
    hidden, width = w.shape[0] // 2, x.shape[1]
    half = tile.columns // 2
    a, b, even = _operands(x, w, tile, half)
    n_tiles = triton.cdiv(stream.rows, tile.rows)
    n_products = n_tiles * triton.cdiv(hidden, half)
    grid = (n_products + (0 if sums is None else sum_tasks(stream, width)),)
    launch = _launcher(swiglu_kernel, grid, compile_only)
    return launch(
        a, b, out, sums, x, valid, ahead, stream.rows, width, x.stride(0), w.stride(0), n_tiles,
        n_products, lines(ahead), *stream.layout,
        F=hidden, D=width, HALF=half, BM=tile.rows, BK=tile.depth,
        EVEN=even and hidden % half == 0, SUMS=sums is not None, SLAB=SLAB, TMA=tile.tma,
        PDL=tile.pdl, **tile.options,
    )  # fmt: skip


def writer(
    a: Tensor, w: Tensor, out: Tensor, partial: Tensor | None, valid: Tensor | None,
    stream: Stream, tile: Tile, *, compile_only: bool = False,
) -> Any:  # fmt: skip
    """`out` [split, N, D] ← A·Wᵀ in `split` parts along K, that add up to the branch's output F;
    `partial` [split, C, D] ← the column sums of each part over the real rows of every chunk.

    Args:
        a: [N, E].
        w: [D, E].
        partial: None where the merge that follows takes no mean.
        valid: [B] int32, real text tokens of each sample; None: all.
        tile: its rows are whole chunks.
    """
    width = w.shape[0]
    b_a, b_w, even = _operands(a, w, tile, tile.columns)
    n_tiles = triton.cdiv(stream.rows, tile.rows)
    grid = (n_tiles * triton.cdiv(width, tile.columns) * tile.split,)
    launch = _launcher(writer_kernel, grid, compile_only)
    return launch(
        b_a, b_w, out, partial, valid, stream.rows, a.shape[1], a.stride(0), w.stride(0), n_tiles,
        *stream.layout,
        D=width, BM=tile.rows, BN=tile.columns, BK=tile.depth, SPLIT=tile.split, EVEN=even,
        SUMS=partial is not None, TMA=tile.tma, PDL=tile.pdl, **tile.options,
    )  # fmt: skip


def _launcher(kernel: Any, grid: tuple[int], compile_only: bool) -> Any:
    if not compile_only:
        return kernel[grid]
    return lambda *args, **options: kernel.warmup(*args, grid=grid, **options)


def writer_buffers(stream: Stream, width: int, split: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`out` and `partial` of a writer: parts of K are added in fp32."""
    dtype = like.dtype if split == 1 else torch.float32
    out = like.new_empty(split, stream.rows, width, dtype=dtype)
    return out, like.new_empty(split, stream.rows // CHUNK, width, dtype=torch.float32)
