"""The readable truth: every op of the model in plain PyTorch, with its backward in closed form.

This file is the specification that the fused kernels are measured against, and the path that CPU
users run. Half-precision inputs are computed in fp32; fp32 and fp64 inputs in their own precision.

Shapes: B batch, T tokens, D width, S segments, H query heads, G key/value heads, K head width,
F hidden width of the FFN. Notation: J averages over the tokens of a segment, P = I − J.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mvsplit.kernels.segments import Segments

Gain = Tensor | float


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# RMSNorm


def inverse_rms(z: Tensor, eps: float) -> Tensor:
    """r_i = (‖Z_i‖²/D + ε)^{-1/2} (paper Eq. 49). [..., D] → [..., 1]."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return norm.square_().div_(z.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(grad_y: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Δ_i = r_i G_i − Z_i (r_i³/D)⟨G_i, Z_i⟩ (paper Eq. 50) in terms of the output Y_i = r_i Z_i:
    Δ_i = r_i (G_i − Y_i ⟨G_i, Y_i⟩/D). `grad_y`, `y` [..., D], `r` [..., 1]."""
    along = (grad_y * y).sum(-1, keepdim=True).div_(-y.shape[-1])
    return torch.addcmul(grad_y, y, along).mul_(r)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        z = _upcast(x)
        r = inverse_rms(z, eps)
        y = (z * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        return rms_norm_backward(_upcast(grad), _upcast(y), r).to(grad.dtype), None


def rms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm without an affine weight: Y_i = X_i / sqrt(‖X_i‖²/D + ε). [..., D] → [..., D]."""
    return _RMSNorm.apply(x, eps)


# The merge: split into mean and centered part, weigh, leak, normalise


def segment_sums(x: Tensor, segments: Segments) -> Tensor:
    """Sums over the tokens of each segment; padding must already be zero. [B, T, D] → [B, S, D]."""
    return torch.stack([x[:, tokens].sum(1) for tokens in segments.slices], dim=1)


def divide_by_counts_(sums: Tensor, segments: Segments) -> Tensor:
    """In place, sums [B, S, D] over the real tokens of each segment; an empty segment stays 0."""
    if segments.valid is not None:
        return sums.div_(segments.valid.clamp(min=1).unsqueeze(-1))
    for s, length in enumerate(segments.lengths):
        sums[:, s] /= max(length, 1)
    return sums


def segment_means(x: Tensor, segments: Segments) -> Tensor:
    """JX without its copies: means over the real tokens of each segment, zero where there are
    none; padding must already be zero. [B, T, D] → [B, S, D]."""
    return divide_by_counts_(segment_sums(x, segments), segments)


def add_to_segments_(x: Tensor, per_segment: Tensor, segments: Segments) -> Tensor:
    """In place, x[i] += per_segment[s] on every token i of segment s. [B, T, D], [B, S, D]."""
    for s, tokens in enumerate(segments.slices):
        x[:, tokens] += per_segment[:, s : s + 1]
    return x


def zero_padding(x: Tensor, segments: Segments) -> Tensor:
    """`x` with zeros on padding, also where the padding holds NaN or infinity."""
    if segments.mask is None:
        return x
    return torch.where(segments.mask.unsqueeze(-1), x, 0)


