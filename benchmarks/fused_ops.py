"""Claim: the fused ops run near the speed of a memory copy, far above torch.compile of the formula.

Gate: every op, forward and backward, agrees with the fp64 reference. Then the median GPU time of
each op beside torch.compile and eager PyTorch of the same formula, and the floor: the bytes that
have to move (inputs read once, outputs written once) at the copy bandwidth measured in this run.
Every version is timed as a CUDA graph over input sets that together exceed the L2 cache, so neither
launch overhead nor cached inputs count. "backward" is forward and backward less forward.

    python benchmarks/fused_ops.py [--ops merge,plain,rope,swiglu] [--no-compile] [--json FILE]

Cost: about three minutes on one H200, nearly all of it torch.compile; another CUDA GPU will do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from mvsplit.kernels import (
    Segments,
    forced_backend,
    qk_norm_rope,
    split_merge,
    swiglu,
)
from mvsplit.kernels.hopper import merge_choice

WIDTH, HEADS, HIDDEN = 1024, 8, 3072
SHAPES = ((64, 256, 64), (64, 256, 256), (16, 1024, 256), (1, 256, 32))  # batch, image, text
STEP_SHAPES = ((26, 256, 64), (16, 256, 32))  # pieces of a training step, for the merge with means
TOLERANCE = 8e-3  # bf16 rounds outputs by 2⁻⁹, and gradients again through the saved output
REPLAYS = 30
# The released kernel's merge on an H200, ms (forward, backward), as measured for this project.
RELEASED = {(64, 256, 64): (0.094, 0.988), (64, 256, 256): (0.175, 1.179),
            (16, 1024, 256): (0.128, 0.917), (1, 256, 32): (0.148, 0.596)}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One op at one shape: how to make inputs, ours, the formula, and the bytes of each pass."""

    op: str
    shape: tuple[int, int, int]
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    forward_bytes: int
    backward_bytes: int


# The formulas as one writes them; autograd differentiates them


def normalise(z: Tensor, eps: float) -> Tensor:
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)


def merge_formula(x: Tensor, f: Tensor, beta: Tensor, alpha: Tensor, image: int) -> Tensor:
    """Eq. 7–8 on two segments."""
    parts = []
    for tokens in (slice(0, image), slice(image, None)):
        xs, fs = x[:, tokens].float(), f[:, tokens].float()
        mean_x, mean_f = xs.mean(1, keepdim=True), fs.mean(1, keepdim=True)
        parts.append(xs + beta * (fs - mean_f) + alpha * (mean_f - mean_x))
    return normalise(torch.cat(parts, 1), 1e-5).to(x.dtype)


def plain_formula(x: Tensor, f: Tensor, gamma: Tensor) -> Tensor:
    return normalise(x.float() + gamma * f.float(), 1e-5).to(x.dtype)


def rope_formula(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.float().chunk(2, -1)
        turned = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)
        return normalise(turned, 1e-6).to(x.dtype)

    return rotated(q), rotated(k), v.contiguous()


def swiglu_formula(packed: Tensor) -> Tensor:
    gate, value = packed.float().chunk(2, -1)
    return (functional.silu(gate) * value).to(packed.dtype)


# Cases


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def gain() -> Tensor:
    return torch.rand(WIDTH, device="cuda")


def merge_case(shape: tuple[int, int, int]) -> Case:
    batch, image, text = shape
    size = 2 * batch * (image + text) * WIDTH
    segments = Segments((image, text))
    return Case(
        "merge",
        shape,
        lambda: (*(draw(batch, image + text, WIDTH) for _ in range(2)), gain(), gain()),
        lambda x, f, beta, alpha: split_merge(x, f, beta, alpha, None, segments),
        lambda x, f, beta, alpha: merge_formula(x, f, beta, alpha, image),
        3 * size,
        5 * size,
    )


def plain_case(shape: tuple[int, int, int]) -> Case:
    batch, image, text = shape
    size = 2 * batch * (image + text) * WIDTH
    segments = Segments((image, text))
    return Case(
        "plain",
        shape,
        lambda: (*(draw(batch, image + text, WIDTH) for _ in range(2)), gain()),
        lambda x, f, gamma: split_merge(x, f, gamma, gamma, 0, segments),
        plain_formula,
        3 * size,
        5 * size,
    )


