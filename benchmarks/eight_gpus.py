"""Question: does the paper's step take 3.0 s on eight H200, at 90 % of eight times the rate of one?

The paper's own: 400 layers, D = 1024, a global batch of 1024 samples of 256 image tokens and text
(64 tokens here), AdamW; 4.58 s on eight H100. Here on 1, 2, 4 and 8 GPUs, as many as there are: the
step with bf16 weights, and on all of them the gates, the links, fp32 weights, a step of 1000
layers, whole and sharded, and a save that goes on on half of them. Each line is a run of
`parallel_step.py`, which says what it does; a run that does not fit into the budget is left out.

    python benchmarks/eight_gpus.py [--budget 570] [--json FILE]
    python benchmarks/eight_gpus.py --trial          (one and two CPU processes)
    python benchmarks/eight_gpus.py --predict        (what `mvsplit plan` says, before the run)

Cost: under ten minutes on eight H200. --trial takes a minute on two CPU cores: it checks that the
script works, and its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mvsplit.presets import get_preset
from mvsplit.training.gpus import GPUS
from mvsplit.training.step_plan import Sample, plan_step

BATCH, TEXT = 1024, 64
PIECE = 26  # samples at most: 8,320 tokens, just under two waves of products on an H200
PAPER = {"seconds": 4.58, "gpus": "8 × H100"}
TARGET = {"seconds": 3.0, "of_eight_times_one": 0.9}
RESULTS = Path(__file__).parent / "results"
PREDICTED = RESULTS / "eight_gpus_predicted.json"
SCRIPT = Path(__file__).with_name("parallel_step.py")


@dataclass(frozen=True)
class Line:
    """A run: its name in the result, processes, stages, and seconds that it takes about."""

    name: str
    gpus: int
    stages: tuple[str, ...]
    about: int
    steps: int = 1


def lines(gpus: int) -> Iterator[Line]:
    """All runs on a machine of so many GPUs, in the order of what is wanted most."""
    counts = [n for n in (1, 2, 4, 8) if n <= gpus]
    for n in counts[:-1]:
        yield Line(str(n), n, ("replicated bf16",), 30 + 64 // n, steps=max(1, n // 2))
    most = counts[-1]
    yield Line(str(most), most, ("gate", "links", "replicated bf16"), 60, steps=3)
    yield Line("thousand sharded", most, ("thousand sharded",), 70)
    yield Line("save", most, ("save",), 60)
    if most > 1:
        yield Line("resume", most // 2, ("resume",), 40)
    yield Line("thousand", most, ("thousand replicated",), 45)
    yield Line("fp32", most, ("replicated fp32",), 35, steps=2)
    yield Line("fp32 on one", 1, ("replicated fp32",), 110)


def run(line: Line, args: argparse.Namespace, folder: Path) -> Any:
    """The stages of a line by name, or what went wrong."""
    file = folder / f"{line.name.replace(' ', '_')}.json"
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={line.gpus}"]
    command = [sys.executable, *(launch if line.gpus > 1 else []), str(SCRIPT)]
    command += ["--stages", *line.stages, "--json", str(file), "--folder", str(folder / "saved")]
    command += ["--steps", str(line.steps)]
    command += ["--trial"] if args.trial else ["--batch", str(BATCH), "--piece", str(PIECE)]
    began = time.perf_counter()
    status = _status(command, limit=2 * line.about + 30)
    found = json.loads(file.read_text()) if file.exists() else {}
    kept = {stage: found[stage] for stage in line.stages if stage in found}
    return {
        "gpus": line.gpus,
        **kept,
        "took": time.perf_counter() - began,
        **({"status": status} if status else {}),
    }


def _status(command: list[str], limit: float) -> int | str:
    """Of a command and the processes that it starts, all of which end after `limit` seconds, or
    when this one does."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def scaling(found: dict[str, Any]) -> dict[str, float]:
    """Tokens a second over those of one GPU times their number."""
    rate = {
        name: line["replicated bf16"]["tokens_per_second"] / line["gpus"]
        for name, line in found.items()
        if name.isdigit() and isinstance(line.get("replicated bf16"), dict)
    }
    return {name: each / rate["1"] for name, each in rate.items()} if "1" in rate else {}


def predict() -> dict[str, Any]:
    """What `mvsplit plan` says of the step on 1, 2, 4 and 8 H200."""
    preset = get_preset("mvsplit-400l-h200")
    sample, gpu = Sample(image=256, text=TEXT, source="as given"), GPUS["h200"]
    rows = []
    for weights in ("bf16", "fp32"):
        for n in (1, 2, 4, 8):
            train = replace(
                preset.train,
                weights=weights,
                batch_size=BATCH,
                accumulate=-(-BATCH // (n * PIECE)),
                ema_decay=0.0,
            )
            plan = plan_step(replace(preset, train=train), gpu, n, sample)
            rows.append(
                {
                    "gpus": n,
                    "weights": weights,
                    "layout": plan.layout,
                    "seconds": plan.time.seconds,
                    "tokens_per_second": plan.time.tokens_per_second,
                    "mfu": plan.time.mfu,
                    "gib": plan.memory.allocated / 2**30,
                    "fits": plan.memory.fits,
                    "parts": plan.time.parts,
                    "bytes_sent": plan.time.bytes_sent,
                    "recompute": {r: plan.memory.levels.count(r) for r in set(plan.memory.levels)},
                }
            )
    return {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/eight_gpus.py --predict",
        "batch": BATCH,
        "piece": PIECE,
        "text": TEXT,
        "gpu": asdict(gpu),
        "paper": PAPER,
        "target": TARGET,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=570.0, help="seconds")
    parser.add_argument("--trial", action="store_true", help="small, on CPUs")
    parser.add_argument("--predict", action="store_true", help="write the plan, measure nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.predict:
        PREDICTED.write_text(json.dumps(predict(), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {PREDICTED}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # by way of `finally`
    gpus = 2 if args.trial else torch.cuda.device_count()
    if gpus < 1:
        raise SystemExit("no GPU here; --trial runs on CPUs")
    measure(gpus, args)


def measure(gpus: int, args: argparse.Namespace) -> None:
    """Runs the lines one after the other; what is known is on the disk after each."""
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(gpus):
            late = time.perf_counter() - began + line.about > args.budget
            text = "not run: beyond the budget"
            found[line.name] = {"gpus": line.gpus, "not_run": text} if late else None
            if not late:
                found[line.name] = run(line, args, Path(folder))
            result = {
                "date": datetime.date.today().isoformat(),
                "command": " ".join(["python", *sys.argv]),
                "device": "cpu" if args.trial else torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "batch": None if args.trial else BATCH,
                "paper": PAPER,
                "target": TARGET,
                "scaling": scaling(found),
                "runs": found,
            }
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, share in scaling(found).items():
        step = found[name]["replicated bf16"]
        print(
            f"{name} GPUs: {step['seconds']:.2f} s, {step['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {step['mfu']:.1%}, {share:.1%} of as many times one"
        )
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
