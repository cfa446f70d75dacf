"""What the fused ops share: registration, launch geometry, and blocks that wait for each other.

Names in kernels: `i_` index, `o_` offsets, `p_` pointer, `b_` block of values, `m_` mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_library = torch.library.Library("mvsplit", "FRAGMENT")
INTERPRETED = triton.knobs.runtime.interpret


def register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines `mvsplit::<schema>` with its CUDA launch (CPU too under Triton's interpreter) and
    its fake; returns the callable op."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, launch, "CUDA")
    if INTERPRETED:
        _library.impl(name, launch, "CPU")
    torch.library.register_fake(f"mvsplit::{name}", fake, lib=_library)
    return getattr(torch.ops.mvsplit, name).default


def differentiate(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Registers the backward of an op made by `register`."""
    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_library)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a small number stands for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself where its last axis is dense, as in any slice over the other axes."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block(width: int, limit: int = 16384) -> int:
    """The power of two that covers `width`."""
    return min(triton.next_power_of_2(width), limit)


def rows_for(width: int, elements: int) -> int:
    """How many rows of `width` make a tile of about `elements` values; a power of two."""
    return max(1, elements // triton.next_power_of_2(width))


def warps_for(rows: int, width: int, values: int) -> int:
    """Warps that leave each thread about `values` values of a tile; from 4 to 16."""
    return min(16, max(4, rows * triton.next_power_of_2(width) // (32 * values)))


def stages_for(step_bytes: int, most: int) -> int:
    """Steps of a loop that load at once, as far as shared memory goes (227 KiB on Hopper, and
    more than one block should fit)."""
    return 1 + max(1, min(most - 1, 98304 // step_bytes))


def tiles(lengths: list[int], rows: int) -> int:
    """Tiles of `rows` tokens in one sample; none spans two segments."""
    return sum(triton.cdiv(n, rows) for n in lengths)


def gain_stride(gain: Tensor | None) -> int:
    """0 where one element serves all columns."""
    return int(gain is not None and gain.numel() > 1)


@triton.jit
def locate(i_tile, lengths, rows):
    """The segment of a sample's i-th tile of `rows` tokens, the sample's token where that segment
    starts, the tile's first token within the segment, and the segment's length."""
    i_s = 0
    start = 0
    local = 0
    length = 0
    before = 0
    offset = 0
    for s in tl.static_range(len(lengths)):
        inside = i_tile >= before
        i_s = tl.where(inside, s, i_s)
        start = tl.where(inside, offset, start)
        local = tl.where(inside, (i_tile - before) * rows, local)
        length = tl.where(inside, lengths[s], length)
        before += tl.cdiv(lengths[s], rows)
        offset += lengths[s]
    return i_s, start, local, length


@triton.jit
def tiles_before(i_s, lengths, rows):
    """Tiles of the segments before segment i_s."""
    count = 0
    for s in tl.static_range(len(lengths)):
        count += tl.where(s < i_s, tl.cdiv(lengths[s], rows), 0)
    return count


@triton.jit
def real_tokens(p_valid, i_b, i_s, length, S: tl.constexpr):
    """Real tokens of a segment: all of them where no counts are given."""
    count = length
    if p_valid is not None:
        count = tl.minimum(length, tl.load(p_valid + i_b * S + i_s).to(tl.int32))
    return count


@triton.jit
def total_tokens(lengths):
    """T, the tokens of a sample."""
    total = 0
    for s in tl.static_range(len(lengths)):
        total += lengths[s]
    return total


@triton.jit
def load_gain(p_gain, value, stride, o_d, m_d):
    """A gain over columns: a vector, one element for all (stride 0), or a plain number."""
    gain = tl.zeros_like(o_d).to(tl.float32) + value
    if p_gain is not None:
        gain = tl.load(p_gain + o_d * stride, mask=m_d, other=0.0).to(tl.float32)
    return gain


@triton.jit
def store_merged(
    p_y, p_r, z, row, inside, o_d, m_d, eps, D: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Stores whole rows of Z as Y, with NORM as r_i Z_i and r_i (Eq. 49)."""
    if NORM:
        r = tl.rsqrt(tl.sum(z * z, 1) / D + eps)
        z *= r[:, None]
        tl.store(p_r + row, r, mask=inside)
    m = inside[:, None] & m_d[None, :]
    tl.store(p_y + row[:, None] * D + o_d[None, :], z.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def schedule(task, batch, n_reduce, n_apply, lag):
    """What the block of index `task` does: (sample, index, whether it reduces). A sample's apply
    tasks come `lag` samples after its reduce tasks: late enough that waiting is rare, soon enough
    that their second read is served by the L2 cache. A block waits only for blocks of lower index.
    GPUs start blocks in the order of their index (CUB's single-pass scan rests on it too), so
    whatever is waited for has started, and what reduces never waits: there is no deadlock."""
    pair = n_reduce + n_apply
    head = lag * n_reduce
    body = head + (batch - lag) * pair
    i_pair = (task - head) // pair
    i_in_pair = (task - head) % pair
    reduces_in_pair = i_in_pair < n_reduce
    in_head = task < head
    in_body = task < body
    i_b = tl.where(reduces_in_pair, i_pair + lag, i_pair)
    i_b = tl.where(in_body, i_b, batch - lag + (task - body) // n_apply)
    i_b = tl.where(in_head, task // n_reduce, i_b)
    i = tl.where(reduces_in_pair, i_in_pair, i_in_pair - n_reduce)
    i = tl.where(in_body, i, (task - body) % n_apply)
    i = tl.where(in_head, task % n_reduce, i)
    return i_b.to(tl.int64), i, in_head | (in_body & reduces_in_pair)


@triton.jit
def announce(p_counter):
    """Publishes this block's stores, then counts it; returns how many were counted before."""
    tl.debug_barrier()
    return tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait_for(p_counter, target):
    """Returns once `target` blocks have announced themselves; their stores are then visible."""
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def fold(p_partial, first, n, o_d, m_d, D: tl.constexpr, BLOCK_D: tl.constexpr, BOTH: tl.constexpr):
    """Adds up, in order, the two partial sums [2, D] of chunks first … first + n − 1; the second
    is zero unless BOTH."""
    FOLD: tl.constexpr = 4 if BLOCK_D <= 1024 else 1
    b_0 = tl.zeros([FOLD, BLOCK_D], tl.float32)
    b_1 = tl.zeros([FOLD, BLOCK_D], tl.float32)
    for c in range(0, n, FOLD):
        o_c = c + tl.arange(0, FOLD)
        m = (o_c < n)[:, None] & m_d[None, :]
        p = p_partial + ((first + o_c) * 2 * D)[:, None] + o_d[None, :]
        b_0 += tl.load(p, m, 0.0)
        if BOTH:
            b_1 += tl.load(p + D, m, 0.0)
    return tl.sum(b_0, 0), tl.sum(b_1, 0)


def lag(device: torch.device, batch: int, tasks: int, blocks: int) -> int:
    """Samples between a sample's reduce and apply tasks, of which there are `tasks` for each: as
    many as hold `blocks` for each processor, about what runs at once."""
    return min(batch, triton.cdiv(blocks * processors(device), tasks))
