"""`mvsplit.kernels.split_adamw` in one pass: reads and writes 26 bytes a parameter.

Shapes: N elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.low_adamw import LowSettings
from mvsplit.kernels.split_adamw import SplitState

_BLOCK = 2048


@triton.jit(do_not_specialize=["n"])
def split_adamw_kernel(
    p_w, p_g, p_low, p_first, p_second, decay, rate, correction, beta1, beta2, rest1, rest2, eps, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`rest1`, `rest2`: 1 − β, which fp32 would not give: of 1 − 0.999 it has five digits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    g = tl.load(p_g + i, mask=m).to(tl.float32)
    first = beta1 * tl.load(p_first + i, mask=m) + rest1 * g
    second = beta2 * tl.load(p_second + i, mask=m) + rest2 * g * g
    high = tl.load(p_w + i, mask=m).to(tl.int16, bitcast=True).to(tl.int32)
    bits = (high << 16) + tl.load(p_low + i, mask=m).to(tl.int32)
    w = bits.to(tl.float32, bitcast=True) * decay
    w -= rate * first / (tl.sqrt(second) / correction + eps)
    bits = w.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, bits + 0x8000, bits) >> 16
    low = tl.where(finite, bits - (rounded << 16), 0)
    tl.store(p_w + i, rounded.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=m)
    tl.store(p_low + i, low.to(tl.int16), mask=m)
    tl.store(p_first + i, first, mask=m)
    tl.store(p_second + i, second, mask=m)


def split_adamw_(values: Tensor, grads: Tensor, state: SplitState, settings: LowSettings) -> None:
    """`mvsplit.kernels.split_adamw.split_adamw_`; same arguments."""
    s, n = settings, values.numel()
    with torch.no_grad():
        split_adamw_kernel[(triton.cdiv(n, _BLOCK),)](
            values, grads, *state, 1 - s.lr * s.weight_decay, s.lr / (1 - s.beta1**s.update),
            (1 - s.beta2**s.update) ** 0.5, s.beta1, s.beta2, 1 - s.beta1, 1 - s.beta2, s.eps, n,
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
