"""The numbers that show a mean-mode collapse, each a pure function of tensors (paper §1, Table 2).

Shapes: B batch, T tokens, D width, E width of a writer's input, H heads, K head width, S groups.
J averages over the tokens of a group and P = I − J: μ(X) = JX, c(X) = PX (Eq. 3, App. E).

Every function takes `segments` (None: one segment, no padding) and `scope`: "global" makes one
group of all real tokens of a sample, "segment" one group of each segment. Padding belongs to no
group, even where it holds NaN. Half precision is computed in fp32, fp32 and fp64 in themselves. A
value that needs two tokens is NaN where a group has fewer; NaN and infinity of the input reach the
result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mvsplit.errors import UserError, nearest
from mvsplit.kernels import Segments

Scope = Literal["global", "segment"]

EPS = 1e-12  # the ε of Table 2: keeps a ratio finite where its denominator is exactly zero


@dataclass(frozen=True)
class TokenGroup:
    """Tokens of each sample that share one mean: a range, and which of it are real."""

    tokens: slice
    mask: Tensor | None  # [B, n] booleans, None where all n are real
    count: Tensor | int  # [B] real tokens of each sample

    def per_token(self, extra: int = 1) -> Tensor | None:
        """The mask with `extra` trailing axes, [B, n, 1, ...]."""
        return None if self.mask is None else self.mask.reshape(*self.mask.shape, *(1,) * extra)

    def divisor(self, axes: int) -> Tensor | int:
        """The count, at least 1, with `axes` trailing axes."""
        if isinstance(self.count, int):
            return max(self.count, 1)
        return self.count.clamp(min=1).reshape(-1, *(1,) * axes)


def token_groups(x: Tensor, segments: Segments | None, scope: Scope) -> list[TokenGroup]:
    """The groups that `scope` asks for among the tokens of `x` [B, T, ...].

    Raises:
        UserError: the scope is unknown, or the segments do not cover the tokens of `x`.
    """
    if scope not in ("global", "segment"):
        raise UserError(f"scope={scope!r} is unknown; {nearest(scope, ('global', 'segment'))}")
    segments = Segments.whole(x) if segments is None else segments
    segments.check(x)
    ranges = segments.slices if scope == "segment" else [slice(0, segments.total)]
    if segments.mask is None:
        return [TokenGroup(r, None, r.stop - r.start) for r in ranges]
    masks = [segments.mask[:, r] for r in ranges]
    return [TokenGroup(r, m, m.sum(1)) for r, m in zip(ranges, masks, strict=True)]


def upcast(x: Tensor) -> Tensor:
    """Half precision to fp32; fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _real(x: Tensor, group: TokenGroup) -> Tensor:
    """The group's tokens in computing precision, zero on padding. [B, T, D] → [B, n, D]."""
    x = upcast(x[:, group.tokens])
    mask = group.per_token()
    return x if mask is None else torch.where(mask, x, 0)


def _mean(x: Tensor, group: TokenGroup) -> Tensor:
    """x̄ of tokens that are already zero on padding. [B, n, D] → [B, 1, D]."""
    return x.sum(1, keepdim=True) / group.divisor(2)


