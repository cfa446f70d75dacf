"""How long the kernels of a block take beside its matrix products, as measured on an NVIDIA H200.

Where the constants come from (files of benchmarks/results):

| constant | from |
|---|---|
| `attention` | cuDNN's, `reference_h200`: from 320 to 512 tokens it grows with the tokens, not with their square |
| `rounded` | the same, `step_classes_h200`: a sample of 288 tokens takes as long as one of 320 |
| `merge` | `fused_ops_h200_…_merge`, and for two launches, which serve below 8,192 tokens, the profiles of `step_classes_h200` |
| `passes` | the other element-wise kernels: bytes that have to move, times what such a profile took more |
| `forward`, `backward`, `again` | counts of it |

Those of `FIRST` are from the profile of `train_step_eager_h200` and `fused_ops_merge_h200_2026-11-22`.

Shapes: n tokens of a piece. Units: seconds.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mvsplit.kernels.block_parts import Recompute

COPY = 4.25e12  # bytes/s of the GPU that all of this was measured on
Passes = Mapping[str, tuple[float, float]]


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
        forward, backward: how many there are.
        again: how many of them backward runs again.
    """

    attention: Passes
    rounded: int
    merge: Sequence[tuple[int, float, float]]
    apart: Sequence[tuple[int, float, float]]
    passes: Mapping[str, Passes]
    forward: int
    backward: int
    again: Mapping[Recompute, int]


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
# Since then: merges in clusters, queries and keys rotated in place, fewer fills.
KERNELS = replace(
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
