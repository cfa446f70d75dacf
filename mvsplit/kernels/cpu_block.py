"""A whole post-norm block as one autograd node, for narrow networks on a CPU.

At the width of the demo an operator costs more than its arithmetic, and autograd, module calls and
small Python functions cost as much again. This node runs the closed forms of `reference.py` one
after the other, forward and backward, with nothing between them. It computes what the block's parts
compute one by one; `mvsplit.models.Block` says when it is used.

Shapes: B batch, T tokens, D width, H heads, K head width, F hidden width of the FFN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mvsplit.kernels.block_parts import BlockSettings, BlockWeights
from mvsplit.kernels.reference import (
    FullGains,
    Gains,
    Merged,
    full_gains,
    merge_backward,
    merge_forward,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    swiglu_backward,
    swiglu_forward,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _weight_grad(grad: Tensor, x: Tensor, learns: bool) -> Tensor | None:
    """∇W = Σ_t δ_t y_tᵀ of a token-wise matrix (Eq. 5); None where it is frozen. [B, T, D],
    [B, T, E] → [D, E]."""
    return grad.flatten(0, 1).mT @ x.flatten(0, 1) if learns else None


def _input_grad(grad: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The trunk's own gradient plus that through a matrix. → [B, T, D]"""
    return torch.addmm(residual.flatten(0, 1), grad.flatten(0, 1), weight).view_as(residual)


def _without_autocast(function: _Function) -> _Function:
    return cast(_Function, torch.autocast("cpu", enabled=False)(function))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: BlockSettings, *tensors: Any) -> Tensor:
        weights = BlockWeights(*tensors[:4])
        gains_a, gains_f = FullGains(*tensors[4:7]), FullGains(*tensors[7:])
        cos, sin, segments, heads, qk_eps, eps, *_ = settings

        n = qk_norm_rope_forward(linear(x, weights.qkv), cos, sin, heads, heads, qk_eps)
        q, k = n.y.transpose(1, 2).chunk(2, dim=1)
        mixed, logsumexp = _attention(q, k, n.v.transpose(1, 2))
        f_a = linear(mixed.transpose(1, 2).flatten(-2), weights.proj)
        a = merge_forward(x, f_a, *gains_a, segments, eps[0])

        packed = linear(a.y, weights.w13)
        hidden = swiglu_forward(packed)
        f_f = linear(hidden, weights.w2)
        f = merge_forward(a.y, f_f, *gains_f, segments, eps[1])

        inner = (x, n.y, n.r, n.v, mixed, logsumexp, f_a, packed, hidden, f_f)
        ctx.save_for_backward(*tensors, *a, *f, *inner)
        ctx.settings = settings
        return f.y

    @staticmethod
    @once_differentiable
    @_without_autocast  # which may be on where backward is called
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights = BlockWeights(*saved[:4])
        gains_a, gains_f = FullGains(*saved[4:7]), FullGains(*saved[7:10])
        a, f = Merged(*saved[10:14]), Merged(*saved[14:18])
        x, qk, qk_r, v, mixed, logsumexp, f_a, packed, hidden, f_f = saved[18:]
        cos, sin, segments, *_ = ctx.settings
        qkv_learns, proj_learns, w13_learns, w2_learns = ctx.needs_input_grad[2:6]
        learns_a, learns_f = any(ctx.needs_input_grad[6:9]), any(ctx.needs_input_grad[9:12])

        of_f = merge_backward(grad, f, f_f if learns_f else None, *gains_f, segments)
        grad_w2 = _weight_grad(of_f.f, hidden, w2_learns)
        grad_packed = swiglu_backward(of_f.f @ weights.w2, packed)
        grad_w13 = _weight_grad(grad_packed, a.y, w13_learns)
        grad_y = _input_grad(grad_packed, weights.w13, of_f.x)

        of_a = merge_backward(grad_y, a, f_a if learns_a else None, *gains_a, segments)
        mixed_tokens = mixed.transpose(1, 2).flatten(-2)
        grad_proj = _weight_grad(of_a.f, mixed_tokens, proj_learns)
        grad_mixed = (of_a.f @ weights.proj).view_as(v).transpose(1, 2)
        q, k = qk.transpose(1, 2).chunk(2, dim=1)
        grad_q, grad_k, grad_v = _attention_backward(
            grad_mixed, q, k, v.transpose(1, 2), mixed, logsumexp, 0.0, False
        )
        grad_qk = torch.cat((grad_q, grad_k), dim=1).transpose(1, 2)
        grad_qkv = qk_norm_rope_backward(grad_qk, grad_v.transpose(1, 2), qk, qk_r, cos, sin)
        grad_x = _input_grad(grad_qkv, weights.qkv, of_a.x)
        return (
            grad_x,
            None,
            _weight_grad(grad_qkv, x, qkv_learns),
            grad_proj,
            grad_w13,
            grad_w2,
            *gains_a.shaped(of_a[2:]),
            *gains_f.shaped(of_f[2:]),
        )


def block(
    x: Tensor,
    weights: BlockWeights,
    attention_gains: Gains,
    ffn_gains: Gains,
    settings: BlockSettings,
) -> Tensor:
    """x ← merge(x, attention(x)), then x ← merge(x, FFN(x)). fp32 or fp64, no padding.

    Args:
        x: trunk [B, T, D].
        weights, settings: see there.
        attention_gains, ffn_gains: β, α, λ of the two merges.

    Returns:
        The next trunk [B, T, D].
    """
    gains = (*full_gains(attention_gains, x), *full_gains(ffn_gains, x))
    return _Block.apply(x, settings, *weights, *gains)
