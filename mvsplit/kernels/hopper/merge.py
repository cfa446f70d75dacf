"""The merge with means on Hopper, each tensor read once: merge_forward.cu, merge_backward.cu.

A cluster of blocks has a segment of a sample at a time, whose rows stay in shared memory between
the pass that sums their columns and the pass that merges them. Results are deterministic.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.fused.merge_parts import Gradients, Merged, Weights
from mvsplit.kernels.hopper.driver import Kernel, compiled

_FOLDER = Path(__file__).parent
_CLUSTERS = 40  # more than any device holds at once
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
WIDTH = 1024  # D, the only one for which these kernels were made
_GAIN_THREADS = 128


@dataclass(frozen=True)
class Cut:
    """How a merge is cut up.

    Attributes:
        cluster: blocks that share a segment.
        slots: of shared memory that rows are loaded into; what a segment has more is loaded twice.
        f_slots: of those backward that F passes through.
        rows: of a slot.
        appliers: warps of the second pass.
        alternate: whether every other cluster takes a sample's segments from the last to the first,
            so that not all of them read, and then write, at the same time.
        hints: whether the L2 cache is told to keep what is loaded twice, and nothing else: results
            are written as data that will not be read again.
    """

    cluster: int = 8
    slots: int = 13
    f_slots: int = 0
    rows: int = 4
    appliers: int = 4
    alternate: bool = False
    hints: bool = False

    @property
    def warps(self) -> int:
        """Of a block."""
        return self.appliers + WIDTH // 256 + 2 + (self.rows if self.f_slots else 0)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        row = 2 * WIDTH
        slots = self.rows * row * (2 * self.slots + self.f_slots)
        if self.f_slots:
            return slots + 16 * WIDTH + 8 * (self.rows + 3) * self.slots + 16 * self.f_slots + 256
        return slots + 12 * WIDTH + 16 * self.slots + 256


# Those of 16 blocks are for segments that 8 cannot keep. What they have else gives, on an H200 at
# 16 samples of 1024+256, 3 % forward and 4 to 6 % backward; forward hints give nothing.
FORWARD, BACKWARD = Cut(), Cut(slots=12, f_slots=2, appliers=8)
LONG_FORWARD = replace(FORWARD, cluster=16, alternate=True)
LONG_BACKWARD = replace(BACKWARD, cluster=16, alternate=True, hints=True)

# A counter [1], int32, on the device where a wait without end is noted; None: it ends the program.
fault: Tensor | None = None


def cut_for(direction: str, lengths: list[int]) -> Cut:
    """The cut of a direction, "forward" or "backward", for segments of such lengths."""
    short, long = {
        "forward": (FORWARD, LONG_FORWARD), "backward": (BACKWARD, LONG_BACKWARD)
    }[direction]  # fmt: skip
    return short if max(lengths) <= short.cluster * short.rows * short.slots else long


def source(cut: Cut, dtype: torch.dtype, segments: int, counts: str) -> str:
    """The CUDA C++ of a kernel: backward where the cut has slots for F."""
    macros = {
        "D": WIDTH, "CLUSTER": cut.cluster, "ROWS": cut.rows, "SLOTS": cut.slots,
        "F_SLOTS": cut.f_slots, "APPLY_WARPS": cut.appliers, "TYPE": f'"{NAMES[dtype]}"',
        "BF16": int(dtype == torch.bfloat16), "SEGMENTS": segments, "CLUSTERS": _CLUSTERS,
        "VALID": counts, "SHARED": cut.shared, "ALTERNATE": int(cut.alternate),
        "HINTS": int(cut.hints),
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    direction = "backward" if cut.f_slots else "forward"
    files = ("base.cu", "merge_common.cu", f"merge_{direction}.cu")
    return "\n".join((head, *((_FOLDER / name).read_text() for name in files)))


@cache
def kernels(
    cut: Cut, dtype: torch.dtype, segments: int, counts: str, device: int
) -> tuple[Kernel, ...]:
    """The kernel of a direction and, backward, the one that adds up the gradients of the gains."""
    binary = compiled(source(cut, dtype, segments, counts), cache_folder() / "cuda")
    name = "split_merge_backward" if cut.f_slots else "split_merge_forward"
    load = partial(Kernel, binary, device=device)
    first = load(name, threads=32 * cut.warps, shared=cut.shared, cluster=cut.cluster)
    if not cut.f_slots:
        return (first,)
    return first, load("split_merge_gains", threads=_GAIN_THREADS, shared=0, cluster=1)


@lru_cache(maxsize=256)
def shares(batch: int, lengths: tuple[int, ...], clusters: int) -> tuple[tuple[int, ...], ...]:
    """Which samples each cluster has of each segment: bounds [S][clusters + 1]. Long segments are
    dealt first, each to who has fewest tokens."""
    load = [0] * clusters
    counts = [[0] * clusters for _ in lengths]
    for s in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        for _ in range(batch):
            least = min(range(clusters), key=load.__getitem__)
            counts[s][least] += 1
            load[least] += lengths[s]
    return tuple(tuple(sum(row[:c]) for c in range(clusters + 1)) for row in counts)


class _Gain(ctypes.Structure):
    _fields_ = (
        ("p", ctypes.c_void_p), ("number", ctypes.c_float), ("stride", ctypes.c_int),
        ("half", ctypes.c_int),
    )  # fmt: skip


def _gains(gains: Weights) -> list[_Gain]:
    return [
        _Gain(None, value, 0, 0)
        if gain is None
        else _Gain(gain.data_ptr(), 0.0, stride, int(gain.element_size() == 2))
        for gain, value, stride in zip(gains.pointers, gains.values, gains.strides, strict=True)
    ]


@lru_cache(maxsize=256)
def _layout(batch: int, lengths: tuple[int, ...], clusters: int) -> Any:
    n = len(lengths)

    class Layout(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_int * n), ("first", ctypes.c_uint16 * (_CLUSTERS + 1) * n),
        )  # fmt: skip

    value = Layout()
    value.length[:] = lengths
    for s, bounds in enumerate(shares(batch, lengths, clusters)):
        value.first[s][: clusters + 1] = bounds
    return value


def counts_of(valid: Tensor | None) -> str:
    """The C++ type of counts of real tokens."""
    return "int" if valid is not None and valid.dtype == torch.int32 else "long long"


def _strides(*tensors: Tensor) -> list[Any]:
    return [ctypes.c_longlong(t.stride(i)) for t in tensors for i in (0, 1)]


def _clusters(kernel: Kernel, batch: int, lengths: list[int]) -> int:
    return min(batch * sum(n > 0 for n in lengths), kernel.most_clusters, _CLUSTERS)


def forward(
    x: Tensor, f: Tensor, out: Merged, gains: Weights, valid: Tensor | None, lengths: list[int],
    eps: float,
) -> None:  # fmt: skip
    """Fills `out`."""
    batch, total, _ = x.shape
    cut, counts = cut_for("forward", lengths), counts_of(valid)
    (kernel,) = kernels(cut, x.dtype, len(lengths), counts, x.device.index or 0)
    clusters = _clusters(kernel, batch, lengths)
    arguments = (
        x, f, out.y, out.r, valid, out.mean_f, out.mean_x, *_gains(gains), *_strides(x, f),
        _layout(batch, tuple(lengths), clusters), ctypes.c_int(total), ctypes.c_float(eps), fault,
    )  # fmt: skip
    kernel.launch(clusters, arguments, pdl=False)


def backward(
    grad: Tensor, f: Tensor | None, found: Merged, out: Gradients, gains: Weights,
    valid: Tensor | None, lengths: list[int],
) -> None:  # fmt: skip
    """Fills `out` from what a forward has `found`; `f` is None where no gain learns."""
    batch, total, width = grad.shape
    cut, counts = cut_for("backward", lengths), counts_of(valid)
    kernel, adder = kernels(cut, grad.dtype, len(lengths), counts, grad.device.index or 0)
    clusters = _clusters(kernel, batch, lengths)
    share = None
    if f is not None:
        share = torch.empty(clusters, 3, width, dtype=torch.float32, device=grad.device)
    arguments = (
        grad, found.y, f, found.r, valid, found.mean_f, found.mean_x, out.x, out.f, share,
        *_gains(gains), *_strides(grad, grad if f is None else f),
        _layout(batch, tuple(lengths), clusters), ctypes.c_int(total), fault,
    )  # fmt: skip
    kernel.launch(clusters, arguments, pdl=False)
    if share is not None:
        halves = sum(1 << i for i, g in enumerate(out[2:]) if g.element_size() == 2)
        numbers = map(ctypes.c_int, (halves, clusters, gains.tied))
        adder.launch(width // _GAIN_THREADS, (share, *out[2:], *numbers), pdl=True)
