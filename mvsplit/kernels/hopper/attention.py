"""Attention of short samples on Hopper (attention.cu, attention_three.cu): all keys and values of a
head in shared memory, the scores of 64 queries, or some of them, in registers.

Queries and keys are normalised, which bounds every score: no maximum is looked for. Beside it,
blocks that the device has room for add up the columns of the trunk, as the merge after this branch
needs.

Shapes: B samples, T rows of a sample, H query heads, G key/value heads, K = 128 head width.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper.driver import Kernel, TensorMap, compiled, to_fetch
from mvsplit.kernels.hopper.wgmma import multiply

HEAD = 128  # channels
MOST_ROWS = 288  # of a sample: keys, values and queries fit into shared memory
_SHARED = 232_448 - 256  # bytes of a block; the rest is for barriers
_ROW = 2 * HEAD  # bytes
_MOST_KEYS = 96  # of a part, with three warpgroups; with 112 products wait for each other
SCALE = math.log2(math.e) / math.sqrt(HEAD)  # of scores, whose exponentials are taken to base 2
_FOLDER = Path(__file__).parent
_TILE = 64  # queries of a warpgroup
_TASKS = 2  # of sums, that a block beside the others does


@dataclass(frozen=True)
class Heads:
    """How attention is cut up: two or three warpgroups of a block share a whole head, one takes 64
    queries.

    Attributes:
        groups: warpgroups of a block.
        pdl: whether the kernel starts before the one before it has ended.
    """

    groups: int = 2
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> Heads:
        return replace(self, pdl=pdl)


def _queries(cut: Heads, rows: int) -> int:
    """Of one block."""
    return _TILE if cut.groups == 1 else rows


def _parts(cut: Heads, rows: int) -> int:
    """In which the keys are taken, so that a product has at most 256 columns, and that with three
    warpgroups what a thread holds of it stays in registers."""
    if cut.groups < 3:
        return 1 if rows <= 160 else 2
    return next(n for n in range(1, rows) if rows % (16 * n) == 0 and rows // n <= _MOST_KEYS)


def _slots(rows: int) -> int:
    """Tiles of queries of three warpgroups that are in shared memory at once."""
    return min(-(-rows // _TILE), (_SHARED - 2 * _ROW * rows) // (_TILE * _ROW))


def suits(stream: Stream, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can do heads `width` wide of a stream."""
    return dtype == torch.bfloat16 and width == HEAD and stream.sample_rows <= MOST_ROWS


def source(cut: Heads, rows: int, masked: bool, trap: bool = False) -> str:
    """The CUDA C++ of a kernel for samples of `rows` rows; with `trap`, a wait in vain ends the
    program."""
    parts, queries = _parts(cut, rows), _queries(cut, rows)
    macros = {
        "TOK": rows, "NI": parts, "NT": rows // parts, "MASKED": int(masked),
        "TYPE": '"bf16"', "BF16": 1,
    }  # fmt: skip
    if trap:
        macros["TRAP"] = 1
    if cut.groups == 3:
        macros |= {"TILES": -(-rows // _TILE), "SLOTS": _slots(rows)}
    else:
        macros |= {
            "WG": cut.groups, "QUERIES": queries, "PARTS": -(-rows // queries),
            "QBOX": min(queries, rows // parts),
        }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    file = "attention_three.cu" if cut.groups == 3 else "attention.cu"
    files = ("base.cu", "common.cu", "heads.cu", file)
    *common, kernel = ((_FOLDER / file).read_text() for file in files)
    products = (
        multiply("multiply", rows // parts, "bf16"),
        multiply("weigh", HEAD, "bf16", registers=True, transposed=True),
    )
    return "\n".join((head, *common, *products, kernel))


def _shared_bytes(cut: Heads, rows: int) -> int:
    queries, barriers = _queries(cut, rows), _parts(cut, rows) + 1
    if cut.groups == 3:
        queries, barriers = _slots(rows) * _TILE, 2 * _parts(cut, rows) + _slots(rows)
    return _ROW * (queries + 2 * rows) + 8 * barriers


@cache
def _kernel(cut: Heads, rows: int, masked: bool, trap: bool, device: int) -> Kernel:
    binary = compiled(source(cut, rows, masked, trap), cache_folder() / "cuda")
    threads, shared = 128 * cut.groups, _shared_bytes(cut, rows)
    return Kernel(binary, "attention", threads=threads, shared=shared, cluster=1, device=device)


def box(x: Tensor, rows: int) -> TensorMap:
    """Of heads [B, H, T, K], by boxes of 64 channels of `rows` rows."""
    batch, heads, tokens, width = x.shape
    strides = (x.stride(2), x.stride(1), x.stride(0))
    return TensorMap(x, (width, tokens, heads, batch), strides, (64, rows, 1, 1))


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, valid: Tensor | None, x: Tensor,
    sums: Tensor | None, stream: Stream, cut: Heads, *, ahead: Tensor | None = None,
    compile_only: bool = False,
) -> None:  # fmt: skip
    """`out` [N, H·K] ← softmax(q·kᵀ/√K)·v over the real tokens of each sample.

    Args:
        q: [B, H, T, K], the last axis dense; k, v: [B, G, T, K]. Each row of q and k has at most
            the norm √K.
        valid: [B] int32, real text tokens of each sample; None: all.
        x: the trunk [N, D], dense, and `sums` [B, 2, D] ← its column sums by segment; None: not
            needed.
        ahead: weights that are needed next, dense, for the L2 cache to fetch.
    """
    masked = stream.is_padded or valid is not None
    if compile_only:
        _kernel(cut, q.shape[2], masked, False, q.device.index or 0)
        return
    launch(q, k, v, out, None, valid, stream.layout[:3], cut, masked, x, sums, ahead)


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, valid: Tensor | None,
    layout: tuple[int, int, int], cut: Heads, masked: bool, x: Tensor | None = None,
    sums: Tensor | None = None, ahead: Tensor | None = None,
) -> None:  # fmt: skip
    """As `attention`; `lse` [B, H, T] fp32 ← the natural log-sum-exp of the scores, by three
    warpgroups only, and then a wait in vain ends the program. `layout` is image and text tokens and
    rows of the image."""
    batch, heads, rows, _ = q.shape
    found = _kernel(cut, rows, masked, lse is not None, q.device.index or 0)
    queries = _queries(cut, rows)
    blocks = batch * heads * -(-rows // queries)
    tasks = 0 if sums is None or x is None else batch * x.shape[1] // 16
    free = found.most_clusters - blocks
    beside = min(tasks, free) if free > 0 else -(-tasks // _TASKS)
    keys = rows // _parts(cut, rows)
    numbers = (out.stride(0) * out.element_size(), heads, heads // k.shape[1], blocks)
    found.launch(
        blocks + beside,
        (
            box(q, _TILE if cut.groups == 3 else min(queries, keys)), box(k, keys), box(v, keys),
            out, *map(ctypes.c_int, numbers), ctypes.c_float(SCALE), valid,
            *map(ctypes.c_int, layout), x, sums, ctypes.c_int(0 if x is None else x.shape[1]),
            *to_fetch(ahead), *([lse] if cut.groups == 3 else []),
        ),
        pdl=cut.pdl,
    )  # fmt: skip
