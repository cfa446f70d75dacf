"""Claim: N GPUs train 400 layers at more than 92 % of N times the rate of one, and 1000 layers fit.

First every GPU trains alone, all at once, so that one GPU and N are measured in the same minute on
the same machine. Then they train one network together, which each of them holds whole, with fp32
and with bf16 weights; sharded by FSDP2 in several layouts; 1000 layers; with and without a save in
the background; and a checkpoint of N processes goes on on N/2. A sample has 256 image and 64 text
tokens at D = 1024; the step holds the clip by the true global norm and the update.

Gates: the mean of gradients over the ranks is that of fp64, to one rounding; a small network has
the same losses and gradient norms in every layout as alone, to rounding.

    torchrun --nproc-per-node 8 benchmarks/parallel_step.py [--stages …] [--batch 1024] [--json F]
    torchrun --nproc-per-node 2 benchmarks/parallel_step.py --trial        (two CPU processes)

Without --batch, each GPU has 104 samples a step whatever their number; with it, its share of that.
A stage that does not fit into the budget is left out, and listed so. --json adds to what the file
holds. `resume` goes on from what `save` left in --folder.

Cost: about three minutes on two H200. --trial takes half a minute on two CPU cores: it checks that
the script works, and its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from parallel_parts import exchange_errors, link_rates, save_and_step, saved_again
from step_parts import Size, Trainer, free, peak_gib, rates, seconds

from mvsplit.models import DiT
from mvsplit.training import TrainConfig
from mvsplit.training.config import ParallelConfig
from mvsplit.training.distributed import (
    from_each,
    joined,
    launched_rank,
    launched_world,
    rank,
    world,
)
from mvsplit.training.pieces import Piece, cut

LAYOUTS = {
    "8 blocks a unit": ParallelConfig(layout="shard", unit=8),
    "8 blocks a unit, kept after forward": ParallelConfig(layout="shard", unit=8, reshard=False),
}
FP32_BYTES = 24  # of a sharded parameter: weight, copy, gradient as it comes and as it is kept, 8
SAMPLES = 104  # a step on each GPU, as in train_step.py


@dataclass(frozen=True)
class Job:
    """What is measured: small for a trial on CPUs."""

    size: Size
    device: str
    depth: int = 400
    deep: int = 1000
    samples: int = SAMPLES  # a step on each GPU
    piece: int = 26
    piece_fp32: int = 13
    steps: int = 3
    saved: int = 50  # layers whose state is saved: steps and copies both grow with them
    window: int = 40  # steps between two saves

    def pieces(self, weights: str) -> list[int]:
        """Samples of each piece of a step, as equal as they can be; as in train_step.py where
        nothing is asked for: fp32 weights leave less room."""
        most = self.piece if weights == "bf16" else self.piece_fp32
        return [r.stop - r.start for r in cut(self.samples, -(-self.samples // most))]


def config(**changes: Any) -> TrainConfig:
    return replace(TrainConfig(steps=1, batch_size=1), **changes)


# Gates


def losses_of(job: Job, layout: ParallelConfig) -> list[float]:
    """Loss and gradient norm of four steps of six layers in fp32; each process has its rows of the
    same batch, or all of them where it is alone."""
    small = replace(job.size, width=min(job.size.width, 256), heads=2)
    # ε above the rounding of gradients, of which AdamW would else make steps
    trainer = Trainer(small.model(6), config(parallel=layout, eps=1e-5), small, job.device)
    whole = trainer.piece(2 * launched_world(), seed=7)
    first = 2 * launched_rank()
    share = slice(first, first + 2) if world() > 1 else slice(None)
    found = []
    for _ in range(4):
        loss, norm = trainer.step([rows(whole, share)], lr=1e-3)
        found += [statistics.fmean(from_each(loss)), norm]
    return found


def rows(piece: Piece, share: slice) -> Piece:
    return replace(
        piece,
        data=piece.data[share],
        noise=piece.noise[share],
        times=piece.times[share],
        text=piece.text[share],
    )


def gate(job: Job, expected: list[float]) -> dict[str, Any]:
    """The largest relative difference of losses and norms from those of one process."""
    layouts = {"replicated": ParallelConfig(layout="replicate"), **LAYOUTS}
    worst = {}
    for name, layout in layouts.items():
        pairs = zip(losses_of(job, layout), expected, strict=True)
        worst[name] = max(abs(found / wanted - 1) for found, wanted in pairs)
    exchange = exchange_errors(job.device)
    passed = max(worst.values()) < 1e-4 and exchange["passed"]
    return {"largest_difference": worst, "exchange": exchange, "passed": passed}


# Steps


def parts_of(trainer: Trainer, job: Job, weights: str) -> list[Piece]:
    """This process's pieces of a step."""
    sizes = job.pieces(weights)
    return [trainer.piece(size, 100 * launched_rank() + k) for k, size in enumerate(sizes)]


