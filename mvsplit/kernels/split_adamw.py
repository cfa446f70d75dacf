"""fp32 AdamW on weights in two halves: bf16 for the network, and the 16 bits that it leaves out.

A weight w of fp32 is stored as the bf16 nearest to it and the difference of their bit patterns, a
signed 16-bit number; together they are w, bit for bit. So the network reads bf16 weights without a
cast or a copy, and the optimiser has fp32 weights and moments: 14 bytes a parameter with a gradient
in bf16, where fp32 weights with a copy in bf16 have 18 and those that are cast whenever they are
used have 16.

Sources: AdamW, Loshchilov and Hutter (arXiv 1711.05101); storing what a rounding leaves out, as in
the split optimisers of BF16 training (Zamirai et al., arXiv 2010.06192).

Shapes: N elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvsplit.kernels.dispatch import backend
from mvsplit.kernels.low_adamw import LowSettings, step_of


class SplitState(NamedTuple):
    """The other half of N weights, and the moments of AdamW."""

    low_bits: Tensor  # [N] int16
    first: Tensor  # [N] fp32
    second: Tensor  # [N] fp32

    @classmethod
    def zeros(cls, values: Tensor) -> SplitState:
        """Fresh moments for `values` [N] bf16, which are the weights exactly."""
        n, device = values.numel(), values.device
        return cls(
            torch.zeros(n, dtype=torch.int16, device=device),
            torch.zeros(n, dtype=torch.float32, device=device),
            torch.zeros(n, dtype=torch.float32, device=device),
        )


def split_adamw_(values: Tensor, grads: Tensor, state: SplitState, settings: LowSettings) -> None:
    """One update of `values` [N] bf16 and of `state`, in place, from `grads` [N]."""
    if backend(values, row=1) == "triton":
        from mvsplit.kernels.fused.split_adamw import split_adamw_ as fused

        fused(values, grads, state, settings)
    else:
        reference_split_adamw_(values, grads, state, settings)


@torch.no_grad()
def reference_split_adamw_(
    values: Tensor, grads: Tensor, state: SplitState, settings: LowSettings
) -> None:
    """`split_adamw_` in plain PyTorch."""
    s = settings
    g = grads.float()
    state.first.mul_(s.beta1).add_(g, alpha=1 - s.beta1)
    state.second.mul_(s.beta2).addcmul_(g, g, value=1 - s.beta2)
    w = join(values, state.low_bits) * (1 - s.lr * s.weight_decay)
    high, low_bits = split(w - step_of(state.first, state.second, s))
    values.copy_(high)
    state.low_bits.copy_(low_bits)


def join(high: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 number of two halves."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low_bits.to(torch.int32)
    return bits.view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → the nearest bf16 (of two equally near the larger) and what its bits lack, int16. What
    is not finite stays so."""
    bits = x.contiguous().view(torch.int32)
    rounded = torch.where(x.isfinite(), bits + 0x8000, bits) >> 16
    low_bits = torch.where(x.isfinite(), bits - (rounded << 16), 0)
    return rounded.to(torch.int16).view(torch.bfloat16), low_bits.to(torch.int16)