def rope_case(shape: tuple[int, int, int]) -> Case:
    batch, image, text = shape
    size = 2 * batch * (image + text) * WIDTH
    angles = torch.rand(image + text, WIDTH // HEADS // 2, device="cuda") * 6
    angles[image:] = 0
    cos, sin = angles.cos(), angles.sin()
    return Case(
        "rope",
        shape,
        lambda: (draw(batch, image + text, 3 * WIDTH),),
        lambda qkv: qk_norm_rope(qkv, cos, sin, HEADS, HEADS),
        lambda qkv: rope_formula(qkv, cos, sin),
        6 * size,
        8 * size,
    )


def swiglu_case(shape: tuple[int, int, int]) -> Case:
    batch, image, text = shape
    size = 2 * batch * (image + text) * HIDDEN
    return Case(
        "swiglu",
        shape,
        lambda: (draw(batch, image + text, 2 * HIDDEN),),
        swiglu,
        swiglu_formula,
        3 * size,
        5 * size,
    )


CASES = {"merge": merge_case, "plain": plain_case, "rope": rope_case, "swiglu": swiglu_case}


# Gate


def with_gradients(op: Callable[..., object], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs for the same upstream gradient in every call."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator("cuda").manual_seed(0)
    upstream = [
        torch.randn(o.shape, device="cuda", generator=generator).bfloat16().to(o.dtype)
        for o in outputs
    ]
    return [t.detach() for t in (*outputs, *torch.autograd.grad(outputs, leaves, upstream))]


def worst_error(case: Case) -> float:
    """The largest ‖ours − fp64 reference‖/‖reference‖ over outputs and gradients."""
    inputs = tuple(t[:4] if t.dim() > 1 else t for t in case.inputs())
    with forced_backend("triton"):
        values = with_gradients(case.ours, inputs)
    with forced_backend("reference"):
        truth = with_gradients(case.ours, tuple(t.double() for t in inputs))
    errors = [float((v - t).norm() / t.norm()) for v, t in zip(values, truth, strict=True)]
    return max(float("inf") if e != e else e for e in errors)


# Time


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of `run` on the current stream."""
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_ms(step: Callable[[int], object], sets: int) -> float:
    """Median milliseconds of one step when a CUDA graph runs steps 0 … sets − 1."""
    for i in range(3):
        step(i % sets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [step(i) for i in range(sets)]  # alive until the end: no output reuses memory
    del kept
    graph.replay()
    return median_ms(graph.replay) / sets


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device copy."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3


def time_op(op: Callable[..., object], case: Case, sets: int) -> tuple[float, float]:
    """Milliseconds (forward, backward)."""
    inputs = [tuple(t.requires_grad_() for t in case.inputs()) for _ in range(sets)]
    outputs = op(*(t.detach() for t in inputs[0]))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [[torch.randn_like(o) for o in outputs] for _ in range(sets)]

    def both(i: int) -> object:
        out = op(*inputs[i])
        return out, torch.autograd.grad(out, inputs[i], grads[i])

    forward = graph_ms(lambda i: op(*inputs[i]), sets)
    return forward, graph_ms(both, sets) - forward


def versions(case: Case, compiled: bool) -> Iterator[tuple[str, Callable[..., object]]]:
    yield "ours", case.ours
    yield "eager", case.formula
    if compiled:
        yield "compile", torch.compile(case.formula, dynamic=False)


def measure(case: Case, bandwidth: float, compiled: bool) -> dict[str, object]:
    error = worst_error(case)
    if not error < TOLERANCE:
        raise SystemExit(f"gate failed: {case.op} {case.shape}: relative error {error:.1e}")
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(4, min(64, -(-4 * l2 // case.forward_bytes)))
    torch._dynamo.reset()
    times = {name: time_op(op, case, sets) for name, op in versions(case, compiled)}
    floor = [1e3 * b / bandwidth for b in (case.forward_bytes, case.backward_bytes)]
    row = {"op": case.op, "shape": case.shape, "error": error, "floor_ms": floor, "ms": times}
    if case.op == "merge" and case.shape in RELEASED:
        row["released_ms"] = RELEASED[case.shape]
    print(line(row), flush=True)
    return row


def line(row: dict) -> str:
    (f, b), (ff, fb), both = row["ms"]["ours"], row["floor_ms"], sum(row["ms"]["ours"])
    text = (
        f"{row['op']:6} {row['shape']!s:15} err {row['error']:.1e} | forward {f * 1e3:6.1f} µs"
        f" = {f / ff:4.2f} × floor | backward {b * 1e3:6.1f} µs = {b / fb:4.2f} × floor |"
    )
    for name, times in {**row["ms"], "released": row.get("released_ms")}.items():
        if name != "ours" and times:
            text += f" {name} {times[0] * 1e3:.0f} + {times[1] * 1e3:.0f}: {sum(times) / both:.1f}×"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", default=",".join(CASES))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default one
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s on {torch.cuda.get_device_name()}", flush=True)
    report: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": f"python {' '.join(sys.argv)}",
        "copy_bytes_per_second": bandwidth,
        "clusters_from": merge_choice.FEWEST_TOKENS,
        "rows": [],
    }
    for op in args.ops.split(","):
        for shape in SHAPES + (STEP_SHAPES if op == "merge" else ()):
            report["rows"].append(measure(CASES[op](shape), bandwidth, not args.no_compile))
            if args.json:  # row by row, for it may be stopped
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
