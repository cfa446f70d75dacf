"""How long the kernels of a block take beside its matrix products, as measured on an NVIDIA H200.

Where the constants come from (files of benchmarks/results):

| constant | from |
|---|---|
| `attention` | cuDNN's, `reference_h200`: from 320 to 512 tokens it grows with the tokens, not with their square |
| `rounded` | the same, `step_classes_h200`: a sample of 288 tokens takes as long as one of 320 |
| `merge` | `fused_ops_h200_…_merge`, and for two launches, which serve below 8,192 tokens, the profiles of `step_classes_h200` |
| `passes` | the other element-wise kernels: bytes that have to move, times what such a profile took more |
| `fused` | each size as it was measured, between them a line, beyond them in proportion; no third size says how good that is. In a product: `ffn_products_h200_2026-11-30T1341`, the best form less the library's product alone, less than nothing as nothing. In gradients of attention: at 8,320 tokens `step_classes_h200_2026-11-30T1343`, those that go on to the projection less those that do not; at 4,608 of two runs, 13:43 less 08:46 |
| `own` | `step_classes_h200_2026-11-30T0846`: attention in CUDA C++, of FLOPs without padding to `rounded` |
| `forward`, `backward`, `again` | counts of it |

Those of `FIRST` are from the profile of `train_step_eager_h200` and `fused_ops_merge_h200_2026-11-22`.

Shapes: n tokens of a piece. Units: seconds.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mvsplit.kernels.block_parts import Recompute
from mvsplit.models import DiTConfig
from mvsplit.training.gpus import Gpu
from mvsplit.training.step_memory import runs_as_one_node

COPY = 4.25e12  # bytes/s of the GPU that all of this was measured on
Passes = Mapping[str, tuple[float, float]]
Kind = tuple[str, str]  # a name of `passes`, a direction
Rows = Sequence[tuple[int, float]]  # n, seconds
# What kernels that do what follows them take (`block_product_choice`, `unit_heads`).
WIDTHS, COLUMNS, HEAD = 64, 128, 128
# Where they were timed and faster than libraries: W_QKV's with rotation was not at 4,608 rows.
FEWEST_ROWS = {"swiglu": 4000, "rotation": 8000}
MOST_TOKENS, TOKENS = 320, (32, 48)
MEASURED = {"swiglu": 3072, "rotation": 1024}  # F, D


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Of one state of this package.

    Attributes:
        attention: by direction, for each token of D = 1024, and FLOP/s of long samples (T = 512).
        rounded: what the tokens of a sample count as a multiple of, in attention.
        merge: n at D = 1024, forward and backward of one merge with means.
        apart: the same where clusters do not serve: another D, fp32, another kind of GPU.
        passes: by kind and direction, passes over [n, D] or [n, F] in bf16, and the time over that
            of a copy of as many bytes.
        fused: what is left of some passes where the kernel before them does them, on Hopper, by
            n at the width of `MEASURED`.
        own: by direction, FLOP/s of attention where kernels of ours serve, on Hopper.
        forward, backward: how many kernels there are.
        again: how many of them backward runs again, by level.
    """

    attention: Passes
    rounded: int
    merge: Sequence[tuple[int, float, float]]
    apart: Sequence[tuple[int, float, float]]
    passes: Mapping[str, Passes]
    forward: int
    backward: int
    again: Mapping[Recompute, int]
    fused: Mapping[Kind, Rows] = field(default_factory=dict)
    own: Mapping[str, float] = field(default_factory=dict)


