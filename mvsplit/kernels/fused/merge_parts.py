"""What the forms of the merge with means have in common: its gains and its results as tensors.

A form is a module with `forward` and `backward` that fill the results.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.fused.common import gain_stride


class Weights(NamedTuple):
    """β, α and λ as a kernel takes them.

    Attributes:
        pointers: the tensors; None for numbers.
        values: the numbers.
        strides: of the tensors; 0 where one element serves all columns.
        tied: whether λ is α.
    """

    pointers: tuple[Tensor | None, ...]
    values: tuple[float, ...]
    strides: tuple[int, ...]
    tied: bool

    @property
    def scalars(self) -> tuple[Any, ...]:
        """Values, then strides."""
        return (*self.values, *self.strides)

    @property
    def leaks(self) -> bool:
        """Whether λ may be other than zero, so that the mean of X is needed."""
        return self.pointers[2] is not None or self.values[2] != 0


def weights(
    beta: Tensor | None, alpha: Tensor | None, leak: Tensor | None, values: list[float], tied: bool
) -> Weights:
    """Gains of the op's arguments."""
    gains = (beta, alpha, alpha if tied else leak)
    numbers = (*values[:2], values[1] if tied else values[2])
    return Weights(gains, numbers, tuple(gain_stride(g) for g in gains), tied)


class Merged(NamedTuple):
    """Y [B, T, D], 1/RMS [B, T] and the means of F and X [B, S, D]; empty where not needed."""

    y: Tensor
    r: Tensor
    mean_f: Tensor
    mean_x: Tensor


def merged(x: Tensor, segments: int, leaks: bool, norm: bool) -> Merged:
    """Results of a forward, not filled."""
    batch, total, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shapes = (
        (batch, total) if norm else (0,),
        (batch, segments, width),
        (batch, segments, width) if leaks else (0,),
    )
    return Merged(y, *(torch.empty(s, dtype=torch.float32, device=x.device) for s in shapes))


class Gradients(NamedTuple):
    """∂L/∂X, ∂L/∂F [B, T, D] and of each gain [D], which is empty where no gain learns."""

    x: Tensor
    f: Tensor
    beta: Tensor
    alpha: Tensor
    leak: Tensor


def gradients(grad: Tensor, gains: tuple[Tensor | None, ...], learns: bool) -> Gradients:
    """Results of a backward, not filled."""
    width = grad.shape[-1] if learns else 0
    dtypes = [torch.float32 if gain is None else gain.dtype for gain in gains]
    of_gains = (torch.empty(width, dtype=t, device=grad.device) for t in dtypes)
    dx, df = (torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for _ in range(2))
    return Gradients(dx, df, *of_gains)


@triton.jit
def store_gain_gradients(
    p_dbeta, p_dalpha, p_dleak, dbeta, dalpha, dleak, o_d, D: tl.constexpr, TIED: tl.constexpr
):  # fmt: skip
    """Adds up partial gradients [rows, columns] of the gains (Eq. 54), and stores them at the
    columns o_d; where λ is α, its gradient is part of α's."""
    if TIED:
        dalpha += dleak
    m_d = o_d < D
    tl.store(p_dbeta + o_d, tl.sum(dbeta, 0).to(p_dbeta.dtype.element_ty), mask=m_d)
    tl.store(p_dalpha + o_d, tl.sum(dalpha, 0).to(p_dalpha.dtype.element_ty), mask=m_d)
    tl.store(p_dleak + o_d, tl.sum(dleak, 0).to(p_dleak.dtype.element_ty), mask=m_d)
