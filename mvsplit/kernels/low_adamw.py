"""AdamW on bf16 weights with 5 bytes of state a parameter less: what 13.6 billion need on one GPU.

Weights are bf16 and rounded stochastically, so that updates far below their precision act on
average (a weight of 1 takes in steps of 1/256; rounding to nearest would lose every smaller one).
The first moment is one byte an element, sign, 4 bits of exponent and 3 of mantissa, times a scale
for each `BLOCK` elements; the second is bf16. Both are rounded stochastically too: the second
moment moves by a thousandth a step, which rounding to nearest would freeze.

Chance is a hash of (update, element), so an update is a function of its inputs: repeated after an
interruption it gives the same bits. A CPU and a GPU may differ where a multiply-add is fused.

Sources: AdamW, Loshchilov and Hutter (arXiv 1711.05101); block-wise 8-bit state, Dettmers et al.
(arXiv 2110.02861); the hash is Wellons' lowbias32 (nullprogram.com/blog/2018/07/31, public domain).

Shapes: N elements, a multiple of `BLOCK`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mvsplit.kernels.dispatch import backend

BLOCK = 128  # elements that share a scale
LARGEST = 480.0  # of the codes: 15·2⁵
_WORD = 0xFFFFFFFF


class LowState(NamedTuple):
    """The moments of AdamW for N elements."""

    codes: Tensor  # [N] uint8, first moment
    scales: Tensor  # [N / BLOCK] fp32
    second: Tensor  # [N] bf16

    @classmethod
    def zeros(cls, values: Tensor) -> LowState:
        """Fresh moments for `values` [N]."""
        n, device = values.numel(), values.device
        return cls(
            torch.zeros(n, dtype=torch.uint8, device=device),
            torch.zeros(n // BLOCK, dtype=torch.float32, device=device),
            torch.zeros(n, dtype=torch.bfloat16, device=device),
        )


class LowSettings(NamedTuple):
    """Numbers of one update; `update` is n = 1, 2, …, for the bias correction and for chance."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    update: int


def low_adamw_(values: Tensor, grads: Tensor, state: LowState, settings: LowSettings) -> None:
    """One update of `values` [N] bf16 and of `state`, in place, from `grads` [N]."""
    if backend(values, row=1) == "triton":
        from mvsplit.kernels.fused.low_adamw import low_adamw_ as fused

        fused(values, grads, state, settings)
    else:
        reference_low_adamw_(values, grads, state, settings)


@torch.no_grad()
def reference_low_adamw_(
    values: Tensor, grads: Tensor, state: LowState, settings: LowSettings
) -> None:
    """`low_adamw_` in plain PyTorch."""
    s = settings
    chance = random_words(values.numel(), s.update, values.device)
    g = grads.float()
    first = decode(state.codes).view(-1, BLOCK) * state.scales[:, None]
    first = s.beta1 * first.flatten() + (1 - s.beta1) * g
    second = s.beta2 * state.second.float() + (1 - s.beta2) * g * g
    w = values.float() * (1 - s.lr * s.weight_decay) - step_of(first, second, s)
    values.copy_(round_to_bf16(w, chance & 0xFFFF))
    rows = first.view(-1, BLOCK)
    scales = rows.abs().amax(1) / LARGEST
    state.scales.copy_(scales)
    safe = torch.where(scales > 0, scales, 1)[:, None]
    state.codes.copy_(encode((rows / safe).flatten(), (chance >> 16) & 0xFF))
    state.second.copy_(round_to_bf16(second, (chance >> 16) & 0xFFFF))


def step_of(first: Tensor, second: Tensor, s: LowSettings) -> Tensor:
    """lr·m̂/(√v̂ + ε)."""
    correction = (1 - s.beta2**s.update) ** 0.5
    rate = s.lr / (1 - s.beta1**s.update)
    return rate * first / (second.sqrt() / correction + s.eps)


def random_words(n: int, update: int, device: torch.device) -> Tensor:
    """One 32-bit word for each of `n` elements, as int64."""
    i = torch.arange(n, device=device)
    seed = _hash(torch.tensor(update, device=device))
    return _hash((i & _WORD) ^ _hash((i >> 32) + seed & _WORD))


def _hash(x: Tensor) -> Tensor:
    x = x & _WORD
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def round_to_bf16(x: Tensor, chance: Tensor) -> Tensor:
    """fp32 to one of its two neighbours in bf16, the nearer the likelier; `chance` has 16 bits."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + chance.to(torch.int32)) & ~0xFFFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).bfloat16()


def encode(x: Tensor, chance: Tensor) -> Tensor:
    """fp32 of at most `LARGEST` to codes, rounded stochastically; `chance` has 8 bits."""
    a = x.abs()
    exponent = ((a.view(torch.int32) >> 23) - 127).clamp(min=-6)
    count = a * torch.exp2((3 - exponent).float())  # 8 … 15, fewer below 2⁻⁶
    count = (count + (chance.float() + 0.5) / 256).floor().to(torch.int32)
    code = ((exponent + 7) << 3) + count - 8
    return (code + 128 * (x < 0)).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Codes to fp32."""
    c = codes.to(torch.int32)
    exponent, mantissa = (c >> 3) & 15, c & 7
    normal = (8 + mantissa) * torch.exp2((exponent - 10).float())
    value = torch.where(exponent > 0, normal, mantissa * 2.0**-9)
    return torch.where(c >= 128, -value, value)