_ONE_LAUNCH = (
    (288, 8.0e-6, 11.4e-6),
    (8320, 41.0e-6, 46.9e-6),
    (20480, 57.4e-6, 82.3e-6),
    (32768, 85.1e-6, 125.0e-6),
)
_TWO_LAUNCHES = ((288, 6.3e-6, 10.5e-6), (4608, 22.3e-6, 38.1e-6), (8191, 32.7e-6, 49.7e-6))
# Those of the runs before 2026-11-29.
FIRST = Kernels(
    attention={"forward": (4.2e-9, 501e12), "backward": (14.8e-9, 344e12)},
    rounded=64,
    merge=_ONE_LAUNCH,
    apart=_ONE_LAUNCH,
    passes={
        "scaled merge": {"forward": (3, 1.09), "backward": (5, 1.22)},
        "rotation": {"forward": (6, 1.20), "backward": (8, 1.30)},
        "swiglu": {"forward": (3, 1.07), "backward": (6, 1.02)},
        "other": {"forward": (2, 1.0), "backward": (5, 1.0)},
    },
    forward=11,
    backward=27,
    again={"nothing": 0, "packed": 1, "attention": 5, "trunk": 7, "all": 9},
)
# Of 2026-11-29: merges in clusters, queries and keys rotated in place, fewer fills.
APART = replace(
    FIRST,
    merge=(
        *_TWO_LAUNCHES,
        (8320, 21.6e-6, 31.2e-6),
        (20480, 41.8e-6, 67.3e-6),
        (32768, 61.4e-6, 104.0e-6),
    ),
    apart=(*_TWO_LAUNCHES, *_ONE_LAUNCH[2:]),
    passes={
        **FIRST.passes,
        "rotation": {"forward": (4, 1.45), "backward": (8, 1.38)},
        "swiglu": {"forward": (3, 1.08), "backward": (6, 1.02)},
        "other": {"forward": (1, 1.0), "backward": (2, 1.0)},
    },
    forward=9,
    backward=22,
    again={"nothing": 0, "packed": 1, "attention": 4, "trunk": 5, "all": 7},
)
# Since 2026-11-30: w13 with SwiGLU, w2's input gradient with SwiGLU's, W_QKV with rotation and
# QK-norm, and gradients of attention that go on to the projection.
KERNELS = replace(
    APART,
    fused={
        ("swiglu", "forward"): ((4608, 0.0), (8320, 0.0)),  # H is written beside the next tile's
        ("swiglu", "backward"): ((4608, 31.1e-6), (8320, 45.2e-6)),
        ("rotation", "forward"): ((8320, 8.2e-6),),
        ("rotation", "backward"): ((4608, 19.5e-6), (8320, 26.7e-6)),
    },
    own={"forward": 345e12, "backward": 205e12},
)


def served(
    kernels: Kernels, model: DiTConfig, precision: str, samples: int, length: int, gpu: Gpu
) -> dict[Kind, Rows]:
    """Those of `Kernels.fused` that a block of such samples has, were all found right and faster on
    the machine.

    Args:
        samples, length: of a piece, and tokens of each.
    """
    if not (kernels.fused and gpu.hopper and runs_as_one_node(model, precision)):
        return {}
    takes = {
        "swiglu": model.ffn_width % COLUMNS == 0,
        "rotation": model.head_width == HEAD,  # three matrices of whole heads, so of whole tiles
    }
    product = {
        name: taken and model.width % WIDTHS == 0 and samples * length >= FEWEST_ROWS[name]
        for name, taken in takes.items()
    }
    serves = {
        ("swiglu", "forward"): product["swiglu"],
        ("swiglu", "backward"): product["swiglu"],
        ("rotation", "forward"): product["rotation"],
        ("rotation", "backward"): bool(own_attention(kernels, model, precision, length, gpu)),
    }
    return {kind: left for kind, left in kernels.fused.items() if serves[kind]}


def own_attention(
    kernels: Kernels, model: DiTConfig, precision: str, length: int, gpu: Gpu
) -> Mapping[str, float]:
    """`Kernels.own` where it serves for samples of so many tokens, nothing elsewhere."""
    heads = model.head_width == HEAD and model.groups == model.heads and precision == "bf16"
    rows = length <= MOST_TOKENS and any(length % n == 0 for n in TOKENS)
    return kernels.own if gpu.hopper and heads and rows else {}