def _center(x: Tensor, group: TokenGroup) -> Tensor:
    """PX of tokens that are already zero on padding, and zero there again. [B, n, D]."""
    x = x - _mean(x, group)
    mask = group.per_token()
    return x if mask is None else torch.where(mask, x, 0)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of the last two axes. [..., n, D] → [...]."""
    return torch.linalg.vector_norm(x, dim=(-2, -1))


def _needs_pairs(value: Tensor, group: TokenGroup) -> Tensor:
    """`value` [B, ...], NaN for samples whose group has fewer than two tokens."""
    if isinstance(group.count, int):
        return value if group.count >= 2 else torch.full_like(value, torch.nan)
    defined = (group.count >= 2).reshape(-1, *(1,) * (value.dim() - 1))
    return torch.where(defined, value, torch.nan)


def _pairs(group: TokenGroup) -> Tensor | int:
    """n(n−1), at least 1. [B] or a number."""
    n = group.count
    return max(n * (n - 1), 1) if isinstance(n, int) else (n * (n - 1)).clamp(min=1)


def batch_mean(values: Tensor, groups: list[TokenGroup], at_least: int = 1) -> Tensor:
    """The mean over the samples whose group has `at_least` tokens, NaN if there is none.
    [B, S] → [S]. A NaN of a sample that counts is kept."""
    means = []
    for column, group in zip(values.unbind(1), groups, strict=True):
        if isinstance(group.count, int):
            means.append(column.mean())  # one count for all samples: all defined, or all NaN
        else:
            counts = group.count >= at_least
            means.append(torch.where(counts, column, 0).sum() / counts.sum())
    return torch.stack(means)


# The trunk and its branches


def token_cosine_similarity(
    x: Tensor, segments: Segments | None = None, scope: Scope = "global"
) -> Tensor:
    """TCS, the mean cosine of all pairs of different tokens (Table 2); 1 is total collapse.

        TCS = (‖Σ_t u_t‖² − Σ_t ‖u_t‖²) / (T(T−1)),   u_t = x_t / ‖x_t‖

    A zero token has cosine 0 with every other. `x` [B, T, D] → [B, S].
    """
    values = []
    for group in token_groups(x, segments, scope):
        tokens = _real(x, group)
        length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        unit = tokens / length.clamp(min=torch.finfo(tokens.dtype).tiny)
        off_diagonal = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
        values.append(_needs_pairs(off_diagonal / _pairs(group), group))
    return torch.stack(values, dim=1)


def mean_ratio(
    x: Tensor, segments: Segments | None = None, scope: Scope = "global", eps: float = EPS
) -> Tensor:
    """ρ = ‖μ(X)‖ / (‖c(X)‖ + ε), norms over all tokens of a sample (Table 2).
    `x` [B, T, D] → [B, S]."""
    values = []
    for group in token_groups(x, segments, scope):
        tokens = _real(x, group)
        # JX repeats the mean: ‖JX‖² = T‖x̄‖² = ‖Σ_t x_t‖² / T
        mean_norm = (tokens.sum(1).square().sum(-1) / group.divisor(0)).sqrt()
        values.append(mean_norm / (_norm(_center(tokens, group)) + eps))
    return torch.stack(values, dim=1)


def trunk_ratio(
    update: Tensor,
    x: Tensor,
    segments: Segments | None = None,
    scope: Scope = "global",
    eps: float = EPS,
) -> Tensor:
    """r_TR = ‖U‖ / (‖X‖ + ε): how far a branch is open (Table 2). U, X [B, T, D] → [B, S]."""
    groups = token_groups(x, segments, scope)
    values = [_norm(_real(update, g)) / (_norm(_real(x, g)) + eps) for g in groups]
    return torch.stack(values, dim=1)


def variance_gain(
    update: Tensor,
    x: Tensor,
    segments: Segments | None = None,
    scope: Scope = "global",
    eps: float = EPS,
) -> Tensor:
    """VarGain = ‖c(U)‖ / (‖c(X)‖ + ε) (Table 2). U, X [B, T, D] → [B, S]."""
    groups = token_groups(x, segments, scope)
    values = [
        _norm(_center(_real(update, g), g)) / (_norm(_center(_real(x, g), g)) + eps) for g in groups
    ]
    return torch.stack(values, dim=1)


# Attention matrices A [B, H, T, T]; rows are queries


def _block(attention: Tensor, group: TokenGroup) -> Tensor:
    """The group's queries and keys, zero where either is padding. → [B, n, H, n]."""
    block = upcast(attention[:, :, group.tokens, group.tokens]).transpose(1, 2)
    if group.mask is None:
        return block
    real = group.mask[:, :, None, None] & group.mask[:, None, None, :]
    return torch.where(real, block, 0)


