"""The merge with means on Hopper, each tensor read once: a candidate, timed by `merge_forms.py`.

A cluster of blocks has a segment of a sample at a time, whose rows stay in shared memory between
the pass that sums their columns and the pass that merges them: merge_forward.cu, merge_backward.cu.
Results are deterministic. The package does not use it: a first version of the forward was right and
faster on an H200, the next one hung there, and this one, in which no warp can miss what it waits
for, has not run yet.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.fused.merge_parts import Gradients, Merged, Weights
from mvsplit.kernels.hopper.driver import DriverError, Kernel, compiled

_logger = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_CLUSTERS = 40  # more than any device holds at once
_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
WIDTH = 1024  # D, the only one for which these kernels were made
_GAIN_THREADS = 128


@dataclass(frozen=True)
class Cut:
    """How a merge is cut up.

    Attributes:
        cluster: blocks that share a segment.
        slots: of shared memory that rows are loaded into.
        kept: slots that one segment may fill; what it has more is loaded twice.
        f_slots: of those backward that F passes through.
        rows: of a slot.
        appliers: warps of the second pass.
        preload: whether the second pass takes its first rows before it knows the means.
        pdl: whether the kernel starts before the one before it has ended, and then waits.
    """

    cluster: int = 8
    slots: int = 13
    kept: int = 13
    f_slots: int = 0
    rows: int = 4
    appliers: int = 4
    preload: bool = True
    pdl: bool = False

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


# Those of 16 blocks are for segments that 8 cannot keep.
FORWARD, BACKWARD = Cut(), Cut(slots=12, kept=12, f_slots=2, appliers=8)
LONG_FORWARD, LONG_BACKWARD = replace(FORWARD, cluster=16), replace(BACKWARD, cluster=16)


# A counter [1], int32, on the device where a wait without end is noted; None: it ends the program.
fault: Tensor | None = None


def _cut(short: Cut, long: Cut, lengths: list[int]) -> Cut:
    return short if max(lengths) <= short.cluster * short.rows * short.kept else long


def source(cut: Cut, dtype: torch.dtype, segments: int, counts: str) -> str:
    """The CUDA C++ of a kernel: backward where the cut has slots for F."""
    macros = {
        "D": WIDTH, "CLUSTER": cut.cluster, "ROWS": cut.rows, "SLOTS": cut.slots,
        "KEPT": cut.kept, "F_SLOTS": cut.f_slots, "APPLY_WARPS": cut.appliers,
        "PRELOAD": int(cut.preload), "TYPE": f'"{_NAMES[dtype]}"',
        "BF16": int(dtype == torch.bfloat16), "SEGMENTS": segments, "CLUSTERS": _CLUSTERS,
        "VALID": counts, "SHARED": cut.shared,
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    files = ("merge_common.cu", f"merge_{'backward' if cut.f_slots else 'forward'}.cu")
    return "\n".join((head, *((_FOLDER / name).read_text() for name in files)))


@cache
def _kernels(
    cut: Cut, dtype: torch.dtype, segments: int, counts: str, device: int
) -> tuple[Kernel, ...]:
    """The kernel of a direction and, backward, the one that adds up the gradients of the gains."""
    binary = compiled(source(cut, dtype, segments, counts), cache_folder() / "cuda")
    name = "split_merge_backward" if cut.f_slots else "split_merge_forward"
    first = Kernel(binary, name, threads=32 * cut.warps, shared=cut.shared, cluster=cut.cluster)
    if not cut.f_slots:
        return (first,)
    return first, Kernel(binary, "split_merge_gains", threads=_GAIN_THREADS, shared=0, cluster=1)


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


def obstacle(x: Tensor, f: Tensor | None, found: Merged) -> str | None:
    """Why these kernels cannot serve, if so.

    Args:
        x: [B, T, D], X or the upstream gradient.
        f: None where no gain learns.
        found: the results of the forward, filled or not.
    """
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return "clusters need a Hopper GPU"
    if x.dtype not in _NAMES or x.shape[-1] != WIDTH:
        return f"clusters take bf16 and fp16 with D = {WIDTH}"
    if f is None or found.r.numel() == 0 or found.mean_x.numel() == 0:
        return "clusters take a merge with a norm, a leak and gains that learn"
    if any(t.data_ptr() % 16 or t.stride(0) % 8 or t.stride(1) % 8 for t in (x, f)):
        return "clusters take rows at multiples of 16 bytes"
    if x.shape[0] >= 1 << 16:
        return "clusters take fewer than 65,536 samples"
    return _missing(x.device.index or 0)


@cache
def _missing(device: int) -> str | None:
    """What the device or the installation lacks; said once, as a warning."""
    cuts = (FORWARD, LONG_FORWARD, BACKWARD, LONG_BACKWARD)
    try:
        fits = [_kernels(cut, torch.bfloat16, 1, "int", device)[0].most_clusters for cut in cuts]
    except (DriverError, OSError) as error:
        _logger.warning("the merge in clusters cannot be compiled here: %s", error)
        return "clusters cannot be compiled"
    return None if min(fits) else "no cluster fits on the device"


def _counts(valid: Tensor | None) -> str:
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
    cut, counts = _cut(FORWARD, LONG_FORWARD, lengths), _counts(valid)
    (kernel,) = _kernels(cut, x.dtype, len(lengths), counts, x.device.index or 0)
    clusters = _clusters(kernel, batch, lengths)
    arguments = (
        x, f, out.y, out.r, valid, out.mean_f, out.mean_x, *_gains(gains), *_strides(x, f),
        _layout(batch, tuple(lengths), clusters), ctypes.c_int(total), ctypes.c_float(eps), fault,
    )  # fmt: skip
    kernel.launch(clusters, arguments, pdl=cut.pdl)


def backward(
    grad: Tensor, f: Tensor, found: Merged, out: Gradients, gains: Weights,
    valid: Tensor | None, lengths: list[int],
) -> None:  # fmt: skip
    """Fills `out` from what a forward has `found`."""
    batch, total, width = grad.shape
    cut, counts = _cut(BACKWARD, LONG_BACKWARD, lengths), _counts(valid)
    kernel, adder = _kernels(cut, grad.dtype, len(lengths), counts, grad.device.index or 0)
    clusters = _clusters(kernel, batch, lengths)
    share = torch.empty(clusters, 3, width, dtype=torch.float32, device=grad.device)
    arguments = (
        grad, found.y, f, found.r, valid, found.mean_f, found.mean_x, out.x, out.f, share,
        *_gains(gains), *_strides(grad, f), _layout(batch, tuple(lengths), clusters),
        ctypes.c_int(total), fault,
    )  # fmt: skip
    kernel.launch(clusters, arguments, pdl=cut.pdl)
    halves = sum(1 << i for i, g in enumerate(out[2:]) if g.element_size() == 2)
    numbers = map(ctypes.c_int, (halves, clusters, gains.tied))
    adder.launch(width // _GAIN_THREADS, (share, *out[2:], *numbers), pdl=True)
