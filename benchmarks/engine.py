"""Claim: one picture of a 1000-layer network in 2 s on an H200, 35 Euler steps with guidance.

Gate: after 35 steps the engine's latents agree with an fp32 evaluation of the same weights at least
as well as the plain bf16 model's do. Then the time of every candidate of every stage of a block,
the time of whole pictures, beside the plain loop and a torch.compile'd block in one CUDA graph, and
the time to the first step, cold and from the cache. Weights are random and of full size.

    python benchmarks/engine.py [--budget SECONDS] [--stages gate,parts,pictures,…] [--json FILE]
    python benchmarks/engine.py --table FILE…    # the table of docs/sampling.md

Cost: one GPU with 120 GB; about four minutes on an H200. Stages end when the budget does; the
report is written after each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from mvsplit.kernels import forced_backend
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.init import initialise
from mvsplit.models.rope import rope_tables
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import classifier_free, euler
from mvsplit.sampling.engine import Engine
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Network
from mvsplit.sampling.engine_tune import Tuner, graph_time

STEPS, SHIFT, GUIDANCE = 35, 4.0, 2.0
SIDE, TEXT = 16, 32  # 256 image tokens, 32 text tokens
GATE_DEPTH = 100
STAGE_NAMES = ("gate", "parts", "pictures", "parts8", "compiled", "plain", "deep_gate", "starts")
# Released code on an H200 (s a picture): eager, and its fused block in one CUDA graph at batch 2.
RELEASED = {"eager_s_per_picture": [70, 84], "one_graph_s_per_picture": 4.9}


def network(depth: int, dtype: torch.dtype = torch.bfloat16) -> DiT:
    """mvsplit-1000l's shape on the paper's latents, initialised on the GPU; writers and α random,
    so that no branch and no mean is idle."""
    config = DiTConfig(
        depth=depth, width=1024, heads=8, ffn_width=3072, channels=128, text_width=1024,
        rule=RuleConfig(name="mvsplit", beta=0.03, alpha=0.02), writers="standard",
    )  # fmt: skip
    with torch.device("meta"):
        model = DiT(config)
    model = model.to(dtype).to_empty(device="cuda").requires_grad_(False)
    initialise(model, config, torch.Generator("cuda").manual_seed(0))
    return model


def double_of(model: DiT) -> DiT:
    """The same weights in fp32."""
    with torch.device("meta"):
        wide = DiT(model.config)
    wide = wide.to_empty(device="cuda").requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    return wide


def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, text and the unconditional text."""
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    noise, text, null = draw(batch, 128, SIDE, SIDE), draw(batch, TEXT, 1024), draw(1, TEXT, 1024)
    return noise, text.bfloat16().to(dtype), null.bfloat16().to(dtype)


