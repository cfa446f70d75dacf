"""The readable truth: every op of the model in plain PyTorch, with its backward in closed form.

This file is the specification that the fused kernels are measured against, and the path that CPU
users run. Half-precision inputs are computed in fp32; fp32 and fp64 inputs in their own precision.

Shapes: B batch, T tokens, D width, S segments, H query heads, G key/value heads, K head width,
F hidden width of the FFN. Notation: J averages over the tokens of a segment, P = I − J.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mvsplit.kernels.segments import Segments

Gain = Tensor | float
Places = tuple[int, int, int | None]  # of β, α and λ among the tensors they are; None for no λ


class Gains(NamedTuple):
    """β, α and λ of a merge, each [D], one element or a plain number; λ None is tied to α."""

    beta: Gain
    alpha: Gain
    leak: Gain | None = None


class FullGains(NamedTuple):
    """Gains as tensors in full precision. One tensor in two places ties them; λ None is zero."""

    beta: Tensor
    alpha: Tensor
    leak: Tensor | None

    def distinct(self) -> tuple[list[Tensor], Places]:
        """Each tensor once, and where among them β, α and λ are."""
        tensors = [self.beta]
        places = []
        for gain in (self.alpha, self.leak):
            same = [i for i, tensor in enumerate(tensors) if tensor is gain]
            places.append(same[0] if same else len(tensors))
            if gain is not None and not same:
                tensors.append(gain)
        return tensors, (0, places[0], None if self.leak is None else places[1])

    @classmethod
    def of(cls, tensors: Sequence[Tensor], places: Places) -> FullGains:
        """What `distinct` took apart."""
        beta, alpha, leak = places
        return cls(tensors[beta], tensors[alpha], None if leak is None else tensors[leak])

    def shaped(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Gradients [D] in the shapes of the gains they belong to."""
        return [
            None if grad is None or gain is None else grad.sum_to_size(gain.shape)
            for gain, grad in zip(self, grads, strict=True)
        ]


def full_gains(gains: Gains, like: Tensor) -> FullGains:
    """Gains as a merge of `like` uses them; gains that are the same stay one tensor."""
    beta = _as_tensor(gains.beta, like)
    alpha = beta if _same(gains.alpha, gains.beta) else _as_tensor(gains.alpha, like)
    if gains.leak is None:
        return FullGains(beta, alpha, alpha)
    if not isinstance(gains.leak, Tensor) and gains.leak == 0:
        return FullGains(beta, alpha, None)
    return FullGains(beta, alpha, _as_tensor(gains.leak, like))


def _same(a: Gain, b: Gain) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _as_tensor(gain: Gain, like: Tensor) -> Tensor:
    if isinstance(gain, Tensor):
        return _upcast(gain)
    half = like.dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if half else like.dtype
    return torch.full((), gain, dtype=dtype, device=like.device)


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


def zero_padding(x: Tensor, segments: Segments) -> Tensor:
    """`x` [B, T, D] with zeros on padding, also where the padding holds NaN or infinity."""
    if segments.mask is None:
        return x
    return torch.where(segments.mask.unsqueeze(-1), x, 0)


class Merged(NamedTuple):
    """A merge and what its backward needs beside its inputs; None for what was not computed."""

    y: Tensor  # [B, T, D]
    r: Tensor | None  # [B, T, 1], inverse RMS of Z
    mean_f: Tensor | None  # [B, S, D], F̄
    mean_x: Tensor | None  # [B, S, D], X̄


def merge_forward(
    x: Tensor,
    f: Tensor,
    beta: Tensor,
    alpha: Tensor,
    leak: Tensor | None,
    segments: Segments,
    eps: float,
    norm: bool = True,
) -> Merged:
    """Z = X + β⊙PF + α⊙JF − λ⊙JX and its norm. Inputs in full precision, zero on padding.

    β⊙PF + α⊙JF = β⊙F + (α − β)⊙JF, so the tokens are passed over once when the means are known.
    Where β and α are one tensor and nothing leaks (`leak` None), no mean is taken at all.
    """
    mean_f = mean_x = r = None
    z = torch.addcmul(x, f, beta)
    if alpha is not beta or leak is not None:
        members, averages = segments.matrices(x)
        mean_f = averages @ f
        shift = (alpha - beta) * mean_f
        if leak is not None:
            mean_x = averages @ x
            shift.addcmul_(leak, mean_x, value=-1)
        z.baddbmm_(members, shift)
    if norm:
        r = inverse_rms(z, eps)
        z *= r
    return Merged(z, r, mean_f, mean_x)


