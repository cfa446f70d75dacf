"""Claim: the merge with means takes fewest microseconds in the form that the package chooses.

Gate: every form agrees with the fp64 reference and repeats bit for bit, on memory full of NaN.
Then, at each size, the median microseconds forward and backward of each form, with other choices of
its tiles beside those of the package. The floor is that of fused_ops. Rows are written as they are
found.

    python benchmarks/merge_forms.py [--sizes 26,256,64 64,256,64] [--forms NAME …] [--json FILE]

Cost: one GPU; about 60 s on an H200, half of it compiling. --device cpu checks the forms in small,
with TRITON_INTERPRET=1, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fused_ops
import torch
import triton
from torch import Tensor

from mvsplit.kernels import Segments, forced_backend, split_merge
from mvsplit.kernels.fused import split_merge as package

SIZES = ((26, 256, 64), (29, 256, 32), (64, 256, 64), (16, 1024, 256), (64, 256, 256), (1, 256, 32))
CHOSEN = "as the package chooses"
Changes = dict[str, Any]

# A form of the package, and what it has otherwise; dictionaries are changed in the keys given.
FORMS: dict[str, tuple[str, Changes]] = {
    CHOSEN: ("", {}),
    "waiting": ("waiting", {}),
    "two launches": ("two launches", {}),
    "two launches, 32 columns": ("two launches", {"MEANS": {"columns": 32}}),
    "two launches, 2 warps": ("two launches", {"MEANS": {"warps": 2, "tile": 2048}}),
    "two launches, 4 rows": ("two launches", {"FORWARD": {"tile": 4096, "warps": 4}}),
    "two launches, short chunks": ("two launches", {"SUMS": {"rows": 16}}),
    "two launches, 4 stages": ("two launches", {"SUMS": {"stages": 4}}),
    "two launches, 32 rows": ("two launches", {"BACKWARD": {"rows": 32, "tile": 4096, "warps": 4}}),
}


@contextmanager
def form(name: str) -> Iterator[None]:
    """Has the package use a form."""
    served, changes = FORMS[name]
    if name == CHOSEN:
        yield
        return
    module, choose = package.FORMS[served], package.form_of
    before = {key: getattr(module, key) for key in changes}
    for key, value in changes.items():
        setattr(module, key, before[key] | value if isinstance(value, dict) else value)
    package.form_of = lambda x: served
    try:
        yield
    finally:
        package.form_of = choose
        for key, value in before.items():
            setattr(module, key, value)


def draw(size: tuple[int, int, int], width: int, device: str) -> list[Tensor]:
    """X, F and the upstream gradient [B, T, D] in bf16, β and α [D]."""
    batch, image, text = size
    tensors = [torch.randn(batch, image + text, width, device=device) for _ in range(3)]
    return [t.bfloat16() for t in tensors] + [torch.rand(width, device=device) for _ in range(2)]


def forward(inputs: list[Tensor], lengths: list[int]) -> tuple[Tensor, ...]:
    x, f, _, beta, alpha = inputs
    gains = (beta, alpha, None, [0.0] * 3, True)
    return package._launch_forward(x, f, *gains, None, lengths, 1e-5, True)


def backward(
    inputs: list[Tensor], found: tuple[Tensor, ...], lengths: list[int]
) -> tuple[Tensor, ...]:
    """∂L/∂X, ∂L/∂F, ∂L/∂β, ∂L/∂α."""
    _, f, g, beta, alpha = inputs
    y, *rest = found
    gains = (beta, alpha, None, [0.0] * 3, True)
    return package._launch_backward(g, y, f, *rest, *gains, None, lengths)[:4]


def gate(inputs: list[Tensor], lengths: list[int]) -> float:
    """The largest ‖form − fp64‖/‖fp64‖ of the output and the gradients; infinite where the form
    does not repeat bit for bit, or gives NaN."""
    x, f, g, *gains = (t.double() for t in inputs)
    leaves = [t.requires_grad_() for t in (x, f, *gains)]
    with forced_backend("reference"):
        y = split_merge(*leaves, None, Segments(tuple(lengths)))
    truth = [y.detach(), *torch.autograd.grad(y, leaves, g)]
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    first, *others = [_values(inputs, lengths) for _ in range(4)]
    torch.use_deterministic_algorithms(False)
    if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        return float("inf")
    errors = [float((v - t).norm() / t.norm()) for v, t in zip(first, truth, strict=True)]
    return max(float("inf") if e != e else e for e in errors)


def _values(inputs: list[Tensor], lengths: list[int]) -> list[Tensor]:
    found = forward(inputs, lengths)
    return [found[0], *backward(inputs, found, lengths)]


def times(size: tuple[int, int, int], width: int) -> tuple[float, float]:
    """Median microseconds (forward, backward) in CUDA graphs over inputs that exceed the L2."""
    case = fused_ops.merge_case(size)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(4, min(12, -(-4 * l2 // case.forward_bytes)))
    lengths = list(size[1:])
    inputs = [draw(size, width, "cuda") for _ in range(sets)]
    found = [forward(each, lengths) for each in inputs]
    steps = (
        lambda i: forward(inputs[i], lengths),
        lambda i: backward(inputs[i], found[i], lengths),
    )
    one, other = (1e3 * fused_ops.graph_ms(step, sets) for step in steps)
    return one, other


def measure(
    name: str, size: tuple[int, int, int], device: str, bandwidth: float | None
) -> dict[str, Any]:
    width = fused_ops.WIDTH if device == "cuda" else 40
    batch, *lengths = size
    row: dict[str, Any] = {"form": name, "size": size}
    with form(name):
        few = (min(batch, 4), *lengths)
        row["error"] = error = gate(draw(few, width, device), lengths)
        if not error < fused_ops.TOLERANCE:
            return row | {"failed": "gate"}
        if bandwidth is not None:
            case = fused_ops.merge_case(size)
            row["us"] = times(size, width)
            row["floor_us"] = [
                1e6 * n / bandwidth for n in (case.forward_bytes, case.backward_bytes)
            ]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", help="samples,image,text tokens")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
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
        for name in args.forms:
            row = measure(name, size, args.device, bandwidth)
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                partial = args.json.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n")
                os.replace(partial, args.json)


if __name__ == "__main__":
    main()
