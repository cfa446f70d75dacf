"""Products of a block in training on Hopper with what follows them in the same kernel
(block_product.cu).

    up     (gate, value) = Y·W13ᵀ and H = silu(gate)⊙value
    down   dH = dF·W2; from it and (gate, value) their gradients, and H once more
    heads  X·W_QKVᵀ, its queries and keys turned, then normalised

(gate, value) is rounded before H is made of it, so that whoever has kept it finds the same H. dH
may be rounded (`Cut.beside`) but never leaves the registers; queries and keys are not rounded
before they are turned. All read the weights where they lie, [out, in]; sums are in fp32, outputs
are rounded once; results are deterministic. A wait that does not end within seconds ends the
program (`driver.ended_by_a_wait`).

Shapes: B batch, T tokens, N rows (tokens of all samples), D width, F hidden width of the FFN, H
query heads, G key/value heads, K = 128 head width.
"""

from __future__ import annotations

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.hopper.driver import DriverError, Kernel, TensorMap, compiled
from mvsplit.kernels.hopper.wgmma import multiply

UP, DOWN, HEADS = range(3)
HEAD = 128
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_FOLDER = Path(__file__).parent
_DEPTH = 64  # of a step along K, and rows of a warpgroup
_SHARED = 232_448  # bytes that a block may have
_ENTRIES = ("block_product_up", "block_product_down", "block_product_heads")
_SLOT, _SLOTS = 2048, (2, 5, 2)  # bytes of 16 rows of 64 columns; of a warp, by product


@dataclass(frozen=True)
class Cut:
    """How a product is cut up.

    Attributes:
        columns: of a tile; of `up` half of them gates, and their values.
        groups: warpgroups that multiply, of 64 rows each.
        stages: steps that load at once.
        cluster: blocks that share the loading of weights, 1 or 2.
        beside: whether what follows the sums of a tile is done beside the products of the next one,
            not only beside those of another warpgroup; not of `heads`. dH is rounded then.
    """

    columns: int = 256
    groups: int = 2
    stages: int = 4
    cluster: int = 1
    beside: bool = False

    @property
    def rows(self) -> int:
        return _DEPTH * self.groups


# The fastest on a machine serves (`block_product_choice`); the last of each is the plainest.
CUTS = {
    UP: (
        Cut(256, 2, 4, 2, beside=True), Cut(256, 2, 4, 1, beside=True), Cut(256, 2, 4, 2),
        Cut(256, 2, 4, 1),
    ),
    DOWN: (
        Cut(256, 2, 3, 2, beside=True), Cut(256, 2, 3, 1, beside=True), Cut(256, 2, 3, 2),
        Cut(128, 2, 4, 2), Cut(256, 2, 3, 1),
    ),
    HEADS: (Cut(256, 2, 4, 2), Cut(128, 3, 4, 2), Cut(256, 2, 4, 1)),
}  # fmt: skip


def width_of(cut: Cut, which: int) -> int:
    """Columns of H, or of heads, in a tile."""
    return cut.columns // 2 if which == UP else cut.columns


def columns_of(which: int, w: Tensor) -> int:
    """Columns of H, or of heads, that weights make: W13 [2F, D], W2 [D, F] or W_QKV."""
    return w.shape[1] if which == DOWN else w.shape[0] // (2 if which == UP else 1)


def obstacle(which: int, x: Tensor, w: Tensor, packed: Tensor | None = None) -> str | None:
    """Why no kernel takes such inputs, if so.

    Args:
        which: UP, DOWN or HEADS.
        x: [N, D], Y, dF or X.
        w: W13 [2F, D], W2 [D, F] or W_QKV [(H + 2G)·K, D].
        packed: (gate, value) [N, 2F] of `down`.
    """
    tensors = [t for t in (x, w, packed) if t is not None]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return "it needs a Hopper GPU"
    if x.dtype not in NAMES or any(t.dtype != x.dtype for t in tensors):
        return "it takes bf16 and fp16, of all alike"
    width, columns = x.shape[1], columns_of(which, w)
    steps = sorted({width_of(cut, which) for cut in CUTS[which]})
    if width % _DEPTH or not columns or all(columns % step for step in steps):
        return (
            f"it takes a width that is a multiple of {_DEPTH} and as many columns as are a "
            f"multiple of {' or '.join(map(str, steps))}, not {width} and {columns}"
        )
    if any(t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16 for t in tensors):
        return "it takes rows at multiples of 16 bytes"
    return None