class MergeGrads(NamedTuple):
    """Gradients of a merge; those of gains are [D], None for what was not asked or has none."""

    x: Tensor
    f: Tensor
    beta: Tensor | None
    alpha: Tensor | None
    leak: Tensor | None


def merge_backward(
    grad: Tensor,
    out: Merged,
    f: Tensor | None,
    beta: Tensor,
    alpha: Tensor,
    leak: Tensor | None,
    segments: Segments,
) -> MergeGrads:
    """Eq. 49–54 with λ in place of the α that multiplies the trunk mean.

    `grad` [B, T, D] is zero on padding; `f` is None where no gain asks for its gradient. Where β
    and α are one tensor, its whole gradient is returned as β's.
    """
    delta = grad if out.r is None else rms_norm_backward(grad, out.y, out.r)  # Eq. 50
    grad_x, grad_f = delta, beta * delta
    grad_beta = grad_alpha = grad_leak = None
    if f is not None:
        grad_beta = (delta * f).sum((0, 1))
    if out.mean_f is not None:
        members, averages = segments.matrices(delta)
        delta_mean = averages @ delta  # Eq. 51
        if leak is not None:
            grad_x = torch.baddbmm(delta, members, leak * delta_mean, alpha=-1)  # Eq. 52
        grad_f.baddbmm_(members, (alpha - beta) * delta_mean)  # Eq. 53
        if grad_beta is not None:
            delta_sum = members.mT @ delta
            grad_alpha = (delta_sum * out.mean_f).sum((0, 1))  # Eq. 54
            grad_beta -= grad_alpha
            if out.mean_x is not None:
                grad_leak = -(delta_sum * out.mean_x).sum((0, 1))
    return MergeGrads(grad_x, grad_f, grad_beta, grad_alpha, grad_leak)


class _SplitMerge(torch.autograd.Function):
    """Kept for backward: the output Y, F where a gain learns, r [B, T, 1] and means [B, S, D].

    `gains` holds each tensor once, `places` which of them β, α and λ are: torch.compile traces no
    Function that is given one tensor twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        segments: Segments,
        eps: float,
        norm: bool,
        places: Places,
        *gains: Tensor,
    ) -> Tensor:
        x_real, f_real = zero_padding(_upcast(x), segments), zero_padding(_upcast(f), segments)
        out = merge_forward(x_real, f_real, *FullGains.of(gains, places), segments, eps, norm)
        y = out.y.to(x.dtype)
        learns = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(y, f if learns else None, *out[1:], *gains)
        ctx.segments, ctx.places = segments, places
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, f, r, mean_f, mean_x, *tensors = ctx.saved_tensors
        gains = FullGains.of(tensors, ctx.places)
        out = Merged(_upcast(y), r, mean_f, mean_x)
        f = None if f is None else zero_padding(_upcast(f), ctx.segments)
        delta = zero_padding(_upcast(grad), ctx.segments)
        with _full_precision(grad):
            grads = merge_backward(delta, out, f, *gains, ctx.segments)
        of_gains: list[Tensor | None] = [None for _ in tensors]
        for place, found in zip(ctx.places, gains.shaped(grads[2:]), strict=True):
            if place is not None and found is not None:
                so_far = of_gains[place]
                of_gains[place] = found if so_far is None else so_far + found
        return grads.x.to(grad.dtype), grads.f.to(grad.dtype), *(None,) * 4, *of_gains


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
        UserError: the segments do not cover the tokens of `x`, or `f` has another shape.
    """
    segments = Segments.whole(x) if segments is None else segments
    segments.check(x, f)
    gains = full_gains(Gains(beta, alpha, leak), x)
    if gains.alpha is not gains.beta or gains.leak is not None:
        # torch.compile lets a tensor made inside an autograd Function not outlive it in a cache.
        segments.matrices(_upcast(x[:, :0]))
    with _full_precision(x):
        tensors, places = gains.distinct()
        return _SplitMerge.apply(x, f, segments, eps, norm, places, *tensors)


