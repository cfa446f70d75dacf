"""Attention over the padded stream for the sampling engine, and column sums of the trunk beside it.

A few hundred tokens leave most of a GPU idle, so the blocks that the grid has room for add up the
columns of the trunk, which the merge after this branch needs. Padding is no key.

Shapes: B samples, T rows of a sample, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block
from mvsplit.kernels.fused.stream import (
    SLAB,
    Stream,
    column_sums,
    lines,
    sum_tasks,
    wait_for_inputs,
)

_VARYING = ["n_attended", "n_lines", "image", "text", "image_rows", "sample_rows"]


@dataclass(frozen=True)
class Blocks:
    """How attention is cut up: queries and keys of a block's step, warps, loads at once."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> Blocks:
        return replace(self, pdl=pdl)


@triton.jit(do_not_specialize=_VARYING)
def stream_attention_kernel(
    p_q, p_k, p_v, p_out, p_valid, p_x, p_sum, p_ahead, s_x,
    sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
    n_attended, n_lines, image, text, image_rows, sample_rows, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, SLAB: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, SUMS: tl.constexpr,
    MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(p_ahead, n_lines, PDL)
    pid = tl.program_id(0)
    if SUMS:  # noqa: SIM102 (`and` would need p_sum even where there is none)
        if pid >= n_attended:  # last, so that no query waits for them
            column_sums(
                pid - n_attended, p_x, p_sum, p_valid, s_x, image, text, image_rows, sample_rows,
                D, SLAB,
            )  # fmt: skip
            return
    n_q = tl.cdiv(sample_rows, BQ)
    i_h = pid // n_q % H
    i_b = (pid // n_q // H).to(tl.int64)
    o_q = (pid % n_q) * BQ + tl.arange(0, BQ)
    o_k = tl.arange(0, BLOCK_K)
    m_q = (o_q < sample_rows)[:, None] & (o_k < K)[None, :]
    q = tl.load(p_q + i_b * sq_b + i_h * sq_h + o_q[:, None] * sq_t + o_k[None, :], m_q, 0.0)
    p_k += i_b * sk_b + (i_h // GROUP) * sk_h + o_k[None, :]
    p_v += i_b * sv_b + (i_h // GROUP) * sv_h + o_k[None, :]
    count = text
    if p_valid is not None:
        count = tl.load(p_valid + i_b)
    largest = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, BLOCK_K], tl.float32)
    for t in range(0, sample_rows, BT):
        o_t = t + tl.arange(0, BT)
        m_t = (o_t < sample_rows)[:, None] & (o_k < K)[None, :]
        k = tl.load(p_k + o_t[:, None] * sk_t, m_t, 0.0)
        v = tl.load(p_v + o_t[:, None] * sv_t, m_t, 0.0)
        score = tl.dot(q, k.T, input_precision="ieee") * scale
        real = o_t < sample_rows
        if MASKED:
            real = (o_t < image) | ((o_t >= image_rows) & (o_t - image_rows < count))
        score = tl.where(real[None, :], score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))  # finite: the first block holds image tokens
        shrink = tl.exp2(largest - new)
        p = tl.exp2(score - new[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new
    row = i_b * sample_rows + o_q
    p_out += row[:, None] * (H * K) + i_h * K + o_k[None, :]
    tl.store(p_out, (acc / total[:, None]).to(p_out.dtype.element_ty), mask=m_q)


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, valid: Tensor | None, x: Tensor,
    sums: Tensor | None, stream: Stream, cut: Blocks, *, ahead: Tensor | None = None,
    compile_only: bool = False,
) -> Any:  # fmt: skip
    """`out` [N, H·K] ← softmax(q·kᵀ/√K)·v over the real tokens of each sample.

    Args:
        q: [B, H, T, K], the last axis dense; k, v: [B, G, T, K].
        valid: [B] int32, real text tokens of each sample; None: all.
        x: the trunk [N, D], and `sums` [B, 2, D] ← its column sums by segment; None: not needed.
        ahead: weights that are needed next, for the L2 cache to fetch.
    """
    batch, heads, _, width = q.shape
    n_attended = batch * heads * triton.cdiv(stream.sample_rows, cut.queries)
    grid = (n_attended + (0 if sums is None else sum_tasks(stream, x.shape[1])),)
    strides = [s for tensor in (q, k, v) for s in tensor.stride()[:3]]
    arguments = (
        q, k, v, out, valid, x, sums, ahead, x.stride(0), *strides, n_attended, lines(ahead),
        *stream.layout,
        math.log2(math.e) / math.sqrt(width),
    )  # fmt: skip
    options = {"launch_pdl": True} if cut.pdl else {}
    constants = {
        "H": heads, "GROUP": heads // k.shape[1], "K": width, "BLOCK_K": max(16, block(width)),
        "D": x.shape[1], "SLAB": SLAB, "BQ": cut.queries, "BT": cut.keys,
        "SUMS": sums is not None, "MASKED": stream.is_padded or valid is not None,
        "PDL": cut.pdl, "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip
    if compile_only:
        kernel = stream_attention_kernel
        return kernel.warmup(*arguments, grid=grid, **constants, **options)
    return stream_attention_kernel[grid](*arguments, **constants, **options)
