"""Attention of short samples on Hopper (attention.cu): all keys and values of a head in shared
memory, the scores of 64 queries in registers.

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
_FOLDER = Path(__file__).parent
_TILE = 64  # queries of a warpgroup
_TASKS = 2  # of sums, that a block beside the others does


@dataclass(frozen=True)
class Heads:
    """How attention is cut up: two warpgroups of a block share a whole head, one takes 64 queries.

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
    return rows if cut.groups == 2 else _TILE


def _parts(rows: int) -> int:
    """In which the keys are taken, so that a product has at most 256 columns."""
    return 1 if rows <= 160 else 2


def suits(stream: Stream, width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can do heads `width` wide of a stream."""
    return dtype == torch.bfloat16 and width == HEAD and stream.sample_rows <= MOST_ROWS


def source(cut: Heads, rows: int, masked: bool) -> str:
    """The CUDA C++ of a kernel for samples of `rows` rows."""
    parts, queries = _parts(rows), _queries(cut, rows)
    macros = {
        "TOK": rows, "NI": parts, "NT": rows // parts, "WG": cut.groups, "QUERIES": queries,
        "PARTS": -(-rows // queries), "QBOX": min(queries, rows // parts), "MASKED": int(masked),
        "TYPE": '"bf16"', "BF16": 1,
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    files = ("base.cu", "common.cu", "attention.cu")
    *common, kernel = ((_FOLDER / file).read_text() for file in files)
    products = (
        multiply("multiply", rows // parts, "bf16"),
        multiply("weigh", HEAD, "bf16", registers=True, transposed=True),
    )
    return "\n".join((head, *common, *products, kernel))


def _shared_bytes(cut: Heads, rows: int) -> int:
    return 2 * 128 * (_queries(cut, rows) + 2 * rows) + 8 * (_parts(rows) + 1)


@cache
def _kernel(cut: Heads, rows: int, masked: bool, device: int) -> Kernel:
    binary = compiled(source(cut, rows, masked), cache_folder() / "cuda")
    threads, shared = 128 * cut.groups, _shared_bytes(cut, rows)
    return Kernel(binary, "attention", threads=threads, shared=shared, cluster=1)


def _map(x: Tensor, rows: int) -> TensorMap:
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
    batch, heads, rows, _ = q.shape
    masked = stream.is_padded or valid is not None
    kernel = _kernel(cut, rows, masked, q.device.index or 0)
    if compile_only:
        return
    queries = _queries(cut, rows)
    blocks = batch * heads * -(-rows // queries)
    tasks = 0 if sums is None else batch * x.shape[1] // 16
    free = kernel.most_clusters - blocks
    beside = min(tasks, free) if free > 0 else -(-tasks // _TASKS)
    keys = rows // _parts(rows)
    numbers = (out.stride(0) * out.element_size(), heads, heads // k.shape[1], blocks)
    kernel.launch(
        blocks + beside,
        (
            _map(q, min(queries, keys)), _map(k, keys), _map(v, keys), out,
            *map(ctypes.c_int, numbers), ctypes.c_float(math.log2(math.e) / math.sqrt(HEAD)), valid,
            *map(ctypes.c_int, stream.layout[:3]), x, sums, ctypes.c_int(x.shape[1]),
            *to_fetch(ahead),
        ),
        pdl=cut.pdl,
    )  # fmt: skip
