"""Question: how near to an H200's peak the training step of 400 layers comes.

Correctness first: gradients against fp32, and loss curves of 100 steps against those of fp32. Then
the optimiser step, clipping by the true global norm included, on 256 image and 64 text tokens a
sample at D = 1024: ours with fp32, split and bf16 weights, and a plain block under torch.compile
with checkpointing in the same run; the time of a layer at two depths, each under load for seconds.
Writers are not zero, and the card's clock and power are noted. Model FLOPs count 6N and attention,
nothing that is computed again; the peak is 989 TFLOP/s. `thousand_layers.py` has the step of 1000
layers.

    python benchmarks/train_step.py [--stages gate curves step …] [--budget 240] [--json FILE]

Results are written after every stage; a stage that does not fit into the budget is not begun, and
listed as such.

Cost: about five minutes on one H200.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from card_load import CardLoad
from plain_block import PlainBlock
from step_parts import Size, Trainer, free, keep_busy, rates, seconds, synchronise
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig, train
from mvsplit.training.files import read_lines
from mvsplit.training.step import add_gradients

UNDER_LOAD = 4.0  # seconds
RELEASED = {"400 layers, batch 128": 6865}  # tokens/s, paper's released code on an H200


# Gates


def gate(size: Size, device: str, samples: int) -> dict[str, Any]:
    """Gradients of six layers from pieces as large as those that are timed, for the size decides
    on the kernels: the node in bf16 is as near to fp32 as the parts in bf16 are."""
    config = TrainConfig(steps=1, batch_size=1, precision="fp32")
    model = size.model(6, 0.5)
    found: dict[str, list[Tensor]] = {}
    for name, precision, weights, parts in (
        ("fp32", "fp32", "fp32", True),
        ("parts", "bf16", "fp32", True),
        ("node", "bf16", "fp32", False),
        ("node, bf16 weights", "bf16", "bf16", False),
    ):
        trainer = Trainer(
            model, replace(config, precision=precision, weights=weights), size, device
        )
        if parts:
            for block in trainer.model.blocks:
                block.ffn.register_forward_hook(lambda *_: None)
        add_gradients(
            trainer.model, trainer.config, [trainer.piece(samples), trainer.piece(samples, 1)]
        )
        found[name] = [p.grad.double().cpu() for p in trainer.model.parameters()]
    names = [n for n, _ in trainer.model.named_parameters()]
    errors = {
        name: {
            n: float((g - w).norm() / w.norm())
            for n, g, w in zip(names, grads, found["fp32"], strict=True)
        }
        for name, grads in found.items()
        if name != "fp32"
    }
    worst = {name: max(e.values()) for name, e in errors.items()}
    mean = {name: statistics.fmean(e.values()) for name, e in errors.items()}
    nodes = ("node", "node, bf16 weights")  # arithmetic in bf16 rounds every weight anyway
    passed = all(mean[n] < 1.1 * mean["parts"] and worst[n] < 1.3 * worst["parts"] for n in nodes)
    return {"mean_error": mean, "worst_error": worst, "passed": passed}


def rounding(size: Size, device: str) -> dict[str, Any]:
    """What the gradients of many pieces lose when they are added up in bf16: mean distance to fp32
    of the matrices' gradients, beside that of bf16 arithmetic whose sum is fp32."""
    model, samples = size.model(6, 0.5), 4
    config = TrainConfig(steps=1, batch_size=1, precision="fp32")
    variants = {
        "fp32": ("fp32", "fp32"),
        "sum fp32": ("bf16", "fp32"),
        "sum bf16": ("bf16", "bf16"),
    }
    result = {}
    for pieces in (1, 8, 32):
        found = {}
        for name, (precision, weights) in variants.items():
            changed = replace(config, precision=precision, weights=weights)
            trainer = Trainer(model, changed, size, device)
            parts = [trainer.piece(samples, seed) for seed in range(pieces)]
            add_gradients(trainer.model, changed, parts)
            found[name] = [
                p.grad.double() for p in trainer.model.blocks.parameters() if p.ndim == 2
            ]
        result[str(pieces)] = {
            name: statistics.fmean(
                float((g - w).norm() / w.norm()) for g, w in zip(grads, found["fp32"], strict=True)
            )
            for name, grads in found.items()
            if name != "fp32"
        }
    return {"pieces": result, "samples": samples}


