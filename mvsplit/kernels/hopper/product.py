"""Products of the sampling engine on Hopper with what follows them fused in (product.cu).

    qkv      rotation and QK-norm
    swiglu   silu(gate)⊙value
    write    W_O and W_2 with the whole merge after them: Z = X + β⊙PF + α⊙JF − λ⊙JX, then RMSNorm
             (paper Eq. 7–8); the blocks of a cluster hold a sample, so means and norms stay in it

All read the weights where they lie, [out, in]. Sums are in fp32, outputs are rounded once.

Shapes: N rows of the stream, D width, H query heads, G key/value heads, F hidden width of the FFN.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.fused.common import gain_stride
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper.driver import Kernel, TensorMap, compiled
from mvsplit.kernels.reference import Gain, Gains

PLAIN, QKV, SWIGLU, WRITE = range(4)
_SOURCE = Path(__file__).with_name("product.cu")
_DEPTH = 64  # of a step along K
_SHARED = 232_448  # bytes that a block may have
_lock = threading.Lock()


@dataclass(frozen=True)
class Cut:
    """How a product is cut up on Hopper.

    Attributes:
        tokens: rows of A, of one block.
        parts: products along them.
        groups: warpgroups that multiply, of 64 output columns each.
        cluster: blocks that share their tokens.
        stages: steps that load at once.
        pdl: whether the kernel starts before the one before it has ended.
    """

    tokens: int = 288
    parts: int = 2
    groups: int = 2
    cluster: int = 2
    stages: int = 3
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> Cut:
        return replace(self, pdl=pdl)

    @property
    def loaders(self) -> int:
        """Blocks of a cluster that share the loading of a step: whole swizzled runs of 8 rows."""
        return max(n for n in (1, 2, 4, 8) if n <= self.cluster and self.tokens % (8 * n) == 0)

    @property
    def columns(self) -> int:
        """Weight rows of a block."""
        return 64 * self.groups


def _mma(tokens: int, dtype: str) -> str:
    """The function around wgmma, whose operands have to be written out."""
    n = tokens // 2
    registers = ", ".join(f"%{i}" for i in range(n))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return (
        f"__device__ __forceinline__ void multiply(float (&d)[{n}], u64 a, u64 b, int add) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{n + 2}, 0; wgmma.mma_async.sync.aligned'
        f".m64n{tokens}k16.f32.{dtype}.{dtype} {{{registers}}}, %{n}, %{n + 1}, p, 1, 1, 0, 0; }}\""
        f' : {operands} : "l"(a), "l"(b), "r"(add));\n}}'
    )


def source(cut: Cut, kind: int, depth: int, image: int, dtype: torch.dtype) -> str:
    """The CUDA C++ of a kernel, for a product along `depth` columns of A."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    macros = {
        "TOK": cut.tokens, "NI": cut.parts, "NT": cut.tokens // cut.parts, "WG": cut.groups,
        "CLUSTER": cut.cluster, "LOADERS": cut.loaders, "STAGES": cut.stages,
        "KS": math.ceil(depth / _DEPTH), "EPI": kind, "IMG": image, "TYPE": f'"{name}"',
        "BF16": int(name == "bf16"),
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    body = _SOURCE.read_text().replace("\nMMA\n", f"\n{_mma(cut.tokens // cut.parts, name)}\n")
    return head + body


def shared_bytes(cut: Cut, kind: int) -> int:
    """Of one block."""
    columns = cut.columns // 2 if kind == SWIGLU else cut.columns
    stage = 128 * (cut.columns + cut.tokens)
    staged = cut.tokens // cut.parts * (2 * columns + 16)
    sums = 4 * cut.tokens * (4 * cut.groups + 1 + (cut.cluster if kind == WRITE else 0))
    return cut.stages * stage + staged + sums + 16 * cut.stages


def fits(cut: Cut, kind: int) -> bool:
    """Whether a block's shared memory is there."""
    return shared_bytes(cut, kind) <= _SHARED


@cache
def _kernel(cut: Cut, kind: int, depth: int, image: int, dtype: torch.dtype, device: int) -> Kernel:
    binary = compiled(source(cut, kind, depth, image, dtype), cache_folder() / "cuda")
    return Kernel(
        binary, "product", threads=128 * (cut.groups + 1), shared=shared_bytes(cut, kind),
        cluster=cut.cluster,
    )  # fmt: skip


def _rows_map(a: Tensor, tokens: int) -> TensorMap:
    """Of a matrix [rows, columns], by boxes of 64 columns."""
    return TensorMap(a, (a.shape[1], a.shape[0]), (a.stride(0),), (_DEPTH, tokens))


def _box(cut: Cut) -> int:
    return cut.tokens // max(2, cut.loaders)


