"""What serves in a block, found out at once.

Kernels in CUDA C++ are compared and timed before they serve on a machine, each by a process of its
own (`hopper/child.py`). Asked one by one these would make a cold start slow, and some of them would
come in backward, when activations may have filled the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvsplit.kernels.block_parts import BlockSettings, BlockWeights
from mvsplit.kernels.hopper import block_product_choice, child, unit_heads, unit_heads_choice
from mvsplit.kernels.hopper.block_product import DOWN, HEAD, HEADS, UP

PATIENCE = 150.0  # seconds, for processes side by side
_asked: set[tuple[object, ...]] = set()


def prepare(x: Tensor, weights: BlockWeights, s: BlockSettings, *, learns: bool) -> None:
    """Has all of it found out, once for each shape and kind of padding. Merges ask by themselves.

    Args:
        x: [B, T, D].
        weights: in its precision.
        learns: whether there will be a backward.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return
    masked = s.segments.mask is not None
    key = (x.shape, x.dtype, x.device, weights.w13.shape, s.heads, masked, learns)
    if key not in _asked:
        _asked.add(key)
        child.prepare(questions(x, weights, s, learns=learns), x.device, PATIENCE)


def questions(
    x: Tensor, weights: BlockWeights, s: BlockSettings, *, learns: bool
) -> list[child.Question]:
    """Those of the products, and of attention, where such kernels can serve."""
    of_heads = weights.qkv.shape[0] == 3 * s.heads * HEAD
    wanted = {UP: weights.w13, **({HEADS: weights.qkv} if of_heads else {})}
    if learns:
        wanted[DOWN] = weights.w2
    found = block_product_choice.questions(x.flatten(0, 1), wanted)
    on_hopper = torch.cuda.get_device_capability(x.device) == (9, 0)
    padded_first = s.segments.mask is not None and not s.segments.real_first
    if not (on_hopper and of_heads and x.dtype == torch.bfloat16) or padded_first:
        return found
    if unit_heads.takes_rows(x.shape[1]):
        masked = s.segments.mask is not None
        found += unit_heads_choice.questions(x.shape[1], masked, x.device, learns=learns)
    return found
