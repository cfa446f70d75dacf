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
def _power(exponent):
    """2^exponent as fp32, from its bits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode(code):
    c = code.to(tl.int32)
    exponent = (c >> 3) & 15
    mantissa = (c & 7).to(tl.float32)
    value = tl.where(exponent > 0, (8 + mantissa) * _power(exponent - 10), mantissa * 0.001953125)
    return tl.where(c >= 128, -value, value)


@triton.jit
def _encode(x, chance):
    a = tl.abs(x)
    exponent = tl.maximum((a.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    count = a * _power(3 - exponent) + (chance.to(tl.float32) + 0.5) / 256
    code = ((exponent + 7) << 3) + tl.floor(count).to(tl.int32) - 8
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
def _encode_powers(x, chance, LEAST: tl.constexpr, SPOILT: tl.constexpr, STEPS: tl.constexpr):
    """Codes [ROWS, BLOCK] and bases [ROWS]."""
    bad = tl.sum(((x != x) | (x == float("inf"))).to(tl.int32), 1) > 0
    sound = tl.where(bad[:, None], 1.0, tl.maximum(x, LEAST))
    lower = tl.floor(tl.log2(sound) * STEPS).to(tl.int32)
    low = _fraction(lower, STEPS)
    high = _fraction(lower + 1, STEPS)
    raised = (sound - low) / (high - low) > (chance.to(tl.float32) + 0.5) / 65536
    base = tl.max(lower, 1) + 1 - 255
    code = lower + raised.to(tl.int32) - base[:, None]
    code = tl.where(x == 0, 0, tl.minimum(tl.maximum(code, 1), 255))
    return code.to(tl.uint8), tl.where(bad, SPOILT, base).to(tl.int16)


@triton.jit(do_not_specialize=["update", "rows"])
def low_adamw_kernel(
    p_w, p_g, p_code, p_scale, p_power, p_base, decay, rate, correction, beta1, beta2, rest1, rest2,
    eps, update, rows, BLOCK: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr,
    LEAST: tl.constexpr, SPOILT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`rest1`, `rest2`: 1 − β, which fp32 would not give: of 1 − 0.999 it has five digits."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = (row < rows)[:, None] & (i >= 0)
    seed = _hash(update.to(tl.uint32))
    chance = _hash((i & 0xFFFFFFFF).to(tl.uint32) ^ _hash((i >> 32).to(tl.uint32) + seed))
    g = tl.load(p_g + i, m, 0.0).to(tl.float32)
    scale = tl.load(p_scale + row, row < rows, 0.0)
    first = _decode(tl.load(p_code + i, m, 0)) * scale[:, None]
    first = beta1 * first + rest1 * g
    base = tl.load(p_base + row, row < rows, 0).to(tl.int32)[:, None]
    code = tl.load(p_power + i, m, 0).to(tl.int32)
    second = tl.where(code > 0, _fraction(base + code, STEPS), 0.0)
    second = tl.where(base == SPOILT, float("nan"), second)
    second = beta2 * second + rest2 * g * g
    w = tl.load(p_w + i, m, 0.0).to(tl.float32) * decay
    w -= rate * first / (tl.sqrt(second) / correction + eps)
    tl.store(p_w + i, _round_to_bf16(w, chance & 0xFFFF), mask=m)
    scale = tl.max(tl.abs(first), 1) / LARGEST
    lost = tl.sum((first != first).to(tl.int32), 1) > 0  # max passes NaN over
    scale = tl.where(lost, float("nan"), scale)
    tl.debug_barrier()  # a scale and a base are loaded by several threads
    tl.store(p_scale + row, scale, mask=row < rows)
    safe = tl.where(scale > 0, scale, 1.0)
    tl.store(p_code + i, _encode(first / safe[:, None], (chance >> 16) & 0xFF), mask=m)
    code, base = _encode_powers(second, (chance >> 16) & 0xFFFF, LEAST, SPOILT, STEPS)
    tl.store(p_power + i, code, mask=m)
    tl.store(p_base + row, base, mask=row < rows)


def low_adamw_(values: Tensor, grads: Tensor, state: LowState, settings: LowSettings) -> None:
    """`mvsplit.kernels.low_adamw.low_adamw_`; same arguments."""
    s, rows = settings, values.numel() // BLOCK
    with torch.no_grad():
        low_adamw_kernel[(triton.cdiv(rows, _ROWS),)](
            values, grads, *state, 1 - s.lr * s.weight_decay, s.lr / (1 - s.beta1**s.update),
            (1 - s.beta2**s.update) ** 0.5, s.beta1, s.beta2, 1 - s.beta1, 1 - s.beta2, s.eps,
            s.update, rows,
            BLOCK=BLOCK, ROWS=_ROWS, LARGEST=LARGEST, LEAST=LEAST, SPOILT=SPOILT, STEPS=STEPS,
            num_warps=4,
        )  # fmt: skip
