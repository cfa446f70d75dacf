"""`mvsplit.kernels.low_adamw` in one pass: reads and writes 10 bytes a parameter.

Shapes: N elements in blocks of `BLOCK` that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.low_adamw import BLOCK, LARGEST, LEAST, SPOILT, STEPS, LowSettings, LowState

_ROWS = 16  # blocks a program


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _decode(code):
    """Exponent and mantissa of a code, three bits further up those of an fp32, whose exponent has
    another bias: 2^120 times as large. That holds for what is subnormal too."""
    c = code.to(tl.int32)
    value = ((c & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(c >= 128, -value, value)


@triton.jit
def _encode(x, chance):
    """The other way; the 20 bits that a code leaves out are rounded by 8 bits of chance."""
    bits = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    code = (bits + (chance.to(tl.int32) << 12) + 2048) >> 20
    return (code + tl.where(x < 0, 128, 0)).to(tl.uint8)


@triton.jit
def _round_to_bf16(x, chance):
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + chance.to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, x).to(tl.bfloat16)


@triton.jit
def _fraction(k, STEPS: tl.constexpr):
    """2^(k/12)."""
    return tl.exp2(k.to(tl.float32) * (1 / STEPS))


@triton.jit
def _log2(x):
    """Of a normal number, but for 1.4e-5, which is 2e-4 of a step: a polynomial of its mantissa."""
    bits = x.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1
    y = 0.0439286278 * m - 0.189832447
    y = y * m + 0.411561482
    y = y * m - 0.707253434
    y = y * m + 1.44159208
    return ((bits >> 23) - 127).to(tl.float32) + (y * m + 1.4390930e-5)


@triton.jit
def _encode_powers(x, spoilt, chance, LEAST: tl.constexpr, SPOILT: tl.constexpr,
                   STEPS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Codes [ROWS, BLOCK] and bases [ROWS]; `spoilt` [ROWS]: whether something is not finite."""
    sound = tl.where(spoilt[:, None], 1.0, tl.maximum(x, LEAST))
    lower = tl.floor(_log2(sound) * STEPS).to(tl.int32)
    low = _fraction(lower, STEPS)
    # Whether the share of the step h·low that x is above low exceeds a random number.
    raised = sound - low > (chance.to(tl.float32) + 0.5) * (low * (STEP / 65536))
    base = tl.max(lower, 1) + 1 - 255
    code = lower + raised.to(tl.int32) - base[:, None]
    code = tl.where(x == 0, 0, tl.minimum(tl.maximum(code, 1), 255))
    return code.to(tl.uint8), tl.where(spoilt, SPOILT, base).to(tl.int16)


@triton.jit(do_not_specialize=["update", "rows"])
def low_adamw_kernel(
    p_w, p_g, p_code, p_scale, p_power, p_base, decay, rate, correction, beta1, beta2, rest1, rest2,
    eps, update, rows, BLOCK: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr,
    LEAST: tl.constexpr, SPOILT: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`rest1`, `rest2`: 1 − β, which fp32 would not give: of 1 − 0.999 it has five digits;
    `correction`: 1/√(1 − β₂ⁿ). What a row has in common is computed once for it: a block of
    elements has one high word, for instance, and a division is a product with an inverse."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    i = start[:, None] + column
    m = (row < rows)[:, None] & (column >= 0)
    high = _hash((start >> 32).to(tl.uint32) + _hash(update.to(tl.uint32)))
    low_word = (start & 0xFFFFFFFF).to(tl.uint32)[:, None] + column.to(tl.uint32)
    chance = _hash(low_word ^ high[:, None])
    g = tl.load(p_g + i, m, 0.0).to(tl.float32)
    scale = tl.load(p_scale + row, row < rows, 0.0)
    first = _decode(tl.load(p_code + i, m, 0)) * scale[:, None]
    first = beta1 * first + rest1 * g
    base = tl.load(p_base + row, row < rows, 0).to(tl.int32)
    code = tl.load(p_power + i, m, 0).to(tl.int32)
    second = tl.where(code > 0, _fraction(base[:, None] + code, STEPS), 0.0)
    second = tl.where((base == SPOILT)[:, None], float("nan"), second)
    second = beta2 * second + rest2 * g * g
    w = tl.load(p_w + i, m, 0.0).to(tl.float32) * decay
    w -= rate * first / (tl.sqrt(second) * correction + eps)
    tl.store(p_w + i, _round_to_bf16(w, chance & 0xFFFF), mask=m)
    # max passes NaN over: of both moments, those elements are counted that are not finite.
    bad = ((second != second) | (second == float("inf"))).to(tl.int32)
    bad = tl.sum(bad + (first != first).to(tl.int32) * 65536, 1)
    scale = tl.max(tl.abs(first), 1) / LARGEST
    scale = tl.where(bad > 65535, float("nan"), scale)
    tl.debug_barrier()  # a scale and a base are loaded by several threads
    tl.store(p_scale + row, scale, mask=row < rows)
    inverse = 1 / tl.where(scale >= LEAST, scale, 1.0)  # of less it would be infinite
    tl.store(p_code + i, _encode(first * inverse[:, None], (chance >> 16) & 0xFF), mask=m)
    spoilt = (bad & 65535) > 0
    code, base = _encode_powers(second, spoilt, chance >> 16, LEAST, SPOILT, STEPS, STEP)
    tl.store(p_power + i, code, mask=m)
    tl.store(p_base + row, base, mask=row < rows)


def low_adamw_(values: Tensor, grads: Tensor, state: LowState, settings: LowSettings) -> None:
    """`mvsplit.kernels.low_adamw.low_adamw_`; same arguments."""
    s, rows = settings, values.numel() // BLOCK
    with torch.no_grad():
        low_adamw_kernel[(triton.cdiv(rows, _ROWS),)](
            values, grads, *state, 1 - s.lr * s.weight_decay, s.lr / (1 - s.beta1**s.update),
            (1 - s.beta2**s.update) ** -0.5, s.beta1, s.beta2, 1 - s.beta1, 1 - s.beta2, s.eps,
            s.update, rows,
            BLOCK=BLOCK, ROWS=_ROWS, LARGEST=LARGEST, LEAST=LEAST, SPOILT=SPOILT, STEPS=STEPS,
            STEP=2 ** (1 / STEPS) - 1,
            num_warps=4,
        )  # fmt: skip
