"""What the gradient would be if MV-Split let less of it through, at the same function and weights.

MV-Split's backward is ∂L/∂F = β⊙PG + α⊙JG (Eq. 10). At α = 0 the writer that ends the branch F
receives adjoints without a token mean, so that the mean-coherent part of its gradient,
ΔW_μ = T·δ̄ȳᵀ (Eq. 5), is exactly zero. The counterfactual asks for that and for nothing else:

    forward     as it is: the same function, so the same loss
    backward    δ ← Pδ at the output of the writers of the chosen branches

Everything upstream of such a writer, the inside of its branch and the trunk below, receives what
the centered adjoint sends on. A gradient spike that is gone under it came through the mean mode of
those branches; one that stays came another way.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mvsplit.diagnostics.metrics import upcast
from mvsplit.diagnostics.taps import BranchName, LayerTap, segments_among
from mvsplit.kernels import Segments


def centered(x: Tensor, segments: Segments) -> Tensor:
    """PX, each token less the mean over the real tokens of its segment (Eq. 3, App. E).
    [B, T, D] → [B, T, D]; half precision is computed in fp32."""
    members, averages = segments.matrices(upcast(x))
    return (upcast(x) - members @ (averages @ upcast(x))).to(x.dtype)


class CenteredAdjoints:
    """While it is active, the writers of `branches` receive Pδ instead of δ in every layer.

        with CenteredAdjoints(taps_for_dit(model), ("attn",)):
            loss(model, batch).backward()

    The segments are those that a block receives among its arguments; without any, all tokens of a
    sample are one segment. The forward pass computes what it computes otherwise.
    """

    def __init__(self, taps: Sequence[LayerTap], branches: Collection[BranchName]) -> None:
        self.taps, self.branches = taps, branches
        self._segments: dict[int, Segments] = {}
        self._active = ExitStack()

    def __enter__(self) -> CenteredAdjoints:
        with ExitStack() as stack:
            for tap in self.taps:
                note = partial(self._note_segments, tap)
                handle = tap.block.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(handle.remove)
                for branch in tap.branches:
                    if branch.name in self.branches:
                        center = partial(self._center, tap)
                        stack.callback(branch.writer.register_forward_hook(center).remove)
            self._active = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._active.close()

    def _note_segments(self, tap: LayerTap, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._segments[tap.layer] = segments_among(args, kwargs, tap)

    def _center(self, tap: LayerTap, _: nn.Module, args: Any, update: Tensor) -> Tensor:
        return _CenterAdjoint.apply(update, self._segments[tap.layer])


class _CenterAdjoint(torch.autograd.Function):
    """The identity, whose adjoint loses its token mean."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return centered(grads[0], ctx.segments), None
