"""Products of the sampling engine on Hopper with what follows them fused in (product.cu).

    qkv      rotation and QK-norm
    swiglu   silu(gate)⊙value
    write    W_O and W_2 with the whole merge after them: Z = X + β⊙PF + α⊙JF − λ⊙JX, then RMSNorm
             (paper Eq. 7–8); a block holds all rows of a sample, so the means stay in it, and the
             blocks of a sample tell each other the norms
    part     W_O and W_2 in parts along K, for the merge of few rows: sums in fp32 and, beside them,
             their columns' sums by segment

All read the weights where they lie, [out, in], and can ask the L2 cache for those that are needed
after them (`ahead`, dense). Sums are in fp32, outputs are rounded once.

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
from mvsplit.kernels.fused.stream import CHUNK, Stream
from mvsplit.kernels.hopper.driver import DriverError, Kernel, TensorMap, compiled, to_fetch
from mvsplit.kernels.hopper.wgmma import multiply
from mvsplit.kernels.reference import Gain, Gains

PLAIN, QKV, SWIGLU, WRITE, PART = range(5)
_FOLDER = Path(__file__).parent
_EPILOGUES = ("epilogue_qkv.cu", "epilogue_merge.cu", "epilogue.cu")
_DEPTH = 64  # of a step along K
_SLAB = 16  # columns of a task of sums (common.cu)
_SHARED = 232_448  # bytes that a block may have


@dataclass(frozen=True)
class Cut:
    """How a product is cut up on Hopper.

    Attributes:
        tokens: rows of A, of one block.
        parts: products along them.
        groups: warpgroups that multiply, of 64 output columns each.
        stages: steps that load at once.
        split: blocks that share a tile, each with a part of K (`part` only).
        pdl: whether the kernel starts before the one before it has ended.
    """

    tokens: int = 288
    parts: int = 2
    groups: int = 2
    stages: int = 4
    split: int = 1
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> Cut:
        return replace(self, pdl=pdl)

    @property
    def columns(self) -> int:
        """Weight rows of a block."""
        return 64 * self.groups


def _by_tokens(cut: Cut, kind: int) -> bool:
    """Whether warpgroups share the weight rows and have tokens of their own: then one of them alone
    knows the norm of a head."""
    return kind == QKV and cut.parts == cut.groups


def source(cut: Cut, kind: int, depth: int, image: int, dtype: torch.dtype, side: int = 1) -> str:
    """The CUDA C++ of a kernel, for a product along `depth` columns of A; `side` tokens are a row
    of the image, where they are to be turned."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    tokens = cut.tokens // cut.parts
    macros = {
        "TOK": cut.tokens, "W_ROWS": cut.columns, "NI": cut.parts, "NT": tokens, "WG": cut.groups,
        "BY_TOKENS": int(_by_tokens(cut, kind)),
        "STAGES": cut.stages, "SPLIT": cut.split, "KS": math.ceil(depth / _DEPTH / cut.split),
        "EPI": kind, "IMG": image, "TYPE": f'"{name}"', "BF16": int(name == "bf16"),
        "WORKER_REGISTERS": _registers(cut)[0], "LOADER_REGISTERS": _registers(cut)[1],
        "CHUNK": _chunk(cut, kind), "SCRATCH": _scratch(cut, kind), "SIDE": side,
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    files = ("base.cu", "common.cu", "tile.cu", *_EPILOGUES, "product.cu")
    *parts, kernel = ((_FOLDER / file).read_text() for file in files)
    return "\n".join((head, *parts, multiply("multiply", tokens, name), kernel))


def _chunk(cut: Cut, kind: int) -> int:
    """Tokens that are turned over at once on their way out."""
    if kind == SWIGLU:
        return 96 if cut.tokens % 96 == 0 else 48
    if kind == WRITE:
        return cut.tokens // cut.parts
    return 24 if _by_tokens(cut, kind) else 48


def _scratch(cut: Cut, kind: int) -> int:
    """Bytes beside the stages: rows on their way out, and before them sums."""
    if kind in (WRITE, PART):  # rows go out through the stages, or past shared memory
        staged = 0
    elif kind == SWIGLU:
        staged = cut.groups * _chunk(cut, kind) * 80
    else:
        shares = cut.groups if _by_tokens(cut, kind) else 1
        staged = shares * _chunk(cut, kind) * (2 * cut.columns + 16)
    warps = 4 * cut.groups
    sums = {QKV: cut.tokens * (warps + 1), WRITE: cut.tokens * (warps + 1)}
    return max(staged, 4 * sums.get(kind, 0))


def shared_bytes(cut: Cut, kind: int) -> int:
    """Of one block."""
    stage = 128 * (cut.columns + cut.tokens)
    beside = 4 * 3 * _SLAB if kind == SWIGLU else 0
    return cut.stages * stage + _scratch(cut, kind) + 16 * cut.stages + beside


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
    if shared_bytes(cut, kind) > _SHARED or cut.tokens % 16 or weight.shape[0] % cut.columns:
        return False
    if kind == WRITE:
        whole = stream.image == stream.image_rows and cut.tokens == stream.sample_rows
        blocks = weight.shape[0] // cut.columns * stream.batch
        processors = torch.cuda.get_device_properties(weight.device).multi_processor_count
        return whole and cut.columns == 128 and weight.shape[0] <= 2048 and blocks <= processors
    if kind in (QKV, PART) and stream.sample_rows % cut.tokens:
        return False
    if kind == QKV and cut.groups != 2:
        return False
    if kind == PART and weight.shape[1] % (_DEPTH * cut.split):
        return False
    return cut.tokens <= stream.rows and weight.shape[1] % 64 == 0


@cache
def _kernel(
    cut: Cut, kind: int, depth: int, image: int, dtype: torch.dtype, side: int, device: int
) -> Kernel:
    binary = compiled(source(cut, kind, depth, image, dtype, side), cache_folder() / "cuda")
    threads, shared = 128 * (cut.groups + 1), shared_bytes(cut, kind)
    kernel = Kernel(binary, "product", threads=threads, shared=shared, cluster=1, device=device)
    workers, loader = _registers(cut)
    if kernel.registers * threads < 128 * (cut.groups * workers + loader):
        raise DriverError(f"{cut} begins with {kernel.registers} registers a thread, too few")
    return kernel


def _registers(cut: Cut) -> tuple[int, int]:
    """Of a thread that multiplies, and of one that loads, once each has what it needs. In all a
    block must not ask for more than it begins with, or the device faults."""
    return (232, 40) if cut.groups < 3 else (160, 32)


def _rows_map(a: Tensor, tokens: int) -> TensorMap:
    """Of a matrix [rows, columns], by boxes of 64 columns."""
    return TensorMap(a, (a.shape[1], a.shape[0]), (a.stride(0),), (_DEPTH, tokens))


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
    side: int = 1, ahead: Tensor | None = None, compile_only: bool = False,
) -> None:  # fmt: skip
    image = stream.image_rows if kind == WRITE and stream is not None else 0
    kernel = _kernel(cut, kind, a.shape[1], image, a.dtype, side, a.device.index or 0)
    if compile_only:
        return
    layout = stream.layout if stream is not None else (0, 0, 0, 1)
    n_w, n_tok = w.shape[0] // cut.columns, math.ceil(a.shape[0] / cut.tokens)
    tiles = n_w * n_tok * cut.split
    if kind == WRITE and tiles > kernel.most_clusters:
        raise RuntimeError(f"{tiles} blocks that meet, {kernel.most_clusters} fit on the device")
    a_map = _rows_map(a, cut.tokens // 2)
    trunk_map = a_map if trunk is None else _rows_map(trunk, cut.tokens // 2)
    arguments = (
        _weight_map(w, cut, kind), a_map, trunk_map, out, ctypes.c_int(a.shape[0]),
        ctypes.c_int(n_w), ctypes.c_int(n_tok), ctypes.c_int(out.stride(-2) * out.element_size()),
        *rotation, *gains, valid, *map(ctypes.c_int, layout[:3]), a, sums,
        ctypes.c_int(w.shape[0] if kind == PART else a.shape[1]), *(meeting or (None, None)),
        *to_fetch(ahead),
    )  # fmt: skip
    kernel.launch(min(tiles, kernel.most_clusters), arguments, pdl=cut.pdl)


class Meeting(NamedTuple):
    """Where the blocks that share rows put sums of squares, each with the number of the launch, and
    count the launches: [D/128, N] and [B]. One serves all layers of a stream."""

    squares: Tensor
    launches: Tensor


def meeting(stream: Stream, width: int, device: torch.device) -> Meeting:
    """A meeting place for writers of `width` columns."""
    return Meeting(
        torch.zeros(width // 128, stream.rows, device=device, dtype=torch.int64),
        torch.zeros(stream.batch, device=device, dtype=torch.int32),
    )


def plain(a: Tensor, w: Tensor, out: Tensor, cut: Cut, *, compile_only: bool = False) -> None:
    """`out` [N, columns] ← A·Wᵀ."""
    _run(a, w, out, cut, PLAIN, compile_only=compile_only)


class Rotation(NamedTuple):
    """Turns of image tokens, as the kernel reads them: (cos, sin) of each place and channel,
    [places, K/2, 2], the first half of the channels by row, the others by column, of an image
    `side` wide."""

    table: Tensor
    side: int


def rotation(cos: Tensor, sin: Tensor, image: int, side: int) -> Rotation:
    """From cos, sin [rows of a sample, K/2], whose first `image` rows are an image `side` wide."""
    half, down = cos.shape[1] // 2, torch.arange(0, image, side, device=cos.device)
    across = torch.arange(side, device=cos.device)
    places = max(-(-image // CHUNK) * CHUNK // side + 1, side)
    table = cos.new_zeros(places, 2 * half, 2)
    for i, values in enumerate((cos, sin)):
        table[: len(down), :half, i] = values[down, :half]
        table[:side, half:, i] = values[across, half:]
    return Rotation(table.float().contiguous(), side)


def qkv(
    x: Tensor, w: Tensor, rotation: Rotation, out: Tensor, stream: Stream, heads: int,
    kv_heads: int, eps: float, cut: Cut, *, ahead: Tensor | None = None, compile_only: bool = False,
) -> None:  # fmt: skip
    """`out` [N, (H + 2G)·128] ← X·W_qkvᵀ with queries and keys rotated, then normalised.

    Args:
        x: [N, D].
        w: [(H + 2G)·128, D], rows of queries, then keys, then values.
        rotation: of the image; text is not turned.
        cut: two groups, a head.
    """
    turn = (
        rotation.table, ctypes.c_int(stream.sample_rows), ctypes.c_int(heads + kv_heads),
        ctypes.c_float(eps),
    )  # fmt: skip
    _run(
        x, w, out, cut, QKV, rotation=turn, stream=stream, side=rotation.side,
        ahead=ahead, compile_only=compile_only,
    )  # fmt: skip


def swiglu(
    x: Tensor, w: Tensor, out: Tensor, sums: Tensor | None, valid: Tensor | None, stream: Stream,
    cut: Cut, *, ahead: Tensor | None = None, compile_only: bool = False,
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
        ahead=ahead, compile_only=compile_only,
    )  # fmt: skip


def write(
    a: Tensor, w: Tensor, x: Tensor, y: Tensor, gains: Gains, valid: Tensor | None, stream: Stream,
    eps: float, place: Meeting, cut: Cut, *, ahead: Tensor | None = None,
    compile_only: bool = False,
) -> None:  # fmt: skip
    """`y` [N, D] ← the next trunk, from the trunk `x` and F = A·Wᵀ; it may be `x` itself.

    The blocks of a sample wait for each other. All fit on the device at once, which is checked; but
    where another such kernel runs beside this one, they may not (engines take turns for that). A
    wait ends after seconds, then with NaN, and `driver.check_waits` tells of it.

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
        meeting=place, ahead=ahead, compile_only=compile_only,
    )  # fmt: skip


def part_buffers(
    stream: Stream, width: int, cut: Cut, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`out` [split, N, D] and `partial` [split, B, tiles of a sample, 2, D] of `part`, in fp32."""
    tiles = stream.sample_rows // cut.tokens
    return (
        torch.empty(cut.split, stream.rows, width, device=device),
        torch.empty(cut.split, stream.batch, tiles, 2, width, device=device),
    )


def part(
    a: Tensor, w: Tensor, out: Tensor, partial: Tensor, valid: Tensor | None, stream: Stream,
    cut: Cut, *, ahead: Tensor | None = None, compile_only: bool = False,
) -> None:  # fmt: skip
    """`out` [split, N, D] ← A·Wᵀ in parts along K that add up to the branch's output F; `partial`
    ← the column sums of each, over the real rows of a segment that lie in one tile.

    Args:
        a: [N, E], E a multiple of 64 in each part.
        w: [D, E].
        valid: [B] int32, real text tokens of each sample; None: all.
        cut: whole tiles are a sample.
    """
    rows = (None, ctypes.c_int(stream.sample_rows), ctypes.c_int(0), ctypes.c_float(0.0))
    _run(
        a, w, out, cut, PART, rotation=rows, valid=valid, stream=stream, sums=partial,
        ahead=ahead, compile_only=compile_only,
    )  # fmt: skip