class _SplitMerge(torch.autograd.Function):
    """Kept for backward: the output Y, F where a gain learns, r [B, T, 1] and means [B, S, D].

    `leak` is None for λ = 0. Passing one tensor for two gains ties them: autograd adds their
    gradients. Where β and α are one tensor and nothing leaks, no mean is taken at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        beta: Tensor,
        alpha: Tensor,
        leak: Tensor | None,
        segments: Segments,
        eps: float,
        norm: bool,
    ) -> Tensor:
        mean_f = mean_x = r = None
        x_real, f_real = zero_padding(_upcast(x), segments), zero_padding(_upcast(f), segments)
        # β⊙PF + α⊙JF = β⊙F + (α − β)⊙JF: one pass over the tokens once the means are known.
        z = torch.addcmul(x_real, f_real, beta)
        if alpha is not beta or leak is not None:
            mean_f = segment_means(f_real, segments)
            shift = (alpha - beta) * mean_f
            if leak is not None:
                mean_x = segment_means(x_real, segments)
                shift -= leak * mean_x
            z = zero_padding(add_to_segments_(z, shift, segments), segments)
        if norm:
            r = inverse_rms(z, eps)
            z *= r
        y = z.to(x.dtype)
        learns = any(ctx.needs_input_grad[2:5])
        ctx.save_for_backward(y, f if learns else None, r, mean_f, mean_x, beta, alpha, leak)
        ctx.segments = segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, f, r, mean_f, mean_x, beta, alpha, leak = ctx.saved_tensors
        segments: Segments = ctx.segments
        grad_beta = grad_alpha = grad_leak = None
        delta = zero_padding(_upcast(grad), segments)
        if r is not None:
            delta = rms_norm_backward(delta, _upcast(y), r)  # Eq. 50
        grad_x, grad_f = delta, beta * delta
        if mean_f is not None:
            delta_sum = segment_sums(delta, segments)
            delta_mean = divide_by_counts_(delta_sum.clone(), segments)  # Eq. 51
            if leak is not None:  # Eq. 52
                grad_x = add_to_segments_(delta.clone(), -leak * delta_mean, segments)
                grad_x = zero_padding(grad_x, segments)
                grad_leak = -(delta_sum * mean_x).sum((0, 1))
            add_to_segments_(grad_f, (alpha - beta) * delta_mean, segments)  # Eq. 53
            grad_f = zero_padding(grad_f, segments)
            grad_alpha = (delta_sum * mean_f).sum((0, 1))  # Eq. 54
        if ctx.needs_input_grad[2]:
            grad_beta = (delta * zero_padding(_upcast(f), segments)).sum((0, 1))
            if grad_alpha is not None:
                grad_beta -= grad_alpha
        gains = [
            None if gain_grad is None else gain_grad.sum_to_size(gain.shape).to(gain.dtype)
            for gain, gain_grad in (
                (beta, grad_beta),
                (alpha, grad_alpha),
                (leak, grad_leak),
            )
        ]
        return grad_x.to(grad.dtype), grad_f.to(grad.dtype), *gains, None, None, None


def split_merge(
    x: Tensor,
    f: Tensor,
    beta: Gain,
    alpha: Gain,
    leak: Gain | None = None,
    segments: Segments | None = None,
    eps: float = 1e-5,
    norm: bool = True,
) -> Tensor:
    """The one merge of every post-norm rule (paper Eq. 7–8, generalised to a free leak λ):

        Z = X + β⊙PF + α⊙JF − λ⊙JX,   Y_i = Z_i / sqrt(‖Z_i‖²/D + ε)

    `leak=None` ties λ to α, which is MV-Split; `leak=0` with β = α = 1 is the plain residual. The
    backward is Eq. 49–54 with λ in place of the α that multiplies the trunk mean:

        ∂L/∂X_i = Δ_i − λ⊙Δ̄          ∂L/∂F_i = β⊙Δ_i + (α − β)⊙Δ̄
        ∂L/∂α = Σ_i Δ_i⊙F̄            ∂L/∂λ = −Σ_i Δ_i⊙X̄          ∂L/∂β = Σ_i Δ_i⊙(F_i − F̄)

    with Δ = ∂L/∂Z and bars the means over the token's segment.

    Args:
        x: trunk [B, T, D].
        f: branch output [B, T, D], of the dtype of `x`.
        beta, alpha, leak: gains [D], one-element tensors, or plain numbers.
        segments: where the means are taken; one segment over all tokens if None.
        eps: ε of the norm.
        norm: False returns Z itself.

    Returns:
        The next trunk [B, T, D] in the dtype of `x`; zero on padding.

    Raises:
        UserError: the segments do not cover the tokens of `x`.
    """
    segments = Segments.whole(x) if segments is None else segments
    segments.check(x)
    same = alpha is beta or (not isinstance(alpha, Tensor) and alpha == beta)
    beta = _as_tensor(beta, x)
    alpha = beta if same else _as_tensor(alpha, x)
    if leak is None:
        leak = alpha
    elif not isinstance(leak, Tensor):
        leak = _as_tensor(leak, x) if leak else None
    return _SplitMerge.apply(x, f, beta, alpha, leak, segments, eps, norm)


def _as_tensor(gain: Gain, like: Tensor) -> Tensor:
    if isinstance(gain, Tensor):
        return _upcast(gain)
    return torch.full((), gain, dtype=_upcast(like[:0]).dtype, device=like.device)


# Rotary embedding and QK-norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the last axis against each other (paper's released code):
    (x₁, x₂) → (x₁cos + x₂sin, x₂cos − x₁sin). [..., T, H, K] with tables [T, 1, K/2]."""
    x1, x2 = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    o1, o2 = out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=o1).addcmul_(x2, sin)
    torch.mul(x2, cos, out=o2).addcmul_(x1, sin, value=-1)
    return out


class _QKNormRoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        split = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))  # [B, T, H + 2G, K]
        qk, v = split[:, :, : heads + kv_heads], split[:, :, heads + kv_heads :]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        rotated = rotate(_upcast(qk), cos, sin)
        r = inverse_rms(rotated, eps)
        y = rotated.mul_(r).to(qkv.dtype)
        ctx.save_for_backward(y, r, cos, sin)
        ctx.heads = heads
        y = y.transpose(1, 2)
        return y[:, :heads], y[:, heads:], v.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        y, r, cos, sin = ctx.saved_tensors
        grad_y = torch.cat((grad_q, grad_k), dim=1).transpose(1, 2)
        delta = rms_norm_backward(_upcast(grad_y), _upcast(y), r)
        delta = rotate(delta, cos, -sin)  # the inverse of a rotation is its transpose
        grad = torch.cat((delta.to(grad_v.dtype), grad_v.transpose(1, 2)), dim=2)
        return grad.flatten(-2), None, None, None, None, None


def qk_norm_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the packed projection, rotates queries and keys, then RMS-normalises each head.

    Args:
        qkv: [B, T, (H + 2G)·K], rows of queries, then keys, then values.
        cos, sin: [T, K/2] fp32 tables; cos = 1, sin = 0 leaves a token unrotated.
        heads, kv_heads: H and G.
        eps: ε of the norm, which has no affine weight (paper §3 of the backbone: 1e-6).

    Returns:
        Queries [B, H, T, K], keys and values [B, G, T, K] as views of token-major memory.
    """
    return _QKNormRoPE.apply(qkv, cos, sin, heads, kv_heads, eps)


# SwiGLU


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        gate, value = _upcast(packed).chunk(2, dim=-1)
        ctx.save_for_backward(packed)
        return functional.silu(gate).mul_(value).to(packed.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        gate, value = _upcast(packed).chunk(2, dim=-1)
        grad = _upcast(grad)
        out = torch.empty_like(packed, dtype=grad.dtype)
        grad_gate, grad_value = out.chunk(2, dim=-1)
        torch.mul(grad, functional.silu(gate), out=grad_value)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * value, gate))
        return out.to(packed.dtype)


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) ⊙ value on the packed projection, gate first. [..., 2F] → [..., F]."""
    return _SwiGLU.apply(packed)