def measure(trainer: Trainer, job: Job, weights: str) -> dict[str, Any]:
    """The median step of this process, and what all of them made of it."""
    parts = parts_of(trainer, job, weights)
    first = seconds(lambda: trainer.step(parts[:1]))
    steps = job.steps + len({len(part.data) for part in parts})  # until every size is recorded
    took = [seconds(lambda: trainer.step(parts)) for _ in range(steps)][-job.steps :]
    exchange = [seconds(lambda: trainer.optimizer.collect_grads()) for _ in range(2)][1]
    update = [seconds(lambda: trainer.optimizer.step(0.0)) for _ in range(2)][1]
    found = rates(trainer, job.samples, statistics.median(took))
    return {
        "samples_on_each": job.samples,
        "piece": len(parts[0].data),
        "pieces": len(parts),
        "first_step_seconds": first,
        "all": took,
        **found,
        "tokens_per_second": found["tokens_per_second"] * world(),
        "exchange_seconds": exchange,
        "update_seconds": update,
        "parameters": trainer.parameters,
    }


def step(job: Job, weights: str, parallel: ParallelConfig) -> dict[str, Any]:
    """400 layers."""
    free()
    settings = config(precision="bf16", weights=weights, parallel=parallel)
    trainer = Trainer(job.size.model(job.depth), settings, job.size, job.device)
    return measure(trainer, job, weights) | {"weights": weights}


def sharded(job: Job) -> dict[str, Any]:
    """400 layers by FSDP2, kernels launched one by one."""
    found = {}
    for name, layout in LAYOUTS.items():
        found[name] = step(replace(job, steps=1, samples=job.pieces("fp32")[0]), "fp32", layout)
    return found


def thousand(job: Job, layout: str) -> dict[str, Any]:
    """Steps of 1000 layers on one piece of each GPU; with bf16 weights, unless fp32 would fit."""
    free()
    parallel = ParallelConfig(layout=layout, unit=8)
    weights = "bf16"
    if layout == "shard" and job.device != "cpu":
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DiT(job.size.model(job.deep)).parameters())
        room = torch.cuda.get_device_properties(job.device).total_memory
        weights = "fp32" if FP32_BYTES * parameters / world() < 0.7 * room else "bf16"
    settings = config(precision="bf16", weights=weights, parallel=parallel)
    trainer = Trainer(job.size.model(job.deep, beta=0.03), settings, job.size, job.device)
    parts = [trainer.piece(job.pieces(weights)[0], launched_rank())]
    losses, took = [], []
    for number in range(1, 5):
        lr = 1e-4 * min(1.0, number / 5)
        took.append(seconds(lambda lr=lr: losses.append(trainer.step(parts, lr))))
    found = rates(trainer, len(parts[0].data), min(took[2:]))
    return {
        "samples_on_each": len(parts[0].data),
        "first_step_seconds": took[0],
        **found,
        "tokens_per_second": found["tokens_per_second"] * world(),
        "losses": [statistics.fmean(from_each(loss)) for loss, _ in losses],
        "norms": [norm for _, norm in losses],
        "weights": weights,
        "parameters": trainer.parameters,
    }


def saving(job: Job, folder: Path, keep: bool) -> dict[str, Any]:
    """Steps with bf16 weights, with and without a save in the background."""
    free()
    settings = config(precision="bf16", weights="bf16", parallel=ParallelConfig(layout="replicate"))
    trainer = Trainer(job.size.model(job.saved), settings, job.size, job.device)
    found = save_and_step(trainer, parts_of(trainer, job, "bf16"), folder, job.window)
    if not keep and rank() == 0:
        shutil.rmtree(folder)
    return found


