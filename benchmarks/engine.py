"""Claim: one picture of a 1000-layer network in 2 s on an H200, 35 Euler steps with guidance.

Gate: after 35 steps the engine's latents agree with an fp32 evaluation of the same weights at least
as well as the plain bf16 model's do, drawn one by one and eight at a time. The plain model's
attention is that of the libraries. Until 2026-11-29 it was what serves on the machine; then ours in
CUDA C++ came to serve at eight pictures, less far off by 0.04 %, and the gate failed by that. The
comparison with what serves is reported beside (`as_it_serves`). For eight noises and
texts d is the engine's relative error less the plain model's. It passes where the mean of d is no
further above zero than 1.9 of its standard errors (Student's t, 7 degrees, 5 % to one side), and no
further than 1 % of the plain error. Then the time of every candidate of every stage of a block,
the time of whole pictures, beside the plain loop and a torch.compile'd block in one CUDA graph, and
the time to the first step, cold and from the cache. Weights are random and of full size.

    python benchmarks/engine.py [--budget SECONDS] [--stages gate,parts,pictures,…] [--json FILE]
    python benchmarks/engine.py --table FILE…    # the table of docs/sampling.md

Cost: about four minutes on one H200; another GPU needs 120 GB of memory. What does not fit into
--budget seconds is left out; the report is written after each stage.
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
from engine_rival import compiled_blocks
from step_classes import changed
from torch import Tensor
from torch.nn import functional

from mvsplit.kernels import attention, forced_backend
from mvsplit.kernels.choices import choice_file
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.init import initialise
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import classifier_free, engine_apart, euler
from mvsplit.sampling.engine import Engine
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Network, Plan
from mvsplit.sampling.engine_tune import Tuner, graph_time, save_plan

STEPS, SHIFT, GUIDANCE = 35, 4.0, 2.0
SIDE, TEXT = 16, 32  # 256 image tokens, 32 text tokens
GATE_DEPTH = 100
GATE_NOISES = 8
GATE_T, GATE_SHARE = 1.895, 0.01  # see the gate's rule above
STAGE_NAMES = ("gate", "parts", "pictures", "parts8", "compiled", "plain", "deep_gate", "starts")
Table = dict[str, list[tuple[str, float | None, str]]]
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
    model: Callable[..., Tensor], batch: int, dtype: torch.dtype, steps: int = STEPS,
    only: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Latents of a batch, or of some of its pictures, which have the same noise and text alone."""
    noise, text, null = inputs(batch, dtype)
    noise, text = noise[only], text[only]
    velocity = classifier_free(model, text, null, GUIDANCE)
    with torch.no_grad():
        return euler(velocity, noise, steps=steps, shift=SHIFT)


def timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Report(logging.Handler):
    """What was found so far, and what the engine said, on disk after every stage."""

    def __init__(self, path: Path | None, budget: float, stages: str) -> None:
        super().__init__()
        self.path, self.budget, self.started = path, budget, time.perf_counter()
        self.found: dict[str, Any] = {
            "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "command": f"python benchmarks/engine.py --stages {stages}",
            "released": RELEASED,
            "log": [],
        }

    def emit(self, record: logging.LogRecord) -> None:
        self.found["log"].append(record.getMessage())

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


def gate(report: Report, name: str, model: DiT, noises: int, *, reference: bool) -> None:
    """Errors against fp32 after 35 steps: by the readable ops, or by the model's own in a graph."""
    wide = double_of(model)
    with forced_backend("reference" if reference else "triton"):
        truth = sample(wide if reference else Engine(wide), noises, torch.float32)
    del wide
    torch.cuda.empty_cache()
    found: dict[str, Any] = {"depth": model.config.depth, "noises": noises}
    for pictures in sorted({1, noises}):  # at a time
        ran = Engine(model)
        ours = errors(ran, truth, pictures)
        row = {"ran": ran.choice}
        for name, way in {"": "attention by libraries", "as_it_serves": ""}.items():
            with changed(way):
                judged = verdict(ours, errors(_plain_graph(model), truth, pictures))
                judged["plain_attention"] = attention.backends_so_far()
            row |= {name: judged} if name else judged
        found[f"{pictures}_at_a_time"] = row
    report.add(name, {**found, "truth_rms": truth.square().mean().sqrt().item()})
    if not all(row["passes"] for row in found.values() if isinstance(row, dict)):
        raise SystemExit(f"gate failed: {found}")


def errors(model: Callable[..., Tensor], truth: Tensor, pictures: int) -> list[float]:
    """Of every picture, drawn `pictures` at a time."""
    parts = [slice(i, i + pictures) for i in range(0, len(truth), pictures)]
    drawn = torch.cat([sample(model, len(truth), torch.bfloat16, only=part) for part in parts])
    return [error(one, true) for one, true in zip(drawn, truth, strict=True)]


