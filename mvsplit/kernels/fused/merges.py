"""The merge of any post-norm rule without autograd, for code that writes its own backward.

`split_merge`, or `scaled_merge` for gains that need no mean (β = α, λ = 0), behind one pair of
functions.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mvsplit.kernels.dispatch import needs_no_mean
from mvsplit.kernels.fused import scaled_merge, split_merge
from mvsplit.kernels.reference import Gain, Gains
from mvsplit.kernels.segments import Segments


class Merge(NamedTuple):
    """How a merge is made.

    Attributes:
        gains: β, α, λ.
        segments: of the tokens.
        eps: ε of the norm.
    """

    gains: Gains
    segments: Segments
    eps: float

    @property
    def learns(self) -> bool:
        """Whether a gain wants a gradient, which needs the branch's output."""
        return any(isinstance(g, Tensor) and g.requires_grad for g in self.gains)

    @property
    def scaled(self) -> bool:
        """Whether it is X + γ⊙F."""
        return needs_no_mean(*self.gains)


class Statistics(NamedTuple):
    """What a merge leaves for its backward beside its output: 1/RMS [B, T] and, of a merge with
    means, those of F and X [B, S, D]."""

    r: Tensor
    mean_f: Tensor | None = None
    mean_x: Tensor | None = None


class MergeGradients(NamedTuple):
    """∂L/∂X and ∂L/∂F [B, T, D] (one tensor where they are equal), and those of β, α, λ in the
    shapes of the gains, None for numbers."""

    x: Tensor
    f: Tensor
    beta: Tensor | None
    alpha: Tensor | None
    leak: Tensor | None


def merge_forward(x: Tensor, f: Tensor, merge: Merge) -> tuple[Tensor, Statistics]:
    """X' = RMSNorm(X + β⊙PF + α⊙JF − λ⊙JX) [B, T, D] and what its backward needs."""
    valid, lengths = _layout(merge.segments)
    if merge.scaled:
        gain, value = _one(merge.gains.beta)
        y, r = scaled_merge._forward_op(x, f, gain, value, valid, lengths, merge.eps, True)
        return y, Statistics(r)
    tensors, values = _three(merge.gains)
    tied = merge.gains.leak is None
    y, *rest = split_merge._forward_op(
        x, f, *tensors, values, tied, valid, lengths, merge.eps, True
    )
    return y, Statistics(*rest)


def merge_backward(
    grad: Tensor, y: Tensor, f: Tensor | None, found: Statistics, merge: Merge
) -> MergeGradients:
    """The closed form (paper Eq. 49–54) from the saved output `y`. `f` may be None where no gain
    learns."""
    valid, lengths = _layout(merge.segments)
    f = f if merge.learns else None
    if merge.scaled:
        gain, value = _one(merge.gains.beta)
        dx, df, dgain = scaled_merge._backward_op(grad, y, f, found.r, gain, value, valid, lengths)
        df = dx if df.numel() == 0 else df
        # One gain stands in two places: β carries the gradient of both.
        return MergeGradients(dx, df, _shaped(dgain, merge.gains.beta, f), None, None)
    tensors, values = _three(merge.gains)
    assert found.mean_f is not None
    assert found.mean_x is not None
    tied = merge.gains.leak is None
    dx, df, *gains = split_merge._backward_op(
        grad, y, f, found.r, found.mean_f, found.mean_x, *tensors, values, tied, valid, lengths
    )
    shaped = (_shaped(g, gain, f) for g, gain in zip(gains, merge.gains, strict=True))
    return MergeGradients(dx, df, *shaped)


def _layout(segments: Segments) -> tuple[Tensor | None, list[int]]:
    valid = None if segments.valid is None else segments.valid.contiguous()
    return valid, list(segments.lengths)


def _one(gain: Gain) -> tuple[Tensor | None, float]:
    return (gain.detach(), 0.0) if isinstance(gain, Tensor) else (None, float(gain))


def _three(gains: Gains) -> tuple[list[Tensor | None], list[float]]:
    tensors = [g.detach() if isinstance(g, Tensor) else None for g in gains]
    values = [0.0 if g is None or isinstance(g, Tensor) else float(g) for g in gains]
    return tensors, values


def _shaped(grad: Tensor, gain: Gain | None, f: Tensor | None) -> Tensor | None:
    if f is None or not isinstance(gain, Tensor) or not gain.requires_grad:
        return None
    return grad.sum_to_size(gain.shape)