def _center_queries(block: Tensor, group: TokenGroup) -> Tensor:
    """PA: every column less its mean over the queries. [B, n, H, n]."""
    block = block - block.sum(1, keepdim=True) / group.divisor(3)
    mask = group.per_token(2)
    return block if mask is None else torch.where(mask, block, 0)


def centered_attention(attention: Tensor, group: TokenGroup) -> Tensor:
    """PAP of one group (Prop. 2). [B, H, T, T] → [B, H, n, n]."""
    centered = _center_queries(_block(attention, group), group)
    centered = _center_queries(centered.transpose(1, 3), group)  # the keys, the same way
    return centered.permute(0, 2, 3, 1)


def mu_eff_exact(
    attention: Tensor, segments: Segments | None = None, scope: Scope = "global"
) -> Tensor:
    """μ_eff(A) = ‖PAP‖₂ by SVD (Eq. 4); below 1, attention contracts what differs between tokens.

    With scope "segment" A is the block of a segment's queries and keys, and P its own.
    `attention` [B, H, T, T] → [B, H, S].
    """
    groups = token_groups(attention.transpose(1, 2), segments, scope)
    return torch.stack([_spectral_norm(centered_attention(attention, g)) for g in groups], dim=-1)


def _spectral_norm(matrix: Tensor) -> Tensor:
    """The largest singular value, 0 for a matrix without entries. [..., n, n] → [...]."""
    if matrix.shape[-1] == 0:
        return matrix.sum((-2, -1))
    return torch.linalg.matrix_norm(matrix, ord=2)


def mu_eff(
    attention: Tensor,
    segments: Segments | None = None,
    scope: Scope = "global",
    iterations: int = 20,
) -> Tensor:
    """μ_eff(A) = ‖PAP‖₂ by centered power iteration (Eq. 4, Table 2): never above the exact value,
    and close to it where the first two singular values are apart. [B, H, T, T] → [B, H, S]."""
    values = []
    for group in token_groups(attention.transpose(1, 2), segments, scope):
        centered = centered_attention(attention, group)
        tiny = torch.finfo(centered.dtype).tiny
        v = _start_vector(centered)
        for _ in range(iterations):
            v = centered.mT @ (centered @ v)
            v = v / torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True).clamp(min=tiny)
        values.append(_norm(centered @ v))
    return torch.stack(values, dim=-1)


def _start_vector(matrix: Tensor) -> Tensor:
    """A fixed vector [n, 1] without structure (multiples of the golden ratio, modulo 1): unlike a
    random one it touches no random state, so that watching a run does not change it."""
    index = torch.arange(1, matrix.shape[-1] + 1, device=matrix.device, dtype=torch.float64)
    return ((index * 0.6180339887498949) % 1 - 0.5).to(matrix.dtype).unsqueeze(-1)


def row_divergence(
    attention: Tensor,
    segments: Segments | None = None,
    scope: Scope = "global",
    eps: float = EPS,
) -> Tensor:
    """RowDiv = ‖A − JA‖ / (‖A‖ + ε): 0 where all queries attend alike (Table 2).
    [B, H, T, T] → [B, H, S]."""
    values = []
    for group in token_groups(attention.transpose(1, 2), segments, scope):
        block = _block(attention, group).transpose(1, 2)  # [B, H, n, n]
        centered = _center_queries(block.transpose(1, 2), group).transpose(1, 2)
        values.append(_norm(centered) / (_norm(block) + eps))
    return torch.stack(values, dim=-1)


def retention(
    attention: Tensor,
    x: Tensor,
    segments: Segments | None = None,
    scope: Scope = "global",
    eps: float = EPS,
) -> Tensor:
    """Ret(c←c) = ‖c(A c(X))‖ / (‖c(X)‖ + ε) (Table 2). [B, H, T, T], [B, T, D] → [B, H, S]."""
    values = []
    for group in token_groups(x, segments, scope):
        centered = _center(_real(x, group), group).unsqueeze(1)  # [B, 1, n, D]
        kept = centered_attention(attention, group) @ centered  # c(A c(X)) = (PAP) c(X)
        values.append(_norm(kept) / (_norm(centered) + eps))
    return torch.stack(values, dim=-1)