def sample(
    model: Callable[..., Tensor], batch: int, dtype: torch.dtype, steps: int = STEPS
) -> Tensor:
    noise, text, null = inputs(batch, dtype)
    velocity = classifier_free(model, text, null, GUIDANCE)
    with torch.no_grad():
        return euler(velocity, noise, steps=steps, shift=SHIFT)


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Report:
    """What was found so far, on disk after every stage."""

    def __init__(self, path: Path | None, budget: float, stages: str) -> None:
        self.path, self.budget, self.started = path, budget, time.perf_counter()
        self.found: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "command": f"python benchmarks/engine.py --stages {stages}",
            "released": RELEASED,
        }

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    def add(self, name: str, value: object) -> None:
        self.found[name] = value
        print(f"[{self.spent:5.1f} s] {name}: {json.dumps(value)[:600]}", flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")


# Gate


def error(latents: Tensor, truth: Tensor) -> float:
    value = ((latents - truth).norm() / truth.norm()).item()
    return float("inf") if value != value else value


def gate(report: Report, name: str, model: DiT, *, reference: bool) -> None:
    """Errors against fp32 after 35 steps: by the readable ops, or by the model's own in a graph."""
    wide = double_of(model)
    with forced_backend("reference" if reference else "triton"):
        truth = sample(wide if reference else Engine(wide), 1, torch.float32)
    del wide
    torch.cuda.empty_cache()
    plain = error(sample(_plain_graph(model), 1, torch.bfloat16), truth)
    engine = Engine(model)
    ours = error(sample(engine, 1, torch.bfloat16), truth)
    report.add(name, {
        "depth": model.config.depth, "engine": ours, "plain_bf16": plain,
        "truth_rms": truth.square().mean().sqrt().item(), "ran": engine.choice,
    })  # fmt: skip
    if not ours <= 1.05 * plain:
        raise SystemExit(f"gate failed: the engine is off by {ours:.2e}, plain bf16 by {plain:.2e}")


def _plain_graph(model: DiT) -> Callable[..., Tensor]:
    """The model's own kernels; the graph changes when they are launched and nothing else."""
    from mvsplit.sampling.engine import _Graph

    graphs: list[_Graph] = []

    def run(latents: Tensor, text: Tensor, valid: Tensor | None) -> Tensor:
        if not graphs:
            graphs.append(_Graph(model, "", latents, text, valid))
        return graphs[0](latents, text, valid)

    return run


# Parts of a block


def parts(report: Report, name: str, model: DiT, batch: int) -> None:
    """Microseconds of every candidate of every stage, and of blocks."""
    noise, text, _ = inputs(2 * batch, torch.bfloat16)
    with torch.no_grad():
        tuner = Tuner(Network(model, noise.bfloat16(), text, padded=False))
        plan = tuner.best_plan()
        assert plan is not None
        print_table(tuner)
        found = {
            "rows": 2 * batch * (SIDE**2 + TEXT),
            "seconds": tuner.seconds,
            "plan": plan.to_json(),
            "block_us": tuner.block_time(plan),
            "ordinary_block_us": tuner.block_time(ORDINARY),
            "matmul_us": {
                stage: matmul_time(tuner, stage) for stage in STAGES if stage != "attention"
            },
            "table": tuner.table,
        }
    report.add(name, found)


def matmul_time(tuner: Tuner, stage: str) -> float:
    """Microseconds of cuBLAS for a stage's product alone, over the same layers."""
    weights = [
        {"qkv": b.attention.qkv, "proj": b.attention.proj, "w13": b.ffn.w13, "w2": b.ffn.w2}[stage]
        for b in tuner.blocks
    ]
    a = torch.randn(tuner.network.stream.rows, weights[0].in_features, device="cuda").bfloat16()
    return (
        graph_time(lambda: [functional.linear(a, w.weight) for w in weights] and None)
        / len(weights)
        * 1e6
    )


def print_table(tuner: Tuner) -> None:
    for stage, rows in tuner.table.items():
        good = sorted((r for r in rows if r[1] is not None), key=lambda r: r[1])
        bad = [r for r in rows if r[1] is None]
        print(f"{stage}: {len(rows)} candidates, {len(bad)} not possible")
        for choice, micro, _ in good[: 30 if stage == "block" else 6]:
            print(f"  {micro:7.1f} µs  {short(choice)}")
        for choice, micro, _ in good[6:]:
            if choice.startswith("Ordinary"):
                print(f"  {micro:7.1f} µs  {short(choice)}")
        for choice, _, reason in bad[:4]:
            print(f"        –     {short(choice)}: {reason[:150]}")
    print({k: round(v, 1) for k, v in tuner.seconds.items()}, flush=True)


def short(choice: str) -> str:
    """A choice with numbers alone."""
    return re.sub(r"pdl=False|tma=False|[a-z]+=(?=[0-9])| ", "", choice)


# Pictures


def pictures(report: Report, model: DiT) -> None:
    engine = Engine(model)
    for batch in (1, 8):
        first = timed(lambda b=batch: sample(engine, b, torch.bfloat16, steps=1))
        times = [
            timed(lambda b=batch: sample(engine, b, torch.bfloat16))
            for _ in range(5 if batch == 1 else 3)
        ]
        latents = sample(engine, batch, torch.bfloat16)
        report.add(f"pictures_{batch}", {
            "seconds": statistics.median(times), "all": times, "first_step_seconds": first,
            "finite": bool(latents.isfinite().all()), "ran": engine.choice,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            "weights_gb": sum(p.nbytes for p in model.parameters()) / 1e9,
        })  # fmt: skip


# Rivals


def plain(report: Report, model: DiT) -> None:
    """The model called from Python step by step; time of two steps, for 35."""
    sample(model, 1, torch.bfloat16, steps=1)
    seconds = timed(lambda: sample(model, 1, torch.bfloat16, steps=2)) / 2 * STEPS
    graph = _plain_graph(model)
    sample(graph, 1, torch.bfloat16, steps=1)
    in_graph = timed(lambda: sample(graph, 1, torch.bfloat16))
    report.add("plain", {"loop_seconds": seconds, "own_ops_in_one_graph_seconds": in_graph})


def normalise(z: Tensor, eps: float) -> Tensor:
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)