def resume(job: Job, folder: Path) -> dict[str, Any]:
    """The checkpoint of `saving` on these processes."""
    free()
    settings = config(precision="bf16", weights="bf16", parallel=ParallelConfig(layout="replicate"))
    trainer = Trainer(job.size.model(job.saved), settings, job.size, job.device)
    return saved_again(trainer, folder) | {"peak_gib": peak_gib()}


def stages(job: Job, args: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Of all processes together: name, seconds that it takes about, and what it does."""
    whole = ParallelConfig(layout="replicate")
    yield "links", 5, lambda: link_rates(job.device)
    yield "replicated bf16", 20, lambda: step(job, "bf16", whole)
    yield "replicated fp32", 20, lambda: step(job, "fp32", whole)
    yield "thousand sharded", 40, lambda: thousand(job, "shard")
    yield "thousand replicated", 30, lambda: thousand(job, "replicate")
    yield "save", 70, lambda: saving(job, args.folder, args.keep)
    yield "sharded", 30, lambda: sharded(job)
    yield "resume", 30, lambda: resume(job, args.folder)


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO if launched_rank() == 0 else logging.WARNING)
    on_gpu = torch.cuda.is_available() and not args.trial
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    job = Job(Size(), device)
    if args.batch:
        size = {"piece": args.piece, "piece_fp32": args.piece}
        job = replace(job, **size, samples=args.batch // launched_world())
    if args.trial:
        small = {
            "depth": 4,
            "deep": 6,
            "samples": 4,
            "piece": 2,
            "piece_fp32": 1,
            "saved": 4,
            "window": 2,
        }
        job = Job(Size(128, 2, 3, 8), device, **small)
    job = replace(job, steps=args.steps)
    result = Result(args, job, on_gpu)
    alone = ("alone bf16", 25, "bf16"), ("alone fp32", 25, "fp32")
    expected = losses_of(job, ParallelConfig()) if args.wants("gate") else []
    for name, about, weights in alone:
        result.run(name, about, lambda w=weights: step(job, w, ParallelConfig()))
    free()
    with ExitStack() as stack:
        stack.enter_context(joined(timeout=600))
        result.run("gate", 15, lambda: gate(job, expected))
        for name, about, run in stages(job, args):
            result.run(name, about, run)


class Result:
    """What was found, on the disk after every stage."""

    def __init__(self, args: argparse.Namespace, job: Job, on_gpu: bool) -> None:
        self._args, self._began = args, time.perf_counter()
        self.found: dict[str, Any] = {}
        if args.json and args.json.exists():
            self.found = json.loads(args.json.read_text())
        self.found |= {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "processes": max(self.found.get("processes", 1), launched_world()),
            "layers": job.depth,
        }
        command = " ".join(["torchrun", f"--nproc-per-node {launched_world()}", *sys.argv])
        self.found["commands"] = [*self.found.get("commands", []), command]

    def run(self, name: str, about: int, stage: Callable[[], Any]) -> None:
        if not self._args.wants(name):
            return
        late = max(from_each(time.perf_counter() - self._began)) + about > self._args.budget
        self.found[name] = "not run: beyond the budget" if late else stage()
        if launched_rank() == 0:
            took = time.perf_counter() - self._began
            print(f"[{took:6.1f} s] {name}: {json.dumps(self.found[name])}", flush=True)
            if self._args.json:
                self._args.json.write_text(json.dumps(self.found, indent=1) + "\n")
        if isinstance(self.found[name], dict) and self.found[name].get("passed") is False:
            raise SystemExit(f"{name}: the gate failed on rank {rank()}; no time is taken")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stages", nargs="*", help="only these")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--trial", action="store_true", help="small, on CPUs")
    parser.add_argument("--batch", type=int, default=0, help="samples of all GPUs together")
    parser.add_argument("--piece", type=int, default=26, help="samples at a time, with --batch")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--folder", type=Path, help="of checkpoints; else `save` makes one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.wants = lambda name: name in args.stages if args.stages else name != "resume" or args.keep
    args.keep = args.folder is not None
    if not args.keep:  # the same on every process
        args.folder = Path(tempfile.gettempdir()) / f"parallel_step_{os.getppid()}"
    return args


if __name__ == "__main__":
    main()
