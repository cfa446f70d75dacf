"""Claim: FSDP2 trains 400 layers on N GPUs at nearly N times the rate of one, and 1000 layers fit.

First every GPU trains a network of 400 layers alone, all at once, so that one GPU and N are
measured in the same minute on the same machine. Then they train one network together, sharded, in
several layouts. At last they take one step of 1000 layers, if its state fits. A sample has 256
image and 64 text tokens at D = 1024; the batch per GPU is the same throughout; the step holds the
clip by the true global norm and the update.

Gate: a small network has the same losses sharded as alone, to rounding.

    torchrun --nproc-per-node 8 benchmarks/parallel_step.py [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/parallel_step.py --trial        (two CPU processes)

Cost: about three minutes on eight GPUs; half a minute for the trial, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.builders import build_model
from mvsplit.training.config import ParallelConfig
from mvsplit.training.distributed import (
    from_each,
    joined,
    launched_device,
    launched_rank,
    launched_world,
    world,
)
from mvsplit.training.memory_plan import Planner
from mvsplit.training.optimizer import AdamW, clip_gradients_, flatten_parameters, global_norm
from mvsplit.training.step import Piece, add_gradients

TEXT = 64
LAYOUTS = {
    "4 blocks a unit": ParallelConfig(unit=4),
    "8 blocks a unit": ParallelConfig(unit=8),
    "8 blocks a unit, 2 ahead": ParallelConfig(unit=8, prefetch=2),
    "8 blocks a unit, kept after forward": ParallelConfig(unit=8, reshard=False),
}
STATE_BYTES = 24  # of a sharded parameter: weight, copy, gradient as it comes and as it is kept, 8


@dataclass(frozen=True)
class Size:
    """Small for a trial on CPUs."""

    depth: int = 400
    deep: int = 1000
    width: int = 1024
    heads: int = 8
    side: int = 16
    samples: int = 64  # on each GPU
    steps: int = 6

    @property
    def tokens(self) -> int:
        return self.side**2 + TEXT

    def model(self, depth: int) -> DiTConfig:
        return DiTConfig(
            depth=depth,
            width=self.width,
            heads=self.heads,
            ffn_width=3 * self.width,
            channels=128,
            text_width=self.width,
            rule=RuleConfig(name="mvsplit", beta=0.05),
        )


TRIAL = Size(depth=6, deep=12, width=32, heads=2, side=3, samples=2, steps=3)


class Trainer:
    """A network with its optimiser, and batches of noise; the same code as a run's step."""

    def __init__(self, model: DiTConfig, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = build_model(model, config, device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.groups = flatten_parameters(self.model)
        self.optimizer = AdamW(self.groups, config)
        self.planner = Planner(self.model, config, device)

    def piece(self, size: Size, samples: int, seed: int) -> Piece:
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        return Piece(
            data=draw(samples, 128, size.side, size.side),
            noise=draw(samples, 128, size.side, size.side),
            times=torch.rand(samples, generator=generator, device=self.device),
            text=draw(samples, TEXT, size.width),
            text_valid=None,
        )

    def step(self, piece: Piece, tokens: int, lr: float = 1e-4) -> float:
        """The loss of this process's piece."""
        self.planner.before(tokens)
        self.optimizer.zero_grad()
        losses = add_gradients(self.model, self.config, [piece])
        self.optimizer.collect_grads()
        loss, norm = torch.stack([losses.mean(), global_norm(self.groups)]).tolist()
        clip_gradients_(self.groups, norm, self.config.clip)
        self.optimizer.step(lr)
        return loss


def rows(piece: Piece, share: slice) -> Piece:
    return replace(
        piece,
        data=piece.data[share],
        noise=piece.noise[share],
        times=piece.times[share],
        text=piece.text[share],
    )


def config(parallel: ParallelConfig | None = None, **changes: Any) -> TrainConfig:
    known = TrainConfig(steps=1, batch_size=1, parallel=parallel or ParallelConfig())
    return replace(known, **changes)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(trainer: Trainer, size: Size, steps: int, warm: int = 2) -> dict[str, Any]:
    """The median step of this process, and what all of them made of it."""
    piece = trainer.piece(size, size.samples, seed=launched_rank())
    tokens = size.samples * size.tokens
    times = []
    for _ in range(warm + steps):
        synchronise(trainer.device)
        start = time.perf_counter()
        trainer.step(piece, tokens)
        synchronise(trainer.device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[warm:])
    on_gpu = trainer.device.type == "cuda"
    return {
        "seconds": seconds,
        "tokens_per_second": tokens * world() / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "parameters": trainer.parameters,
    }


def gate_losses(size: Size, device: torch.device) -> list[float]:
    """Four steps of six layers in fp32; each process has its rows of the same batch."""
    small = replace(size, width=min(size.width, 256), heads=2)
    trainer = Trainer(small.model(6), config(ParallelConfig(unit=4)), device)
    ranks = launched_world()
    whole = trainer.piece(small, 2 * ranks, seed=7)
    share = slice(2 * launched_rank(), 2 * launched_rank() + 2) if world() > 1 else slice(None)
    found = []
    for _ in range(4):
        each = from_each(trainer.step(rows(whole, share), len(whole.data) * small.tokens, 1e-3))
        found.append(statistics.fmean(each))
    return found


def alone(size: Size, device: torch.device) -> dict[str, Any]:
    """One GPU, with weights that fit on it."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    large = device.type == "cpu" or memory > 120 * 2**30
    weights = "fp32" if large else "bf16"
    trainer = Trainer(size.model(size.depth), config(precision="bf16", weights=weights), device)
    return measure(trainer, size, size.steps) | {"weights": weights}


def together(size: Size, device: torch.device) -> dict[str, Any]:
    found = {}
    for name, layout in LAYOUTS.items():
        free(device)
        trainer = Trainer(size.model(size.depth), config(layout, precision="bf16"), device)
        found[name] = measure(trainer, size, size.steps)
        del trainer
    return found


def deep(size: Size, device: torch.device) -> dict[str, Any]:
    """One step of the deepest network, or why not."""
    free(device)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiT(size.model(size.deep)).parameters())
    need = STATE_BYTES * parameters / world()
    if device.type == "cuda" and need > 0.8 * torch.cuda.mem_get_info(device)[0]:
        return {"not_run": f"needs {need / 2**30:.0f} GiB a GPU for its state"}
    layout = config(ParallelConfig(unit=8), precision="bf16")
    trainer = Trainer(size.model(size.deep), layout, device)
    return measure(trainer, replace(size, samples=max(size.samples // 4, 1)), 1, warm=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="store_true", help="small, on CPUs")
    parser.add_argument("--samples", type=int, default=Size.samples)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size = TRIAL if args.trial else Size(samples=args.samples)
    on_gpu = torch.cuda.is_available() and not args.trial
    device = torch.device(launched_device("cuda") if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    expected = gate_losses(size, device)
    one = alone(size, device)
    free(device)
    with joined(timeout=600):
        found = gate_losses(size, device)
        worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        if not worst < 1e-4:
            raise SystemExit(f"sharded losses differ by {worst:.1e}; no time is taken")
        many = together(size, device)
        thousand = deep(size, device)
        ranks = world()
    if launched_rank():
        return
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"torchrun --nproc-per-node {ranks} benchmarks/parallel_step.py"
        + (" --trial" if args.trial else f" --samples {size.samples}"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "processes": ranks,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "largest_difference_of_losses": worst,
        "samples_on_each": size.samples,
        "layers": size.depth,
        "alone": one,
        "sharded": many,
        "deep": {"layers": size.deep, **thousand},
    }
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def report(result: dict[str, Any]) -> None:
    one, ranks = result["alone"], result["processes"]
    difference = result["largest_difference_of_losses"]
    print(f"{result['layers']} layers, {result['device']}; losses agree to {difference:.1e}")
    shown = {f"alone ({one['weights']} weights)": (one, 1)}
    shown |= {name: (line, ranks) for name, line in result["sharded"].items()}
    if "seconds" in result["deep"]:
        shown[f"{result['deep']['layers']} layers, one step"] = (result["deep"], ranks)
    for name, (line, count) in shown.items():
        rate = line["tokens_per_second"]
        peak = f"{line['peak_gib']:6.1f} GiB" if line["peak_gib"] else ""
        share = f"{rate / count / one['tokens_per_second']:6.1%} of one" if count > 1 else ""
        print(f"{name:38}{count:3} {line['seconds']:8.3f} s {rate:12,.0f} tokens/s {share} {peak}")
    if "not_run" in result["deep"]:
        print(f"{result['deep']['layers']} layers: not run, {result['deep']['not_run']}")


if __name__ == "__main__":
    main()
