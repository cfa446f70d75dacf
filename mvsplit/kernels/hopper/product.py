"""Products of the sampling engine on Hopper with what follows them fused in (product.cu).

    qkv      rotation and QK-norm
    swiglu   silu(gate)⊙value
    write    W_O and W_2 with the whole merge after them: Z = X + β⊙PF + α⊙JF − λ⊙JX, then RMSNorm
             (paper Eq. 7–8); a block holds all rows of a sample, so the means stay in it, and the
             blocks of a sample tell each other the norms

All read the weights where they lie, [out, in]. Sums are in fp32, outputs are rounded once.

Shapes: N rows of the stream, D width, H query heads, G key/value heads, F hidden width of the FFN.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.fused.common import gain_stride
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper.driver import Kernel, TensorMap, compiled
from mvsplit.kernels.reference import Gain, Gains

PLAIN, QKV, SWIGLU, WRITE = range(4)
_FOLDER = Path(__file__).parent
_DEPTH = 64  # of a step along K
_SHARED = 232_448  # bytes that a block may have
_CHUNK = 48  # tokens that are turned over at once on their way out


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
    stages: int = 4
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
        f'.m64n{tokens}k16.f32.{dtype}.{dtype} {{{registers}}}, %{n}, %{n + 1}, p, 1, 1, 0, 0; }}"'
        f' : {operands} : "l"(a), "l"(b), "r"(add));\n}}'
    )


def source(cut: Cut, kind: int, depth: int, image: int, dtype: torch.dtype) -> str:
    """The CUDA C++ of a kernel, for a product along `depth` columns of A."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    tokens = cut.tokens // cut.parts
    macros = {
        "TOK": cut.tokens, "NI": cut.parts, "NT": tokens, "WG": cut.groups,
        "CLUSTER": cut.cluster, "LOADERS": cut.loaders, "STAGES": cut.stages,
        "KS": math.ceil(depth / _DEPTH), "EPI": kind, "IMG": image, "TYPE": f'"{name}"',
        "BF16": int(name == "bf16"), "CHUNK": tokens if kind == WRITE else _CHUNK,
        "SCRATCH": _scratch(cut, kind), "TURN": _turn(cut.tokens),
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    files = ("base.cu", "common.cu", "product.cu")
    *common, kernel = ((_FOLDER / file).read_text() for file in files)
    return "\n".join((head, *common, _mma(tokens, name), kernel))


def _scratch(cut: Cut, kind: int) -> int:
    """Bytes beside the stages: rows on their way out, and before them sums."""
    columns = cut.columns // 2 if kind == SWIGLU else cut.columns
    staged = 0 if kind == WRITE else _CHUNK * (2 * columns + 16)
    warps = 4 * cut.groups
    sums = {QKV: cut.tokens * (warps + 1), SWIGLU: 64 * warps, WRITE: cut.tokens * (warps + 1)}
    return max(staged, 4 * sums.get(kind, 0))


def shared_bytes(cut: Cut, kind: int) -> int:
    """Of one block."""
    stage = 128 * (cut.columns + cut.tokens)
    return cut.stages * stage + _scratch(cut, kind) + 16 * cut.stages


def runs_on(weight: Tensor) -> bool:
    """Whether these kernels are for the device and the dtype of a weight."""
    return (
        weight.is_cuda
        and torch.cuda.get_device_capability(weight.device) == (9, 0)
        and weight.dtype in (torch.bfloat16, torch.float16)
    )


def suits(cut: Cut, kind: int, stream: Stream, weight: Tensor) -> bool:
    """Whether a kernel so cut can do a product with `weight` [out, in] on a stream: whole tiles of
    columns, tiles that begin where samples do, shared memory that is there. A writer's tile is a
    sample without padding between image and text, and all its blocks run at once."""
    if shared_bytes(cut, kind) > _SHARED or weight.shape[0] % (cut.columns * cut.cluster):
        return False
    if kind == WRITE:
        whole = stream.image == stream.image_rows and cut.tokens == stream.sample_rows
        blocks = weight.shape[0] // cut.columns * stream.batch
        processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
        return whole and cut.columns == 128 and weight.shape[0] <= 2048 and blocks <= processors
    if kind == QKV and (stream.sample_rows % cut.tokens or cut.groups != 2):
        return False
    return cut.tokens <= stream.rows and weight.shape[1] % 64 == 0


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
    trunk: Tensor | None = None, sums: Tensor | None = None, meeting: Meeting | None = None,
    compile_only: bool = False,
) -> None:  # fmt: skip
    image = stream.image_rows if kind == WRITE and stream is not None else 0
    kernel = _kernel(cut, kind, a.shape[1], image, a.dtype, a.device.index or 0)
    if compile_only:
        return
    layout = stream.layout if stream is not None else (0, 0, 0, 1)
    n_w, n_tok = w.shape[0] // cut.columns, math.ceil(a.shape[0] / cut.tokens)
    tiles = n_w // cut.cluster * n_tok
    clusters = tiles if kind == WRITE else min(tiles, kernel.most_clusters)
    if kind == WRITE and clusters > kernel.most_clusters:
        raise RuntimeError(
            f"{clusters} clusters that meet, {kernel.most_clusters} fit on the device"
        )
    helpers = 0
    if sums is not None:  # one task for each 64 columns of each segment
        tasks = a.shape[1] // 64 * 2 * sums.shape[0]
        helpers = max(1, min(-(-tasks // cut.cluster), kernel.most_clusters - clusters))
    a_map = _rows_map(a, _box(cut))
    trunk_map = a_map if trunk is None else _rows_map(trunk, cut.tokens // 2)
    arguments = (
        _weight_map(w, cut, kind), a_map, trunk_map, out, ctypes.c_int(a.shape[0]),
        ctypes.c_int(n_w), ctypes.c_int(n_tok), ctypes.c_int(out.stride(0) * out.element_size()),
        *rotation, *gains, valid, *map(ctypes.c_int, layout[:3]), ctypes.c_int(clusters), a, sums,
        ctypes.c_int(a.shape[1]), *(meeting or (None, None)),
    )  # fmt: skip
    kernel.launch(clusters + helpers, arguments, pdl=cut.pdl)


class Meeting(NamedTuple):
    """Where the blocks that share rows put sums of squares, and count that they have: [D/128, N]
    and [B]. One serves all layers of a stream."""

    squares: Tensor
    arrived: Tensor


def meeting(stream: Stream, width: int, device: torch.device) -> Meeting:
    """A meeting place for writers of `width` columns."""
    return Meeting(
        torch.zeros(width // 128, stream.rows, device=device),
        torch.zeros(stream.batch, device=device, dtype=torch.int32),
    )


def plain(a: Tensor, w: Tensor, out: Tensor, cut: Cut, *, compile_only: bool = False) -> None:
    """`out` [N, columns] ← A·Wᵀ."""
    _run(a, w, out, cut, PLAIN, compile_only=compile_only)


def rotation_table(cos: Tensor, sin: Tensor) -> Tensor:
    """cos, sin [rows of a sample, K/2] as the kernel reads them: [K/2, rows/2] of (cos, sin, cos,
    sin) of two neighbouring rows."""
    both = torch.stack((cos, sin), -1).transpose(0, 1)
    return both.reshape(cos.shape[1], cos.shape[0] // 2, 4).float().contiguous()


def _turn(tokens: int) -> int:
    """Bytes of a staged row of the rotation's table: half a run of all banks more than a multiple,
    so that lanes of two rows read from different banks."""
    return -(-8 * tokens // 128) * 128 + 64


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


def swiglu(
    x: Tensor, w: Tensor, out: Tensor, sums: Tensor | None, valid: Tensor | None, stream: Stream,
    cut: Cut, *, compile_only: bool = False,
) -> None:  # fmt: skip
    """`out` [N, F] ← silu(gate)⊙value of X·W₁₃ᵀ; `sums` [B, 2, D] ← column sums of X by segment.

    Args:
        x: [N, D], dense, D a multiple of 64.
        w: [2F, D], gates first.
        sums: None where the merge that follows needs none.
        valid: [B] int32, real text tokens of each sample; None: all.
    """
    rows = (None, ctypes.c_int(stream.sample_rows), ctypes.c_int(0), ctypes.c_float(0.0))
    _run(
        x, w, out, cut, SWIGLU, rotation=rows, valid=valid, stream=stream, sums=sums,
        compile_only=compile_only,
    )  # fmt: skip


def write(
    a: Tensor, w: Tensor, x: Tensor, y: Tensor, gains: Gains, valid: Tensor | None, stream: Stream,
    eps: float, place: Meeting, cut: Cut, *, compile_only: bool = False,
) -> None:  # fmt: skip
    """`y` [N, D] ← the next trunk, from the trunk `x` and F = A·Wᵀ; it may be `x` itself.

    The blocks of a sample wait for each other. All fit on the device at once, which is checked; but
    where another such kernel runs beside this one, they may not. A wait ends after seconds, then
    with NaN.

    Args:
        a: [N, E].
        w: [D, E].
        valid: [B] int32, real text tokens of each sample; None: all.
        place: where the blocks of a sample meet, to know the norms of its rows.
        cut: its tokens are the rows of a sample.
    """
    full = (gains.beta, gains.alpha, gains.alpha if gains.leak is None else gains.leak)
    _run(
        a, w, y, cut, WRITE, rotation=(None, ctypes.c_int(2), ctypes.c_int(0), ctypes.c_float(eps)),
        gains=tuple(map(_gain, full)), valid=valid, stream=stream, trunk=x,
        meeting=place, compile_only=compile_only,
    )  # fmt: skip