def verdict(ours: list[float], plain: list[float]) -> dict[str, Any]:
    """Means, the mean of the differences with its standard error, and whether the gate passes."""
    differences = [a - b for a, b in zip(ours, plain, strict=True)]
    mean, base = statistics.mean(differences), statistics.mean(plain)
    several = len(differences) > 1
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if several else 0.0
    allowed = min(GATE_T * spread, GATE_SHARE * base) if several else GATE_SHARE * base
    return {
        "engine": statistics.mean(ours), "plain_bf16": base, "difference": mean,
        "difference_stderr": spread, "allowed": allowed, "passes": mean <= allowed,
        "engine_all": ours, "plain_bf16_all": plain,
    }  # fmt: skip


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
    """Microseconds of every candidate of every stage, and of blocks, as the engine measures."""
    noise, text, _ = inputs(2 * batch, torch.bfloat16)
    with torch.no_grad():
        tuner = Tuner(Network(model, noise.bfloat16(), text, padded=False))
        measured = engine_apart.measured(tuner.network)
        plan = tuner.checked(measured.plan)
        save_plan(tuner.network, plan, choice_file("engine"))  # pictures need not measure again
        print_table(measured.table, measured.seconds)
        found = {
            "rows": 2 * batch * (SIDE**2 + TEXT),
            "seconds": measured.seconds,
            "ended": measured.ended,
            "plan": plan.to_json(),
            **block_times(tuner, plan),
            "matmul_us": {
                stage: matmul_time(tuner, stage) for stage in STAGES if stage != "attention"
            },
            "table": measured.table,
        }
    report.add(name, found)


def block_times(tuner: Tuner, plan: Plan) -> dict[str, Any]:
    """Microseconds of a block by the plan and by the ordinary ops."""
    ours, ordinary = tuner.block_times([plan, ORDINARY])
    return {"block_us": ours, "ordinary_block_us": ordinary}


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


def print_table(table: Table, seconds: dict[str, float]) -> None:
    for stage, rows in table.items():
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
    print({k: round(v, 1) for k, v in seconds.items()}, flush=True)


def short(choice: str) -> str:
    """A choice with numbers alone."""
    return re.sub(r"pdl=False|tma=False|[a-z]+=(?=[0-9])| ", "", choice)


# Pictures


def pictures(report: Report, model: DiT, batches: str) -> None:
    """Seconds from noise to latents, and to the end of the first step: without caches, if this is
    the first stage."""
    engine, latents = Engine(model), [torch.empty(0)]

    def draw(batch: int, steps: int = STEPS) -> None:
        latents[0] = sample(engine, batch, torch.bfloat16, steps)

    for batch in map(int, batches.split(",")):
        first = timed(lambda b=batch: draw(b, 1))
        times = [timed(lambda b=batch: draw(b)) for _ in range(3 if batch == 1 else 2)]
        report.add(f"pictures_{batch}", {
            "seconds": statistics.median(times), "all": times, "first_step_seconds": first,
            "finite": bool(latents[0].isfinite().all()), "ran": engine.choice,
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


def compiled(report: Report, model: DiT, batches: tuple[int, ...] = (1, 8)) -> None:
    """A torch.compile'd block, 1000 of them captured in one CUDA graph."""
    found = {}
    for batch in batches:
        with torch.no_grad():
            found[f"seconds_{batch}"] = graph_time(compiled_blocks(model, 2 * batch)) * STEPS
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
    parser.add_argument("--pictures", default="1,8", help="at a time, in the stage of that name")
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
    logging.getLogger("mvsplit.sampling").addHandler(report)
    deep: list[DiT] = []

    def model() -> DiT:
        if not deep:
            seconds = timed(lambda: deep.append(network(args.depth)))
            report.add("weights_drawn_in_seconds", seconds)
        return deep[0]

    stages: dict[str, tuple[float, Callable[[], None]]] = {  # name: (seconds it may need, run)
        "gate": (
            20,
            lambda: gate(report, "gate", network(GATE_DEPTH), GATE_NOISES, reference=True),
        ),
        "parts": (10, lambda: parts(report, "parts", network(16), 1)),
        "pictures": (25, lambda: pictures(report, model(), args.pictures)),
        "compiled": (30, lambda: compiled(report, model())),
        "plain": (10, lambda: plain(report, model())),
        "deep_gate": (35, lambda: gate(report, "deep_gate", model(), 1, reference=False)),
        "starts": (45, lambda: starts(report, args.depth)),
        "parts8": (10, lambda: parts(report, "parts8", network(16), 8)),
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
