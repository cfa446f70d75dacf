"""SwiGLU on the packed projection: silu(gate) ⊙ value, gate first, one pass each way.

Backward can write the output once more while it has its factors in registers, so that a network
need not keep it for the gradient of the next matrix.

Shapes: N rows (all leading axes), F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import block, differentiate, register, unit_stride


@triton.jit(do_not_specialize=["n"])
def swiglu_fwd_kernel(
    p_packed, p_out, n, stride, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, o_f, m = _tile(n, F, ROWS, COLUMNS)
    p_packed += row * stride + o_f
    gate = tl.load(p_packed, m, 0.0).to(tl.float32)
    value = tl.load(p_packed + F, m, 0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value
    tl.store(p_out + row * F + o_f, out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n"])
def swiglu_bwd_kernel(
    p_grad, p_packed, p_dpacked, p_out, n, s_grad, s_packed,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, o_f, m = _tile(n, F, ROWS, COLUMNS)
    p_packed += row * s_packed + o_f
    p_dpacked += row * 2 * F + o_f
    grad = tl.load(p_grad + row * s_grad + o_f, m, 0.0).to(tl.float32)
    gate = tl.load(p_packed, m, 0.0).to(tl.float32)
    value = tl.load(p_packed + F, m, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = grad * value * (sigmoid + silu * (1 - sigmoid))
    tl.store(p_dpacked, dgate.to(p_dpacked.dtype.element_ty), mask=m)
    tl.store(p_dpacked + F, (grad * silu).to(p_dpacked.dtype.element_ty), mask=m)
    if p_out is not None:
        tl.store(p_out + row * F + o_f, (silu * value).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _tile(n, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS, 1], columns [1, COLUMNS] and mask of this block."""
    n_columns = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // n_columns) * ROWS + tl.arange(0, ROWS)[:, None]
    o_f = (tl.program_id(0) % n_columns) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row.to(tl.int64), o_f, (row < n) & (o_f < F)


def _geometry(n: int, hidden: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile: 4096 values, at most 1024 columns of them."""
    columns = block(hidden, 1024)
    rows = max(1, 4096 // columns)
    grid = (triton.cdiv(n, rows) * triton.cdiv(hidden, columns),)
    return grid, {"F": hidden, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}


def _rows(x: Tensor) -> Tensor:
    """[..., K] → [N, K] with a dense last axis; a view where strides allow."""
    return unit_stride(x.flatten(0, -2) if x.dim() > 1 else x[None])


def _launch_forward(packed: Tensor) -> Tensor:
    out = _fake_forward(packed)
    if out.numel():
        rows = _rows(packed)
        grid, meta = _geometry(rows.shape[0], out.shape[-1])
        swiglu_fwd_kernel[grid](rows, out, rows.shape[0], rows.stride(0), **meta)
    return out


def _fake_forward(packed: Tensor) -> Tensor:
    shape = (*packed.shape[:-1], packed.shape[-1] // 2)
    return torch.empty(shape, dtype=packed.dtype, device=packed.device)


def _launch_backward(grad: Tensor, packed: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    dpacked, out = _fake_backward(grad, packed, again)
    if dpacked.numel():
        grads, rows = _rows(grad), _rows(packed)
        grid, meta = _geometry(rows.shape[0], grad.shape[-1])
        swiglu_bwd_kernel[grid](
            grads, rows, dpacked, out if again else None, rows.shape[0], grads.stride(0),
            rows.stride(0), **meta,
        )  # fmt: skip
    return dpacked, out


def _fake_backward(grad: Tensor, packed: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    dpacked = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    shape = grad.shape if again else (0,)
    return dpacked, torch.empty(shape, dtype=packed.dtype, device=packed.device)


_forward_op = register("swiglu(Tensor packed) -> Tensor", _launch_forward, _fake_forward)
_backward_op = register(
    "swiglu_backward(Tensor grad, Tensor packed, bool again) -> (Tensor dpacked, Tensor out)",
    _launch_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _backward_op(grad, *ctx.saved_tensors, False)[0]


differentiate(_forward_op, _backward, _setup_context)


def swiglu(packed: Tensor) -> Tensor:
    """`mvsplit.kernels.reference.swiglu` in one pass. [..., 2F] → [..., F]."""
    return _forward_op(packed)


def swiglu_backward(grad: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the packed projection [..., 2F] and, again, the output [..., F]."""
    return _backward_op(grad, packed, True)
