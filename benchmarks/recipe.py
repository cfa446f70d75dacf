"""Claim: with bf16 weights and moments of three bytes 400 layers learn as with fp32 AdamW.

Networks of 400 layers at D = 128 learn the coloured shapes for 1,000 steps with the run's own step:
fp32 weights and fp32 AdamW, and what `train.weights` offers instead, from the same seeds, so that
all see the same pictures, noise and times. What is compared is the mean loss of the last 100 steps;
it may differ by at most 2 %. Each is a process, all at once on one GPU.

    python benchmarks/recipe.py [--variants fp32 bf16 …] [--seeds 0 1] [--budget 150] [--json FILE]
    python benchmarks/recipe.py --small         (a trial of the code on a CPU)

Cost: two and a half minutes on one H200 for two variants and one seed, twice that for the default.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig
from mvsplit.training.builders import build_state
from mvsplit.training.step import train_step

LAST = 100  # steps whose mean loss is compared
LIMIT = 0.02
WARM = 20  # steps after which time is taken: graphs are recorded by then
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"weights": "fp32"},
    "split": {"weights": "split"},
    "bf16": {"weights": "bf16"},
    "fp32 throughout": {"weights": "fp32", "precision": "fp32"},
}


def experiment(variant: str, seed: int, steps: int, small: bool) -> Experiment:
    width = 32 if small else 128
    settings: dict[str, Any] = {"precision": "bf16"} | VARIANTS[variant]
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
            batch_size=8 if small else 32,
            lr=1e-3,
            warmup=100,
            ema_decay=0.0,
            seed=seed,
            **settings,
        ),
    )


def learn(variant: str, seed: int, out: Path, args: argparse.Namespace) -> None:
    """One run, in a process of its own; `out` has its losses every so often."""
    config = experiment(variant, seed, args.steps, args.small)
    deadline = time.perf_counter() + args.budget
    state = build_state(config)
    losses: list[float] = []
    began = time.perf_counter()
    while state.step < args.steps and time.perf_counter() < deadline:
        losses.append(train_step(state, config.train)["loss"])
        if state.step == WARM:
            began = time.perf_counter()
        if state.step % 50 == 0 or state.step == args.steps:
            each = (time.perf_counter() - began) / max(1, state.step - WARM)
            temporary = out.with_suffix(".tmp")
            temporary.write_text(json.dumps({"losses": losses, "seconds_a_step": each}))
            temporary.replace(out)


class Stopped(Exception):
    """SIGTERM has arrived."""


def stop(*_: object) -> None:
    raise Stopped


def run_all(args: argparse.Namespace, folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What each run has left behind, by variant and seed, also where SIGTERM ends them early. No
    process outlives this one."""
    signal.signal(signal.SIGTERM, stop)
    files = {(v, s): folder / f"{v}-{s}.json" for s in args.seeds for v in args.variants}
    shared = [f"--steps={args.steps}", f"--budget={args.budget}", *(["--small"] * args.small)]
    processes = []
    try:
        for (variant, seed), out in files.items():
            child = ["--child", variant, str(seed), str(out), *shared]
            processes.append(subprocess.Popen([sys.executable, __file__, *child]))
        while any(process.poll() is None for process in processes):
            time.sleep(0.2 if args.small else 5)
            print(
                ", ".join(f"{v} {s}: {progress(out)}" for (v, s), out in files.items()), flush=True
            )
    except Stopped:
        print("stopped", flush=True)
    finally:
        for process in processes:
            process.kill()
    return {run: json.loads(out.read_text()) for run, out in files.items() if out.exists()}


def progress(out: Path) -> str:
    if not out.exists():
        return "-"
    found = json.loads(out.read_text())
    return f"{len(found['losses'])} steps of {found['seconds_a_step'] * 1e3:.0f} ms"


def compare(runs: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """The mean loss of the last steps that all have taken, and the gaps to fp32."""
    steps = min((len(run["losses"]) for run in runs.values()), default=0)
    last = {
        run: statistics.fmean(found["losses"][max(0, steps - LAST) : steps])
        for run, found in runs.items()
        if steps
    }
    gaps = {
        f"{name}, seed {seed}": loss / last["fp32", seed] - 1
        for (name, seed), loss in last.items()
        if name != "fp32" and ("fp32", seed) in last
    }
    names = {run: f"{run[0]}, seed {run[1]}" for run in runs}
    return {
        "steps": steps,
        "mean_of_last": {names[run]: loss for run, loss in last.items()},
        "gaps": gaps,
        "seconds_a_step": {names[run]: found["seconds_a_step"] for run, found in runs.items()},
        "losses": {names[r]: [round(x, 5) for x in found["losses"]] for r, found in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=["fp32", "bf16"], choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        variant, seed, out = args.child
        learn(variant, int(seed), Path(out), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(run_all(args, Path(folder)))
    wanted = (len(args.variants) - 1) * len(args.seeds)
    whole = found["steps"] == args.steps and len(found["gaps"]) == wanted
    config = experiment("fp32", 0, args.steps, args.small)
    result = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "depth": config.model.depth,
        "width": config.model.width,
        "batch_size": config.train.batch_size,
        "of_steps": args.steps,
        "passed": whole and all(abs(gap) <= LIMIT for gap in found["gaps"].values()),
        **found,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "losses"}, indent=1))
    if not result["passed"]:
        raise SystemExit("the losses differ by more than 2 %, or a run did not end")


if __name__ == "__main__":
    main()
