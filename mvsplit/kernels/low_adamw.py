"""AdamW on bf16 weights with 6 bytes of state a parameter less: what 13.6 billion need on one GPU.

Weights are bf16 and rounded stochastically, so that updates far below their precision act on
average (a weight of 1 takes in steps of 1/256; rounding to nearest would lose every smaller one).
The first moment is one byte an element, sign, 4 bits of exponent and 3 of mantissa, times a scale
for each `BLOCK` elements. The second is a power of 2^(1/12), one byte too: of the 255 powers below
a base that `BLOCK` elements share, which is such a power itself, so that the grid is the same at
all times. Both are rounded stochastically: the second moment moves by a thousandth a step, which
rounding to nearest would freeze.

A step h = 2^(1/12) − 1 of that grid, changes δ of up to 1 − β₂ = 1e-3 and a memory of 1/(1 − β₂)
updates leave √(δh/2(1 − β₂)) = 17 % of noise in the second moment, 9 % in the step; a mean over
1/(1 − β₂) squares has some 5 % by itself. What is below the 21 octaves of its block counts as the
least of them: its steps are smaller than Adam's, never larger.

Chance is a hash of (update, element), so an update is a function of its inputs: repeated after an
interruption it gives the same bits. A CPU and a GPU may differ where a multiply-add is fused.

Sources: AdamW, Loshchilov and Hutter (arXiv 1711.05101); block-wise 8-bit state, Dettmers et al.
(arXiv 2110.02861); the hash is Wellons' lowbias32 (nullprogram.com/blog/2018/07/31, public domain).

Shapes: N elements, a multiple of `BLOCK`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mvsplit.kernels.dispatch import backend

BLOCK = 128  # elements that share a scale
LARGEST = 480.0  # of the codes: 15·2⁵
STEPS = 12  # of an octave, in the second moment
# Second moment that is told from less, but not from zero; of a scale, also from zero.
LEAST = 2.0**-126
SPOILT = 32767  # base of a block with something that is not finite
_WORD = 0xFFFFFFFF


class LowState(NamedTuple):
    """The moments of AdamW for N elements."""

    codes: Tensor  # [N] uint8, first moment
    scales: Tensor  # [N / BLOCK] fp32
    powers: Tensor  # [N] uint8, second moment; 0 for zero
    bases: Tensor  # [N / BLOCK] int16

    @classmethod
    def zeros(cls, values: Tensor) -> LowState:
        """Fresh moments for `values` [N]."""
        n, device = values.numel(), values.device
        return cls(
            torch.zeros(n, dtype=torch.uint8, device=device),
            torch.zeros(n // BLOCK, dtype=torch.float32, device=device),
            torch.zeros(n, dtype=torch.uint8, device=device),
            torch.zeros(n // BLOCK, dtype=torch.int16, device=device),
        )

    def first(self) -> Tensor:
        """The first moment, [N] fp32."""
        return (decode(self.codes).view(-1, BLOCK) * self.scales[:, None]).flatten()

    def second(self) -> Tensor:
        """The second moment, [N] fp32."""
        return decode_powers(self.powers, self.bases)


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
    first = s.beta1 * state.first() + (1 - s.beta1) * g
    second = s.beta2 * state.second() + (1 - s.beta2) * g * g
    w = values.float() * (1 - s.lr * s.weight_decay) - step_of(first, second, s)
    values.copy_(round_to_bf16(w, chance & 0xFFFF))
    rows = first.view(-1, BLOCK)
    scales = rows.abs().amax(1) / LARGEST
    state.scales.copy_(scales)
    safe = torch.where(scales >= LEAST, scales, 1)[:, None]  # of less, all codes are zero
    state.codes.copy_(encode((rows / safe).flatten(), (chance >> 16) & 0xFF))
    powers, bases = encode_powers(second, (chance >> 16) & 0xFFFF)
    state.powers.copy_(powers)
    state.bases.copy_(bases)


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


def power(k: Tensor) -> Tensor:
    """2^(k/12) as fp32."""
    return torch.exp2(k.float() * (1 / STEPS))


def decode_powers(powers: Tensor, bases: Tensor) -> Tensor:
    """Codes [N] and bases [N / BLOCK] to fp32."""
    codes, bases = powers.view(-1, BLOCK).to(torch.int32), bases.to(torch.int32)[:, None]
    values = torch.where(codes > 0, power(bases + codes), 0.0)
    return torch.where(bases == SPOILT, torch.nan, values).flatten()


def move_bases_(bases: Tensor, factor: float) -> None:
    """Multiplies second moments by the power of 2^(1/12) that is nearest to a factor, in place."""
    moved = bases + round(STEPS * math.log2(factor))
    bases.copy_(torch.where(bases == SPOILT, bases, moved))


def encode_powers(x: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N], not negative, to codes and bases, rounded stochastically to one of the neighbours;
    `chance` has 16 bits."""
    rows = x.view(-1, BLOCK)
    top = rows.amax(1, keepdim=True)  # NaN where there is one
    spoilt = ~(top < torch.inf)
    sound = torch.where(spoilt, 1.0, rows).clamp(min=LEAST)
    lower = (sound.log2() * STEPS).floor().to(torch.int32)
    low, high = power(lower), power(lower + 1)
    raised = (sound - low) / (high - low) > (chance.view(-1, BLOCK).float() + 0.5) / 65536
    base = lower.amax(1, keepdim=True) + 1 - 255
    codes = (lower + raised.to(torch.int32) - base).clamp(1, 255)
    codes = torch.where(rows == 0, 0, codes).to(torch.uint8)
    bases = torch.where(spoilt, SPOILT, base).to(torch.int16)
    return codes.flatten(), bases.flatten()