def leakage(
    attention: Tensor,
    x: Tensor,
    segments: Segments | None = None,
    scope: Scope = "global",
    eps: float = EPS,
) -> Tensor:
    """Leak(μ←c) = ‖μ(A c(X))‖ / (‖c(X)‖ + ε): what attention turns from differences into mean
    (Table 2). [B, H, T, T], [B, T, D] → [B, H, S]."""
    values = []
    for group in token_groups(x, segments, scope):
        centered = _center(_real(x, group), group).unsqueeze(1)  # [B, 1, n, D]
        mixed = _block(attention, group).transpose(1, 2) @ centered  # [B, H, n, D]
        mean_norm = (mixed.sum(2).square().sum(-1) / group.divisor(1)).sqrt()  # as in mean_ratio
        values.append(mean_norm / (_norm(centered) + eps))
    return torch.stack(values, dim=-1)


def logit_gradient(attention: Tensor, values: Tensor, grad_out: Tensor) -> Tensor:
    """The gradient of the attention logits, by the softmax Jacobian (Lemma 1):

        ∂L/∂S_ij = A_ij (g_i·v_j − Σ_k A_ik g_i·v_k)

    Zero once all values are equal: that is what starves Q and K. A [B, H, T, T], values and the
    adjoint of the attention output [B, H, T, K] → [B, H, T, T].
    """
    attention, values, grad_out = upcast(attention), upcast(values), upcast(grad_out)
    grad_attention = grad_out @ values.mT
    along = (attention * grad_attention).sum(-1, keepdim=True)
    return attention * (grad_attention - along)


# Writers: ∇W = Σ_t δ_t y_tᵀ, inputs y [B, T, E], output adjoints δ [B, T, D]


def mean_gradient_norm(
    y: Tensor, delta: Tensor, segments: Segments | None = None, scope: Scope = "global"
) -> Tensor:
    """G_mean = ‖ΔW_μ‖_F with ΔW_μ = Σ_b T δ̄_b ȳ_bᵀ (Eq. 5), without a D×E matrix:

        ‖ΔW_μ‖² = Σ_{b,b'} T_b T_b' ⟨δ̄_b, δ̄_b'⟩ ⟨ȳ_b, ȳ_b'⟩

    With scope "segment" the part of the gradient that each segment contributes.
    y [B, T, E], δ [B, T, D] → [S].
    """
    norms = []
    for group in token_groups(y, segments, scope):
        y_mean = _mean(_real(y, group), group).squeeze(1)  # [B, E]
        delta_sum = _real(delta, group).sum(1)  # [B, D], T_b δ̄_b
        squared = ((delta_sum @ delta_sum.mT) * (y_mean @ y_mean.mT)).sum()
        norms.append(squared.clamp(min=0).sqrt())  # rounding may leave it just below zero
    return torch.stack(norms)


def centered_gradient_norm(
    y: Tensor, delta: Tensor, segments: Segments | None = None, scope: Scope = "global"
) -> Tensor:
    """G_ctr = ‖ΔW_c‖_F with ΔW_c = Σ_t δ̃_t ỹ_tᵀ (Eq. 5), summed over the batch. It costs one
    product as large as the weight gradient's, and stays exact where G_mean is a thousand times
    larger. y [B, T, E], δ [B, T, D] → [S]."""
    norms = []
    for group in token_groups(y, segments, scope):
        y_centered = _center(_real(y, group), group).flatten(0, 1)
        delta_real = _real(delta, group).flatten(0, 1)  # Σ δ̃ỹᵀ = Σ δỹᵀ, as Σ ỹ = 0 in a sample
        norms.append(_norm(delta_real.mT @ y_centered))
    return torch.stack(norms)