def _weight_map(w: Tensor, cut: Cut, kind: int) -> TensorMap:
    """Of the weight rows, in the order in which a tile wants them."""
    rows, k, s = *w.shape, w.stride(0)
    if kind == QKV:  # a head: 8 rows of its first half, 8 of its second, and so on
        head = cut.columns
        groups = head // 16
        return TensorMap(
            w, (k, 8, 2, groups, rows // head), (s, head // 2 * s, 8 * s, head * s),
            (_DEPTH, 8, 2, groups, 1),
        )  # fmt: skip
    if kind == SWIGLU:  # 8 gates, their 8 values, and so on
        return TensorMap(
            w, (k, 8, 2, rows // 16), (s, rows // 2 * s, 8 * s), (_DEPTH, 8, 2, 4 * cut.groups)
        )
    return TensorMap(w, (k, rows), (s,), (_DEPTH, cut.columns))


class _Gain(ctypes.Structure):
    _fields_ = (("p", ctypes.c_void_p), ("number", ctypes.c_float), ("stride", ctypes.c_int))


def _gain(gain: Gain) -> _Gain:
    if isinstance(gain, Tensor):
        return _Gain(gain.data_ptr(), 0.0, gain_stride(gain))
    return _Gain(None, float(gain), 0)


_NO_GAINS = (_gain(0.0),) * 3
_NO_ROTATION = (None, ctypes.c_int(2), ctypes.c_int(0), ctypes.c_float(0.0))


def _run(
    a: Tensor, w: Tensor, out: Tensor, cut: Cut, kind: int, *, rotation: tuple = _NO_ROTATION,
    gains: tuple = _NO_GAINS, valid: Tensor | None = None, stream: Stream | None = None,
    trunk: Tensor | None = None, compile_only: bool = False,
) -> None:  # fmt: skip
    image, text = (0, 0) if stream is None else (stream.image_rows, stream.text)
    image = image if kind == WRITE else 0
    kernel = _kernel(cut, kind, a.shape[1], image, a.dtype, a.device.index or 0)
    if compile_only:
        return
    n_w, n_tok = w.shape[0] // cut.columns, math.ceil(a.shape[0] / cut.tokens)
    tiles = n_w // cut.cluster * n_tok
    a_map = _rows_map(a, _box(cut))
    trunk_map = a_map if trunk is None else _rows_map(trunk, cut.tokens // 2)
    arguments = (
        _weight_map(w, cut, kind), a_map, trunk_map, out, ctypes.c_int(a.shape[0]),
        ctypes.c_int(n_w), ctypes.c_int(n_tok), ctypes.c_int(out.stride(0) * out.element_size()),
        *rotation, *gains, valid, ctypes.c_int(text),
    )  # fmt: skip
    clusters = tiles if kind == WRITE else min(tiles, kernel.most_clusters)
    kernel.launch(clusters, arguments, pdl=cut.pdl)


def plain(a: Tensor, w: Tensor, out: Tensor, cut: Cut, *, compile_only: bool = False) -> None:
    """`out` [N, columns] ← A·Wᵀ."""
    _run(a, w, out, cut, PLAIN, compile_only=compile_only)


def rotation_table(cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [rows, K/2] as the kernel reads them: [K/2, rows/2] of (cos, sin, cos, sin) of two
    neighbouring rows."""
    both = torch.stack((cos, sin), -1).transpose(0, 1)
    return both.reshape(cos.shape[1], cos.shape[0] // 2, 4).float().contiguous()


def qkv(
    x: Tensor, w: Tensor, rotation: Tensor, out: Tensor, stream: Stream, heads: int, kv_heads: int,
    eps: float, cut: Cut, *, compile_only: bool = False,
) -> None:  # fmt: skip
    """`out` [N, (H + 2G)·128] ← X·W_qkvᵀ with queries and keys rotated, then normalised.

    Args:
        x: [N, D].
        w: [(H + 2G)·128, D], rows of queries, then keys, then values.
        rotation: of `rotation_table`, for the rows of a sample.
        cut: two groups, a head.
    """
    turn = (
        rotation, ctypes.c_int(stream.sample_rows), ctypes.c_int(heads + kv_heads),
        ctypes.c_float(eps),
    )  # fmt: skip
    _run(x, w, out, cut, QKV, rotation=turn, compile_only=compile_only)


def swiglu(x: Tensor, w: Tensor, out: Tensor, cut: Cut, *, compile_only: bool = False) -> None:
    """`out` [N, F] ← silu(gate)⊙value of X·W₁₃ᵀ; `w` [2F, D] has the gates first."""
    _run(x, w, out, cut, SWIGLU, compile_only=compile_only)


def write(
    a: Tensor, w: Tensor, x: Tensor, y: Tensor, gains: Gains, valid: Tensor | None, stream: Stream,
    eps: float, cut: Cut, *, compile_only: bool = False,
) -> None:  # fmt: skip
    """`y` [N, D] ← the next trunk, from the trunk `x` and F = A·Wᵀ; it may be `x` itself.

    Args:
        a: [N, E].
        w: [D, E].
        valid: [B] int32, real text tokens of each sample; None: all.
        cut: its tokens are the rows of a sample, its cluster holds all D columns.
    """
    full = (gains.beta, gains.alpha, gains.alpha if gains.leak is None else gains.leak)
    _run(
        a, w, y, cut, WRITE, rotation=(None, ctypes.c_int(2), ctypes.c_int(0), ctypes.c_float(eps)),
        gains=tuple(map(_gain, full)), valid=valid, stream=stream, trunk=x, compile_only=compile_only,
    )  # fmt: skip
