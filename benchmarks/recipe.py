"""Claim: with bf16 weights and moments of three bytes 400 layers learn as with fp32 AdamW.

Networks of 400 layers at D = 128 learn the coloured shapes for 1,000 steps with the run's own step:
fp32 weights and fp32 AdamW, and what `train.weights` offers instead, from the same seeds, so that
all see the same pictures, noise and times. What is compared is the mean loss of the last 100 steps;
it may differ by at most 2 %. Their CUDA graphs run side by side on one GPU, a thread each: a
network of this width does not fill it.

    python benchmarks/recipe.py [--variants fp32 bf16 …] [--seeds 0 1] [--budget 150] [--json FILE]
    python benchmarks/recipe.py --small         (a trial of the code on a CPU)

Cost: two to three minutes on one H200 for two variants and two seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig
from mvsplit.training.builders import build_state
from mvsplit.training.state import TrainState
from mvsplit.training.step import train_step

LAST = 100  # steps whose mean loss is compared
LIMIT = 0.02
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "fp32"},
    "bf16": {"weights": "bf16"},
    "fp32 throughout": {"weights": "fp32", "precision": "fp32"},
}


def experiment(variant: str, seed: int, steps: int, small: bool) -> Experiment:
    width = 32 if small else 128
    settings: dict[str, Any] = {"precision": "fp32" if small else "bf16"} | VARIANTS[variant]
    if small:
        settings |= {"weights": "fp32", "precision": "fp32"}
    return Experiment(
        model=DiTConfig(
            depth=6 if small else 400,
            width=width,
            heads=2,
            ffn_width=3 * width,
            channels=3,
            patch=4,
            text_width=width,
            rule=RuleConfig(name="mvsplit", beta=0.05),
        ),
        data=DataConfig(dataset="shapes", size=32),
        train=TrainConfig(
            steps=steps,
            batch_size=8 if small else 64,
            lr=1e-3,
            warmup=100,
            ema_decay=0.0,
            seed=seed,
            **settings,
        ),
    )


class Run:
    """One network, on a stream of its own."""

    def __init__(self, variant: str, seed: int, steps: int, small: bool) -> None:
        self.name, self.seed = variant, seed
        self.experiment = experiment(variant, seed, steps, small)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.failure: str | None = None
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        with self.on_stream():
            self.state: TrainState = build_state(self.experiment)

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def go(self, until: int, deadline: float) -> None:
        """Steps to `until`, or what the time allows."""
        try:
            with self.on_stream():
                while self.state.step < until and time.perf_counter() < deadline:
                    found = train_step(self.state, self.experiment.train)
                    self.losses.append(found["loss"])
                    self.norms.append(found["grad_norm"])
        except Exception as error:  # of a thread: said in the result
            self.failure = f"{type(error).__name__}: {error}"[:300]


def compare(runs: list[Run]) -> dict[str, Any]:
    """The mean loss of the last steps that all have taken, and the gaps to fp32."""
    steps = min(len(run.losses) for run in runs)
    last = {
        (run.name, run.seed): statistics.fmean(run.losses[max(0, steps - LAST) : steps])
        for run in runs
    }
    gaps = {
        f"{name}, seed {seed}": loss / last["fp32", seed] - 1
        for (name, seed), loss in last.items()
        if name != "fp32" and ("fp32", seed) in last
    }
    return {
        "steps": steps,
        "mean_of_last": {f"{name}, seed {seed}": loss for (name, seed), loss in last.items()},
        "gaps": gaps,
        "passed": bool(gaps) and all(abs(gap) <= LIMIT for gap in gaps.values()),
        "losses": {f"{r.name}, seed {r.seed}": [round(x, 5) for x in r.losses] for r in runs},
        "failures": {f"{r.name}, seed {r.seed}": r.failure for r in runs if r.failure},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["fp32", "bf16"], choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    deadline = began + args.budget
    runs = [Run(v, s, args.steps, args.small) for s in args.seeds for v in args.variants]
    for run in runs:  # one by one, for a graph cannot be recorded while others allocate
        run.go(min(3, args.steps), deadline)
        print(f"[{time.perf_counter() - began:6.1f} s] {run.name}, seed {run.seed}: recorded", flush=True)  # fmt: skip  # noqa: E501
    threads = [threading.Thread(target=run.go, args=(args.steps, deadline)) for run in runs]
    from_here = time.perf_counter()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(10.0 / len(threads))
        shown = ", ".join(f"{r.name} {r.seed}: {len(r.losses)} {r.losses[-1]:.4f}" for r in runs)
        print(f"[{time.perf_counter() - began:6.1f} s] {shown}", flush=True)
    took = time.perf_counter() - from_here
    found = compare(runs)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "seconds_a_step_of_all": took / max(1, found["steps"] - 3),
        "depth": runs[0].experiment.model.depth,
        "width": runs[0].experiment.model.width,
        **found,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "losses"}, indent=1))
    if not result["passed"]:
        raise SystemExit("the losses differ by more than 2 %, or a run failed")


if __name__ == "__main__":
    main()