def curves(size: Size, device: str) -> dict[str, Any]:
    """100 steps on the shapes with the same seed, by `mvsplit.training.train` itself."""
    width = max(size.width // 4, 64)
    model = DiTConfig(
        depth=24,
        width=width,
        heads=2,
        ffn_width=3 * width,
        channels=3,
        patch=4,
        text_width=width,
        rule=RuleConfig(name="mvsplit", beta=0.2),
    )
    data = DataConfig(dataset="shapes", size=32)
    common = TrainConfig(
        steps=100, batch_size=64, lr=1e-3, warmup=20, ema_decay=0, probe_every=0, device=device
    )
    variants = {
        "fp32": common,
        "fp32, other noise": replace(common, seed=1),
        "bf16": replace(common, precision="bf16"),
        "bf16 weights": replace(common, precision="bf16", weights="bf16"),
    }
    losses = {}
    for name, config in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            train(Experiment(model=model, data=data, train=config), folder)
            losses[name] = [line["loss"] for line in read_lines(Path(folder) / "metrics.jsonl")]
    last = {name: statistics.fmean(values[-20:]) for name, values in losses.items()}
    noise = abs(last["fp32, other noise"] / last["fp32"] - 1)
    gaps = {n: last[n] / last["fp32"] - 1 for n in ("bf16", "bf16 weights")}
    passed = all(abs(gap) < max(noise, 0.02) for gap in gaps.values())
    return {
        "mean_of_last_20": last,
        "gaps": gaps,
        "between_seeds": noise,
        "passed": passed,
        "losses": {n: [round(v, 4) for v in values] for n, values in losses.items()},
    }


# Steps


def step(
    size: Size, device: str, *, weights: str, depth: int, samples: int, pieces: int
) -> dict[str, Any]:
    """An optimiser step on `pieces` pieces of `samples` samples."""
    free()
    config = TrainConfig(steps=1, batch_size=1, precision="bf16", weights=weights)
    began = time.perf_counter()
    trainer = Trainer(size.model(depth), config, size, device)
    synchronise()
    built = time.perf_counter() - began
    parts = [trainer.piece(samples, seed) for seed in range(pieces)]
    first = seconds(lambda: trainer.step(parts[:1]))
    seconds(lambda: trainer.step(parts))
    with CardLoad() as load:
        took = [seconds(lambda: trainer.step(parts)) for _ in range(3)]
    loss = torch.zeros((), device=device)
    update = statistics.median(seconds(lambda: trainer.update(loss)) for _ in range(3))
    return {
        "parameters": trainer.parameters,
        "update_seconds": update,
        "samples": samples * pieces,
        "piece": samples,
        "build_seconds": built,
        "first_step_seconds": first,
        "all": took,
        "load": load.found,
        **rates(trainer, samples * pieces, statistics.median(took)),
    }


def per_layer(size: Size, device: str, *, samples: int, depths: tuple[int, int]) -> dict[str, Any]:
    """Forward and backward of one piece, seconds a layer at 100 and at 1000 layers, with all of a
    block computed again at both, without the optimiser; from graphs, and launched one by one. Each
    for at least `UNDER_LOAD` seconds, after as many: a card that has just been idle is faster."""
    found: dict[str, dict[str, float]] = {"graph": {}, "launched": {}}
    loads: dict[str, Any] = {}
    for depth in depths:
        free()
        config = TrainConfig(
            steps=1, batch_size=1, precision="bf16", weights="bf16", recompute="all"
        )
        trainer = Trainer(size.model(depth), config, size, device)
        trainer.planner.before(samples * size.tokens)
        parts = [trainer.piece(samples)]
        for way, graphs in (("launched", None), ("graph", trainer.graphs)):
            run = partial(add_gradients, trainer.model, trainer.config, parts, graphs)
            keep_busy(run, UNDER_LOAD)
            with CardLoad() as load:
                count, took = keep_busy(run, UNDER_LOAD)
            found[way][str(depth)] = took / count / depth
            loads[f"{way}, {depth}"] = load.found
        del trainer, run
    few, many = map(str, depths)
    ratios = {way: each[many] / each[few] for way, each in found.items()}
    return {
        "seconds_per_layer": found,
        "ratio": ratios["graph"],
        "ratio_launched": ratios["launched"],
        "loads": loads,
    }


def profile(size: Size, device: str, *, samples: int) -> dict[str, Any]:
    """Where the time of a block goes, in µs a block, forward and backward."""
    free()
    depth = 10
    config = TrainConfig(
        steps=1, batch_size=1, precision="bf16", weights="bf16", recompute="nothing"
    )
    trainer = Trainer(size.model(depth), config, size, device)
    trainer.planner.before(samples * size.tokens)
    parts = [trainer.piece(samples)]
    for _ in range(2):
        add_gradients(trainer.model, config, parts)
    took = seconds(lambda: add_gradients(trainer.model, config, parts))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        add_gradients(trainer.model, config, parts)
        synchronise()
    kernels = [e for e in recorded.key_averages() if e.device_type.name == "CUDA"]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    table = {
        f"{e.key[:70]} ×{e.count / depth:g}": round(e.self_device_time_total / depth, 1)
        for e in kernels[:28]
    }
    total = sum(e.self_device_time_total for e in kernels) / depth
    return {"wall_us": took / depth * 1e6, "kernels_us": total, "by_kernel_us": table}


# The rival: one block of `plain_block.py` under torch.compile, checkpointing, autocast


def install_rival(model: DiT, device: str) -> None:
    """Lets every block run as the rival does."""
    run = torch.compile(PlainBlock.forward, dynamic=False, disable=device == "cpu")
    for block in model.blocks:
        plain = PlainBlock(block)
        block.forward = lambda *a, p=plain: checkpoint(run, p, *a, use_reentrant=False)


def rival_error(size: Size, device: str) -> float:
    """Relative difference of all gradients of six layers between the rival and ours."""
    config = TrainConfig(steps=1, batch_size=1, precision="bf16")
    trainer = Trainer(size.model(6, 0.5), config, size, device)
    found = []
    for _ in range(2):
        trainer.optimizer.zero_grad()
        add_gradients(trainer.model, config, [trainer.piece(4)])
        found.append([group.grads.clone() for group in trainer.groups])
        install_rival(trainer.model, device)
    pairs = list(zip(*found, strict=True))
    return max(float((theirs - ours).norm() / ours.norm()) for ours, theirs in pairs)


def rival_gate(size: Size, device: str) -> dict[str, Any]:
    error = rival_error(size, device)
    return {"gradient_difference": error, "passed": error < 0.03}  # each within 0.01 of fp32


def compiled(size: Size, device: str, *, depth: int, samples: int, pieces: int) -> dict[str, Any]:
    """The rival's optimiser step: fp32 weights, every block computed again, AdamW as ours, once for
    as many samples as ours."""
    gate = rival_gate(size, device)
    free()
    config = TrainConfig(steps=1, batch_size=1, precision="bf16")
    trainer = Trainer(size.model(depth), config, size, device)
    trainer.graphs = None  # the rival launches its kernels one by one
    parts = [trainer.piece(samples, seed) for seed in range(pieces)]
    install_rival(trainer.model, device)
    first = seconds(lambda: trainer.step(parts[:1]))
    with CardLoad() as load:
        took = [seconds(lambda: trainer.step(parts)) for _ in range(3)]
    return {
        **gate,
        "first_step_seconds": first,
        "all": took,
        "load": load.found,
        "samples": samples * pieces,
        "piece": samples,
        **rates(trainer, samples * pieces, statistics.median(took)),
        "recompute": {"all": depth},
    }


def stages(size: Size, device: str, small: bool) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, seconds that it takes about, and what it does."""
    deep, deeper, piece = (3, 4, 3) if small else (400, 1000, 26)
    full: dict[str, Any] = {"weights": "fp32", "depth": deep, "samples": max(piece // 2, 1)}
    low: dict[str, Any] = {"weights": "bf16", "depth": deep, "samples": piece}
    split: dict[str, Any] = {"weights": "split", "depth": deep, "samples": piece}
    yield "gate", 20, lambda: gate(size, device, piece)
    yield "rounding", 12, lambda: rounding(size, device)
    yield "curves", 40, lambda: curves(size, device)
    # 260 samples a step, about as many as at 1000 layers; the rival takes as many
    yield "step bf16", 40, lambda: step(size, device, pieces=10, **low)
    yield "profile", 8, lambda: profile(size, device, samples=piece)
    yield "step split", 25, lambda: step(size, device, pieces=4, **split)
    yield "step fp32", 25, lambda: step(size, device, pieces=8, **full)
    yield "rival gate", 30, lambda: rival_gate(size, device)
    rival: dict[str, Any] = {"depth": deep, "samples": 2 * piece, "pieces": 5}
    yield "compiled", 100, lambda: compiled(size, device, **rival)
    depths = (deep // 4 or 1, deeper)
    yield "per layer", 60, lambda: per_layer(size, device, samples=piece, depths=depths)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stages", nargs="*", help="only these")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size(64, 2, 4, 8) if args.small else Size()
    began = time.perf_counter()
    result: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "released_tokens_per_second": RELEASED,
    }
    for name, about, run in stages(size, device, args.small):
        if args.stages and name not in args.stages:
            continue
        if time.perf_counter() - began + about > args.budget:
            result[name] = "not run: beyond the budget"
            print(name, result[name], flush=True)
            continue
        try:
            result[name] = run()
        except torch.OutOfMemoryError as error:
            result[name] = {"out_of_memory": str(error)[:300]}
        gc.collect()
        shown = {k: v for k, v in result[name].items() if k != "losses" or name != "curves"}
        print(f"[{time.perf_counter() - began:6.1f} s] {name}: {json.dumps(shown)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
        if isinstance(result[name], dict) and result[name].get("passed") is False:
            raise SystemExit(f"{name}: the gate failed; no time is taken")


if __name__ == "__main__":
    main()
