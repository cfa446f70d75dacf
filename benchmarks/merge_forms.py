"""Claim: the merge with means takes fewest microseconds in the form that the package has.

Gate: every form agrees with the fp64 reference and repeats bit for bit. Then, at each size, the
median microseconds forward and backward of the package's merge and of two plain launches
(`merge_two_launches.py`), for each of a few choices of their tiles. The floor is that of fused_ops.
Rows are written as they are found.

    python benchmarks/merge_forms.py [--sizes 26,256,64 64,256,64] [--json FILE]

Cost: one GPU; about 40 s on an H200, half of it compiling. --device cpu checks the forms in small,
with TRITON_INTERPRET=1, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fused_ops
import merge_two_launches as two
import torch
import triton
from torch import Tensor

from mvsplit.kernels import Segments, forced_backend, split_merge
from mvsplit.kernels.fused import split_merge as package

SIZES = ((26, 256, 64), (64, 256, 64), (16, 1024, 256), (64, 256, 256), (1, 256, 32))
NAMES = {"means": two.MEANS, "forward": two.FORWARD, "sums": two.SUMS, "backward": two.BACKWARD}
FORMS: dict[str, dict[str, dict[str, int]] | None] = {
    "package": None,
    "two launches": {},
    "narrow slabs": {"means": {"columns": 32}, "backward": {"rows": 128}},
    "more warps": {"forward": {"warps": 16}, "backward": {"warps": 16}},
    "fewer warps": {"means": {"warps": 4}, "sums": {"tile": 2048, "warps": 4, "stages": 3}},
    "small tiles": {"forward": {"tile": 4096}, "backward": {"tile": 4096}},
    "no pipeline": {"sums": {"stages": 1}, "means": {"tile": 8192}},
    "short chunks": {"sums": {"rows": 16}, "backward": {"gains": 32}},
}
Merge = tuple[Callable[..., Any], Callable[..., Any]]


@contextmanager
def form(name: str) -> Iterator[Merge]:
    """The launches of a form, forward and backward, while its choices hold."""
    changes = FORMS[name]
    if changes is None:
        yield package._launch_forward, package._launch_backward
        return
    before = {key: dict(values) for key, values in NAMES.items()}
    for key, values in changes.items():
        NAMES[key].update(values)
    try:
        yield two.forward, two.backward
    finally:
        for key, values in before.items():
            NAMES[key].update(values)


def draw(size: tuple[int, int, int], width: int, device: str) -> list[Tensor]:
    """X, F and the upstream gradient [B, T, D] in bf16, β and α [D]."""
    batch, image, text = size
    tensors = [torch.randn(batch, image + text, width, device=device) for _ in range(3)]
    return [t.bfloat16() for t in tensors] + [torch.rand(width, device=device) for _ in range(2)]


def forward(merge: Merge, inputs: list[Tensor], lengths: list[int]) -> tuple[Tensor, ...]:
    x, f, _, beta, alpha = inputs
    return merge[0](x, f, beta, alpha, None, [0.0] * 3, True, None, lengths, 1e-5, True)


def backward(
    merge: Merge, inputs: list[Tensor], found: tuple[Tensor, ...], lengths: list[int]
) -> tuple[Tensor, ...]:
    """∂L/∂X, ∂L/∂F, ∂L/∂β, ∂L/∂α."""
    _, f, g, beta, alpha = inputs
    y, r, mean_f, mean_x = found
    settings = (beta, alpha, None, [0.0] * 3, True, None, lengths)
    return merge[1](g, y, f, r, mean_f, mean_x, *settings)[:4]


def gate(merge: Merge, inputs: list[Tensor], lengths: list[int]) -> float:
    """The largest ‖form − fp64‖/‖fp64‖ of the output and the gradients; infinite where the form
    does not repeat bit for bit, or gives NaN."""
    x, f, g, *gains = (t.double() for t in inputs)
    leaves = [t.requires_grad_() for t in (x, f, *gains)]
    with forced_backend("reference"):
        y = split_merge(*leaves, None, Segments(tuple(lengths)))
    truth = [y.detach(), *torch.autograd.grad(y, leaves, g)]
    first, *others = [_values(merge, inputs, lengths) for _ in range(4)]
    if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        return float("inf")
    errors = [float((v - t).norm() / t.norm()) for v, t in zip(first, truth, strict=True)]
    return max(float("inf") if e != e else e for e in errors)


def _values(merge: Merge, inputs: list[Tensor], lengths: list[int]) -> list[Tensor]:
    found = forward(merge, inputs, lengths)
    return [found[0], *backward(merge, inputs, found, lengths)]


def times(merge: Merge, size: tuple[int, int, int], width: int) -> tuple[float, float]:
    """Median microseconds (forward, backward) in CUDA graphs over inputs that exceed the L2."""
    case = fused_ops.merge_case(size)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(4, min(12, -(-4 * l2 // case.forward_bytes)))
    lengths = list(size[1:])
    inputs = [draw(size, width, "cuda") for _ in range(sets)]
    found = [forward(merge, each, lengths) for each in inputs]
    steps = (
        lambda i: forward(merge, inputs[i], lengths),
        lambda i: backward(merge, inputs[i], found[i], lengths),
    )
    one, other = (1e3 * fused_ops.graph_ms(step, sets) for step in steps)
    return one, other


def measure(
    name: str, size: tuple[int, int, int], device: str, bandwidth: float | None
) -> dict[str, Any]:
    batch, *lengths = size
    width = fused_ops.WIDTH if device == "cuda" else 40
    with form(name) as merge:
        few = (min(batch, 4), *size[1:])
        error = gate(merge, draw(few, width, device), lengths)
        row: dict[str, Any] = {"form": name, "size": size, "error": error}
        if not error < fused_ops.TOLERANCE:
            return row | {"failed": "gate"}
        if bandwidth is not None:
            case = fused_ops.merge_case(size)
            row["us"] = times(merge, size, width)
            row["floor_us"] = [
                1e6 * n / bandwidth for n in (case.forward_bytes, case.backward_bytes)
            ]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", help="samples,image,text tokens")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chosen = [tuple(map(int, size.split(","))) for size in args.sizes or ()] or SIZES
    report: dict[str, Any] = {"triton": triton.__version__, "torch": torch.__version__, "rows": []}
    bandwidth = None
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default one
        bandwidth = fused_ops.copy_bandwidth()
        report |= {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth}
    for size in chosen:
        for name in FORMS:
            row = measure(name, size, args.device, bandwidth)
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                partial = args.json.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n")
                os.replace(partial, args.json)


if __name__ == "__main__":
    main()
