"""Claim: the merge with means takes fewest microseconds in the form that the package chooses.

Gate: every form agrees with the fp64 reference and repeats bit for bit, on memory full of NaN; the
clusters, which no interpreter runs, also where samples are padded and where lengths fit no tile,
and in 60 launches after each other. Then, at each size, the median microseconds forward and
backward of each form, with other choices of its tiles beside those of the package. The floor is
that of fused_ops. Rows are written as they are found.

    python benchmarks/merge_forms.py [--sizes 26,256,64 64,256,64] [--forms NAME …] [--json FILE]

Cost: about 90 seconds on one H200, most of it compiling. --device cpu checks the forms but the
clusters in small, with TRITON_INTERPRET=1, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fused_ops
import torch
import triton
from torch import Tensor

from mvsplit.kernels import Segments, forced_backend, split_merge
from mvsplit.kernels.fused import split_merge as package
from mvsplit.kernels.hopper import merge as clusters

SIZES = ((26, 256, 64), (29, 256, 32), (64, 256, 64), (16, 1024, 256), (64, 256, 256), (1, 256, 32))
CHOSEN = "as the package chooses"
Changes = dict[str, Any]


def _cuts(forward: Changes, backward: Changes) -> Changes:
    """Of the kernels in clusters, for segments of any length."""
    return {
        name: replace(getattr(clusters, name), **(backward if "BACK" in name else forward))
        for name in ("FORWARD", "LONG_FORWARD", "BACKWARD", "LONG_BACKWARD")
    }


def _some(names: tuple[str, ...], **changes: Any) -> Changes:
    """Of those kernels in clusters."""
    return {name: replace(getattr(clusters, name), **changes) for name in names}


LONG, SHORT = ("LONG_FORWARD", "LONG_BACKWARD"), ("FORWARD", "BACKWARD")


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
    "clusters": ("clusters", {}),
    "clusters, other appliers": (
        "clusters",
        _cuts({"appliers": 8}, {"appliers": 4}),
    ),
    "clusters, long segments in order": ("clusters", _some(LONG, alternate=False, hints=False)),
    "clusters, long segments without hints": ("clusters", _some(LONG, hints=False)),
    "clusters, long segments with hints": ("clusters", _some(LONG, hints=True)),
    "clusters, long segments by 8 blocks": ("clusters", _some(LONG, cluster=8)),
    "clusters, short segments by turns": ("clusters", _some(SHORT, alternate=True)),
    "clusters, slots of 2 rows": (
        "clusters",
        _cuts(
            {"rows": 2, "slots": 26},
            {"rows": 2, "slots": 24, "f_slots": 4},
        ),
    ),
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
    package.form_of = lambda *_: (served, "chosen by the benchmark")
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


def forward(
    inputs: list[Tensor], lengths: list[int], valid: Tensor | None = None
) -> tuple[Tensor, ...]:
    x, f, _, beta, alpha = inputs
    gains = (beta, alpha, None, [0.0] * 3, True)
    return package._launch_forward(x, f, *gains, valid, lengths, 1e-5, True)


def backward(
    inputs: list[Tensor], found: tuple[Tensor, ...], lengths: list[int], valid: Tensor | None = None
) -> tuple[Tensor, ...]:
    """∂L/∂X, ∂L/∂F, ∂L/∂β, ∂L/∂α."""
    _, f, g, beta, alpha = inputs
    y, *rest = found
    gains = (beta, alpha, None, [0.0] * 3, True)
    return package._launch_backward(g, y, f, *rest, *gains, valid, lengths)[:4]


def gate(inputs: list[Tensor], lengths: list[int], valid: Tensor | None, launches: int) -> float:
    """The largest ‖form − fp64‖/‖fp64‖ of the output and the gradients; infinite where launches do
    not repeat bit for bit, a kernel waits in vain, or there is NaN."""
    segments = Segments(tuple(lengths), valid)
    x, f, g, *gains = inputs
    if segments.mask is not None:
        x, f, g = (t.masked_fill(~segments.mask[..., None], float("nan")) for t in (x, f, g))
    leaves = [t.double().requires_grad_() for t in (x, f, *gains)]
    with forced_backend("reference"):
        y = split_merge(*leaves, None, segments)
    truth = [y.detach(), *torch.autograd.grad(y, leaves, g.double())]
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    first = _values([x, f, g, *gains], lengths, valid)
    same = all(
        all(map(torch.equal, first, _values([x, f, g, *gains], lengths, valid)))
        for _ in range(launches - 1)
    )
    torch.use_deterministic_algorithms(False)
    if not same or waited_in_vain():
        return float("inf")
    errors = [float((v - t).norm() / t.norm()) for v, t in zip(first, truth, strict=True)]
    return max(float("inf") if e != e else e for e in errors)


def _values(inputs: list[Tensor], lengths: list[int], valid: Tensor | None) -> list[Tensor]:
    found = forward(inputs, lengths, valid)
    return [found[0], *backward(inputs, found, lengths, valid)]


def waited_in_vain() -> bool:
    """Whether a wait in the clusters did not end by itself, which they note instead of hanging."""
    return clusters.fault is not None and bool(clusters.fault.item())


def worst(size: tuple[int, int, int], width: int, device: str, awkward: bool) -> float:
    """Of the gate over some samples of a size and, for `awkward`, some padded ones and lengths that
    fit no tile."""
    batch, image, text = size
    cases: list[tuple[tuple[int, int, int], Any]] = [((min(batch, 20), image, text), None)]
    if awkward:
        cases.append(((3, image, text), [[image, 1], [7, text], [image, 0]]))
        cases.append(((5, 2 * image // 3 + 1, 3), None))
    errors = []
    for shape, counts in cases:
        valid = None if counts is None else torch.tensor(counts, device=device)
        inputs = draw(shape, width, device)
        errors.append(gate(inputs, list(shape[1:]), valid, 60 if awkward else 4))
    return max(errors)


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
    row: dict[str, Any] = {"form": name, "size": size}
    with form(name):
        row["error"] = error = worst(size, width, device, FORMS[name][0] == "clusters")
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
    bandwidth, on_hopper = None, False
    if args.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default one
        bandwidth = fused_ops.copy_bandwidth()
        report |= {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": bandwidth}
        if on_hopper := torch.cuda.get_device_capability() == (9, 0):
            clusters.fault = torch.zeros(1, dtype=torch.int32, device="cuda")
    forms = [name for name in args.forms if on_hopper or FORMS[name][0] != "clusters"]
    for size in chosen:
        for name in list(forms):
            row = measure(name, size, args.device, bandwidth)
            if "failed" in row and FORMS[name][0] == "clusters":
                forms.remove(name)  # it may not end elsewhere
                torch.cuda.synchronize()
                clusters.fault.zero_()
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                partial = args.json.with_suffix(".partial")
                partial.write_text(json.dumps(report, indent=1) + "\n")
                os.replace(partial, args.json)


if __name__ == "__main__":
    main()