def centered_norm_given_gradient(
    gradient: Tensor, y: Tensor, delta: Tensor, segments: Segments | None = None
) -> Tensor:
    """G_ctr = ‖∇W − ΔW_μ‖_F (Eq. 5, global scope), cheaper where the gradient exists already. Its
    error is that of the gradient: a bf16 gradient does not resolve G_ctr below ≈ G_mean/500.
    ∇W [D, E], y [B, T, E], δ [B, T, D] → scalar."""
    (group,) = token_groups(y, segments, "global")
    y_mean = _mean(_real(y, group), group).squeeze(1)
    delta_sum = _real(delta, group).sum(1)
    return _norm(torch.addmm(upcast(gradient), delta_sum.mT, y_mean, alpha=-1))


class Alignment(NamedTuple):
    """How far a sample's token gradients add up instead of cancelling (Eq. 6, C.2); each [B, S]."""

    amplification: Tensor  # A = ‖∇W‖²_F / Σ_t ‖δ_t‖²‖y_t‖²; 1 if tokens are orthogonal, at most T
    excess: Tensor  # A − 1, from the off-diagonal terms alone
    kappa: Tensor  # κ = E_{s≠t}[cos(y_s, y_t) cos(δ_s, δ_t)]
    kappa_abs: Tensor  # κ̂ = E_{s≠t}[|cos(y_s, y_t)| |cos(δ_s, δ_t)|]
    envelope: Tensor  # (T − 1) κ̂, the upper envelope of A − 1 at equal magnitudes


def alignment(
    y: Tensor, delta: Tensor, segments: Segments | None = None, scope: Scope = "global"
) -> Alignment:
    """The alignment law of a writer, per sample (Eq. 6, C.2), from two T×T Gram matrices:

        A − 1 = Σ_{s≠t} (δ_sᵀδ_t)(y_sᵀy_t) / Σ_t ‖δ_t‖²‖y_t‖²

    equal to (T − 1)κ where all magnitudes are equal. y [B, T, E], δ [B, T, D] → five of [B, S].
    """
    columns = [
        _group_alignment(_real(y, g), _real(delta, g), g) for g in token_groups(y, segments, scope)
    ]
    return Alignment(*(torch.stack(c, dim=1) for c in zip(*columns, strict=True)))


def _group_alignment(y: Tensor, delta: Tensor, group: TokenGroup) -> Alignment:
    """The alignment law of one group. y [B, n, E], δ [B, n, D], zero on padding → five of [B]."""
    tiny = torch.finfo(y.dtype).tiny
    # A and κ do not depend on the scale; the adjoints of a dead network would underflow.
    y, delta = _largest_one(y), _largest_one(delta)
    products = (delta @ delta.mT) * (y @ y.mT)  # [B, n, n]
    own = products.diagonal(dim1=1, dim2=2)  # ‖δ_t‖²‖y_t‖²
    own_sum = own.sum(1)
    off_diagonal = products - torch.diag_embed(own)
    excess = off_diagonal.sum((1, 2)) / own_sum.clamp(min=tiny)
    length = own.clamp(min=0).sqrt()  # ‖δ_t‖‖y_t‖
    lengths = (length.unsqueeze(2) * length.unsqueeze(1)).clamp(min=tiny)
    cosines = off_diagonal / lengths  # cos(y_s, y_t) cos(δ_s, δ_t)
    kappa = cosines.sum((1, 2)) / _pairs(group)
    kappa_abs = cosines.abs().sum((1, 2)) / _pairs(group)
    envelope = (group.count - 1) * kappa_abs
    values = (1 + excess, excess, kappa, kappa_abs, envelope)
    return Alignment(*(_needs_pairs(v, group) for v in values))


def _largest_one(x: Tensor) -> Tensor:
    """x over its largest absolute value in each sample; zero stays zero. [B, n, E] → [B, n, E]."""
    if not x.numel():
        return x
    return x / x.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


# Gradients of parameters


def gradient_rms(gradient: Tensor) -> Tensor:
    """G(Q), G(K): the root mean square of a parameter's gradient (Table 2). Any shape → scalar."""
    gradient = upcast(gradient)
    return torch.linalg.vector_norm(gradient) / max(gradient.numel(), 1) ** 0.5