def merge_formula(x: Tensor, f: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """Eq. 7–8 on two segments."""
    out = []
    for tokens in (slice(0, SIDE**2), slice(SIDE**2, None)):
        xs, fs = x[:, tokens].float(), f[:, tokens].float()
        mean_x, mean_f = xs.mean(1, keepdim=True), fs.mean(1, keepdim=True)
        out.append(xs + beta * (fs - mean_f) + alpha * (mean_f - mean_x))
    return normalise(torch.cat(out, 1), 1e-5).to(x.dtype)


def block_formula(
    x: Tensor, cos: Tensor, sin: Tensor, qkv: Tensor, proj: Tensor, w13: Tensor, w2: Tensor,
    beta_a: Tensor, alpha_a: Tensor, beta_f: Tensor, alpha_f: Tensor,
) -> Tensor:  # fmt: skip
    """A block as one writes it."""
    q, k, v = functional.linear(x, qkv).unflatten(-1, (3, 8, 128)).permute(2, 0, 3, 1, 4)

    def rotated(h: Tensor) -> Tensor:
        h1, h2 = h.float().chunk(2, -1)
        return normalise(torch.cat((h1 * cos + h2 * sin, h2 * cos - h1 * sin), -1), 1e-6).to(
            h.dtype
        )

    mixed = functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
    x = merge_formula(
        x, functional.linear(mixed.transpose(1, 2).flatten(-2), proj), beta_a, alpha_a
    )
    gate, value = functional.linear(x, w13).float().chunk(2, -1)
    hidden = (functional.silu(gate) * value).to(x.dtype)
    return merge_formula(x, functional.linear(hidden, w2), beta_f, alpha_f)


def compiled(report: Report, model: DiT, batches: tuple[int, ...] = (1, 8)) -> None:
    """A torch.compile'd block, 1000 of them captured in one CUDA graph."""
    step = torch.compile(block_formula, dynamic=False)
    arguments = [
        (b.attention.qkv.weight, b.attention.proj.weight, b.ffn.w13.weight, b.ffn.w2.weight,
         b.rule_attention.beta, b.rule_attention.alpha, b.rule_ffn.beta, b.rule_ffn.alpha)
        for b in model.blocks
    ]  # fmt: skip
    cos, sin = rope_tables(SIDE, SIDE, TEXT, 128, 10_000.0, torch.device("cuda"))
    found = {}
    for batch in batches:
        x = torch.randn(2 * batch, SIDE**2 + TEXT, 1024, device="cuda").bfloat16()

        def run(x: Tensor = x) -> None:
            for tensors in arguments:
                x = step(x, cos, sin, *tensors)

        with torch.no_grad():
            found[f"seconds_{batch}"] = graph_time(run) * STEPS
    report.add("compiled_block_in_one_graph", found)


# Starts


def starts(report: Report, depth: int) -> None:
    """Seconds from a model to its first step in new processes: without anybody's caches, then with
    those of the first."""
    with tempfile.TemporaryDirectory(prefix="mvsplit-engine-") as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "MVSPLIT_CACHE": f"{folder}/mvsplit"}
        for name in ("cold", "warm"):
            output = subprocess.run(
                [sys.executable, __file__, "--child", str(depth)], env={**os.environ, **caches},
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            if output.returncode:
                raise SystemExit(f"the {name} start failed: {output.stderr[-1500:]}")
            report.add(f"{name}_first_step_seconds", float(output.stdout.splitlines()[-1]))


def child(depth: int) -> None:
    model = network(depth)
    torch.cuda.synchronize()
    engine = Engine(model)
    print(timed(lambda: sample(engine, 1, torch.bfloat16, steps=1)))


def table(found: dict[str, Any]) -> str:
    """The times of a report as a table in Markdown."""
    plain_, compiled_ = found["plain"], found["compiled_block_in_one_graph"]
    low, high = RELEASED["eager_s_per_picture"]
    rows = (
        ("released code, eager", f"{low}–{high}", "–"),
        ("released block in one CUDA graph", f"{RELEASED['one_graph_s_per_picture']}", "–"),
        ("the model called step by step", f"{plain_['loop_seconds']:.1f}", "–"),
        (
            "a torch.compile'd block in one CUDA graph",
            f"{compiled_['seconds_1']:.2f}",
            f"{compiled_['seconds_8']:.2f}",
        ),
        (
            "the model's own ops in one CUDA graph",
            f"{plain_['own_ops_in_one_graph_seconds']:.2f}",
            "–",
        ),
        (
            "the engine",
            f"**{found['pictures_1']['seconds']:.2f}**",
            f"**{found['pictures_8']['seconds']:.2f}**",
        ),
    )
    head = ["| seconds for | one picture | eight |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=220.0)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--stages", default=",".join(STAGE_NAMES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, nargs="+", help="later reports replace earlier ones")
    args = parser.parse_args()
    if args.table:
        print(table({k: v for file in args.table for k, v in json.loads(file.read_text()).items()}))
        return
    if args.child:
        child(args.child)
        return
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    report = Report(args.json, args.budget, args.stages)
    deep: list[DiT] = []

    def model() -> DiT:
        if not deep:
            seconds = timed(lambda: deep.append(network(args.depth)))
            report.add("weights_drawn_in_seconds", seconds)
        return deep[0]

    stages: dict[str, tuple[float, Callable[[], None]]] = {  # name: (seconds it may need, run)
        "gate": (10, lambda: gate(report, "gate", network(GATE_DEPTH), reference=True)),
        "parts": (20, lambda: parts(report, "parts", network(16), 1)),
        "pictures": (30, lambda: pictures(report, model())),
        "compiled": (30, lambda: compiled(report, model())),
        "plain": (10, lambda: plain(report, model())),
        "deep_gate": (35, lambda: gate(report, "deep_gate", model(), reference=False)),
        "starts": (45, lambda: starts(report, args.depth)),
        "parts8": (25, lambda: parts(report, "parts8", network(16), 8)),
    }
    for name in args.stages.split(","):
        needs, run = stages[name]
        if report.spent + needs > args.budget:
            report.add(f"{name}_skipped", f"needs {needs} s of the budget")
            continue
        try:
            run()
        except SystemExit as failure:
            report.add(f"{name}_failed", str(failure))
            if name == "gate":
                raise
        except Exception as failure:  # the other stages still say something
            traceback.print_exc()
            report.add(f"{name}_failed", f"{type(failure).__name__}: {failure}"[:500])
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