def _full_precision(like: Tensor) -> AbstractContextManager[object]:
    """No autocast: means are products here, and those of low precision do not cancel in segments of
    one token. A compiled backward is traced without the autocast that it may run in later."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):  # as on the meta device
        return nullcontext()
    if torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return nullcontext()


# Rotary embedding and QK-norm


@lru_cache(maxsize=4)
def rotation_factors(cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The tables [T, K/2] laid out as the heads they multiply: (cos, cos) and (sin, −sin), each
    [T, heads, K]. All layers of a pass share them, so they are kept for the tables last seen."""
    cos_full = torch.cat((cos, cos), dim=-1).unsqueeze(1).expand(-1, heads, -1)
    sin_full = torch.cat((sin, -sin), dim=-1).unsqueeze(1).expand(-1, heads, -1)
    return cos_full.contiguous(), sin_full.contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotates the halves of the last axis against each other (paper's released code):
    (x₁, x₂) → (x₁cos + x₂sin, x₂cos − x₁sin). x [B, T, H, K], tables [T, K/2]."""
    factors = rotation_factors.__wrapped__ if torch.compiler.is_compiling() else rotation_factors
    cos_full, sin_full = factors(cos, sin, x.shape[-2])
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos_full, swapped, sin_full, value=-1 if inverse else 1)


class QKNormed(NamedTuple):
    """Rotated and normalised queries and keys, and the untouched values, in token-major memory."""

    y: Tensor  # [B, T, H + G, K]
    r: Tensor  # [B, T, H + G, 1]
    v: Tensor  # [B, T, G, K]


def qk_norm_rope_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
) -> QKNormed:
    split = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))  # [B, T, H + 2G, K]
    qk, v = split.split((heads + kv_heads, kv_heads), dim=2)
    rotated = rotate(qk, cos, sin)
    r = inverse_rms(rotated, eps)
    return QKNormed(rotated.mul_(r), r, v)


def qk_norm_rope_backward(
    grad_qk: Tensor, grad_v: Tensor, y: Tensor, r: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Gradient of the packed projection [B, T, (H + 2G)·K]; a rotation's transpose is its inverse.
    `grad_qk` [B, T, H + G, K], `grad_v` [B, T, G, K]."""
    delta = rotate(rms_norm_backward(grad_qk, y, r), cos, sin, inverse=True)
    return torch.cat((delta, grad_v), dim=2).flatten(-2)


class _QKNormRoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = qk_norm_rope_forward(_upcast(qkv), cos, sin, heads, kv_heads, eps)
        y = out.y.to(qkv.dtype)
        ctx.save_for_backward(y, out.r, cos, sin)
        q, k = y.transpose(1, 2).split((heads, kv_heads), dim=1)
        return q, k, out.v.to(qkv.dtype).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        y, r, cos, sin = ctx.saved_tensors
        grad_qk = torch.cat((grad_q, grad_k), dim=1).transpose(1, 2)
        grad = qk_norm_rope_backward(
            _upcast(grad_qk), _upcast(grad_v.transpose(1, 2)), _upcast(y), r, cos, sin
        )
        return grad.to(grad_q.dtype), None, None, None, None, None


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


def swiglu_forward(packed: Tensor) -> Tensor:
    gate, value = packed.chunk(2, dim=-1)
    return functional.silu(gate).mul_(value)


def swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    """∂/∂value = g⊙silu(gate), ∂/∂gate = g⊙value⊙silu'(gate), packed as the input. [..., 2F]"""
    gate, value = packed.chunk(2, dim=-1)
    out = torch.empty_like(packed)
    grad_gate, grad_value = out.chunk(2, dim=-1)
    torch.mul(grad, functional.silu(gate), out=grad_value)
    torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return swiglu_forward(_upcast(packed)).to(packed.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        return swiglu_backward(_upcast(grad), _upcast(packed)).to(packed.dtype)


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) ⊙ value on the packed projection, gate first. [..., 2F] → [..., F]."""
    return _SwiGLU.apply(packed)