def source(cut: Cut, which: int, width: int, dtype: torch.dtype) -> str:
    """The CUDA C++ of a kernel for a product along `width` columns."""
    name = NAMES[dtype]
    workers, loader = _registers(cut)
    macros = {
        "KIND": which, "WG": cut.groups, "COLUMNS": cut.columns, "STAGES": cut.stages,
        "CLUSTER": cut.cluster, "BESIDE": int(cut.beside), "KS": width // _DEPTH,
        "SLOTS": _SLOTS[which],
        "WORKER_REGISTERS": workers, "LOADER_REGISTERS": loader, "TRAP": 1,
        "TYPE": f'"{name}"', "BF16": int(name == "bf16"),
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    files = ("base.cu", "common.cu", "block_tile.cu", "block_finish.cu", "block_product.cu")
    *common, finish, kernel = ((_FOLDER / file).read_text() for file in files)
    product = multiply("multiply", cut.columns, name, transposed=which == DOWN)
    named = kernel.replace("\nblock_product(", f"\n{_ENTRIES[which]}(")
    return "\n".join((head, *common, finish, product, named))


def shared_bytes(cut: Cut, which: int) -> int:
    """Of one block."""
    warps = 4 * cut.groups
    stages = cut.stages * 128 * (cut.rows + cut.columns)
    barriers = 16 * cut.stages + (16 * warps if which == DOWN else 0)
    return stages + warps * _SLOTS[which] * _SLOT + barriers


def _registers(cut: Cut) -> tuple[int, int]:
    """Of a thread that multiplies, and of one that loads, as in `product`."""
    return (232, 40) if cut.groups < 3 else (160, 32)


@cache
def _kernel(cut: Cut, which: int, width: int, dtype: torch.dtype, device: int) -> Kernel:
    shared, threads = shared_bytes(cut, which), 128 * (cut.groups + 1)
    if shared > _SHARED:
        raise DriverError(f"{cut} needs {shared} bytes of shared memory, a block has {_SHARED}")
    binary = compiled(source(cut, which, width, dtype), cache_folder() / "cuda")
    kernel = Kernel(
        binary,
        _ENTRIES[which],
        threads=threads,
        shared=shared,
        cluster=cut.cluster,
        device=device,
    )
    workers, loader = _registers(cut)
    if kernel.registers * threads < 128 * (cut.groups * workers + loader):
        raise DriverError(f"{cut} begins with {kernel.registers} registers a thread, too few")
    return kernel


def compile_all(cuts: list[Cut], which: int, width: int, dtype: torch.dtype) -> None:
    """Compiles kernels at once, one for each cut; one that does not compile says so when it is to
    run."""

    def build(cut: Cut) -> None:
        with suppress(DriverError):
            compiled(source(cut, which, width, dtype), cache_folder() / "cuda")

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, cuts))


def _map(x: Tensor, rows: int) -> TensorMap:
    """Of a matrix, by boxes of 64 columns."""
    return TensorMap(x, (x.shape[1], x.shape[0]), (x.stride(0),), (_DEPTH, rows))


class Turns(NamedTuple):
    """What turns and normalises heads: tables [T, K/2] in fp32, how many heads of all, ε."""

    cos: Tensor
    sin: Tensor
    heads: int
    eps: float


_NO_TURNS = (None, None, None, ctypes.c_int(1), ctypes.c_int(0), ctypes.c_float(0.0))


def _launch(
    which: int, x: Tensor, w: Tensor, out: Tensor, cut: Cut, *, packed: Tensor | None = None,
    hidden: Tensor | None = None, turns: tuple = _NO_TURNS,
) -> None:  # fmt: skip
    """`packed`, `out` and `hidden` by boxes of a warp's 16 rows; a map of `out` where there is none
    of the others."""
    rows, width = x.shape
    kernel = _kernel(cut, which, width, x.dtype, x.device.index or 0)
    columns = columns_of(which, w)
    n_columns = columns // width_of(cut, which)
    tiles = math.ceil(rows / cut.rows / cut.cluster) * n_columns
    weight_rows = _DEPTH // cut.cluster if which == DOWN else cut.columns // 2
    arguments = (
        _map(x, cut.rows), _map(w, weight_rows),
        *(_map(out if t is None else t, 16) for t in (packed, out, hidden)),
        *map(ctypes.c_int, (hidden is not None, rows, columns, n_columns, tiles)), *turns,
    )  # fmt: skip
    kernel.launch(min(tiles, kernel.most_clusters), arguments, pdl=False)


def up(y: Tensor, w13: Tensor, *, hidden: bool = True, cut: Cut) -> tuple[Tensor, Tensor | None]:
    """(gate, value) [N, 2F], and H [N, F] if it is wanted.

    Args:
        y: [N, D].
        w13: [2F, D], gates first.
    """
    rows, columns = y.shape[0], w13.shape[0]
    packed = torch.empty(rows, columns, dtype=y.dtype, device=y.device)
    found = torch.empty(rows, columns // 2, dtype=y.dtype, device=y.device) if hidden else None
    if rows:
        _launch(UP, y, w13, packed, cut, hidden=found)
    return packed, found


def down(df: Tensor, w2: Tensor, packed: Tensor, *, cut: Cut) -> tuple[Tensor, Tensor]:
    """The gradient of (gate, value) [N, 2F], and H [N, F].

    Args:
        df: [N, D], the gradient of F = H·W2ᵀ.
        w2: [D, F].
        packed: (gate, value) [N, 2F].
    """
    rows, columns = packed.shape
    grad = torch.empty(rows, columns, dtype=df.dtype, device=df.device)
    hidden = torch.empty(rows, columns // 2, dtype=df.dtype, device=df.device)
    if rows:
        _launch(DOWN, df, w2, grad, cut, packed=packed, hidden=hidden)
    return grad, hidden


def heads(x: Tensor, w_qkv: Tensor, turns: Turns, *, cut: Cut) -> tuple[Tensor, Tensor]:
    """Queries, keys and values side by side, [N, (H + 2G)·K], and the 1/RMS of queries and keys
    [N, H + G] in fp32.

    Args:
        x: [N, D], whole samples.
        w_qkv: [(H + 2G)·K, D].
        turns: of H + G heads; dense tables.
    """
    rows = x.shape[0]
    out = torch.empty(rows, w_qkv.shape[0], dtype=x.dtype, device=x.device)
    inverse = torch.empty(rows, turns.heads, dtype=torch.float32, device=x.device)
    if rows:
        numbers = ctypes.c_int(len(turns.cos)), ctypes.c_int(turns.heads), ctypes.c_float(turns.eps)
        given = (turns.cos, turns.sin, inverse, *numbers)
        _launch(HEADS, x, w_qkv, out, cut, turns=given)
    return out, inverse
