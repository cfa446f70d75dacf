"""What of the training step has not been measured yet, in one command, most telling first.

    python benchmarks/step_gpu.py [--minutes 12] [--only NAME …] [--out FOLDER] [--json FILE]
    python benchmarks/step_gpu.py --small --out FOLDER         (a trial of the code on a CPU)

First the kernels against fp64 on the GPU; where that fails, nothing is timed. Then one script after
the other, each within its seconds, as long as the minutes last; what a script has written stays
when it is stopped. `mvsplit bench page` puts the results into docs/performance.md.

Cost: twelve minutes of one H200 for all, six for the first three. None of the scripts here outlives
this one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
GATE = (
    "tests/kernels/test_capture.py",
    "tests/kernels/test_gpu_block.py",
    "tests/kernels/test_low_adamw.py",
    "tests/kernels/test_masked_attention.py",
    "tests/kernels/test_split_adamw.py",
    "tests/training/test_graphs.py",
)
# Name of the result, seconds it may take, script and its arguments.
WORK: dict[str, tuple[int, tuple[str, ...]]] = {
    "train_step": (
        150,
        ("train_step.py", "--stages", "gate", "rounding", "step bf16", "step split", "step fp32",
         "compiled", "--budget", "145"),
    ),
    "thousand_layers": (115, ("thousand_layers.py", "--stages", "learn", "--budget", "105")),
    "step_classes": (80, ("step_classes.py", "--budget", "65")),
    "train_step_layers": (105, ("train_step.py", "--stages", "per layer", "rival gate")),
    "recipe": (180, ("recipe.py", "--seeds", "0", "--budget", "170")),
    "thousand_layers_resume": (
        50,
        ("thousand_layers.py", "--stages", "resume", "--resume-depth", "24"),
    ),
    "masked_attention": (
        35,
        ("masked_attention.py", "--ways", "cudnn, no mask", "cudnn with zero keys"),
    ),
}  # fmt: skip


def run(command: list[str], limit: float) -> int:
    """The exit status of a command, 124 where it took too long. All that it has started ends."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        for signal_, wait in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)


def result_of(name: str, folder: Path, small: bool) -> Path:
    """NAME_h200_DATE.json, where NAME up to its script's comes first, for the page reads it so."""
    scripts = ("masked_attention", "thousand_layers", "train_step", "step_classes", "recipe")
    script = next(script for script in scripts if name.startswith(script))
    rest = name.removeprefix(script)
    device = "cpu" if small else "h200"
    return folder / f"{script}_{device}_{datetime.date.today().isoformat()}_again{rest}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--only", nargs="*", choices=WORK)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--json", type=Path, help="what was run, and how it ended")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + 60 * args.minutes
    said: dict[str, object] = {"date": datetime.date.today().isoformat()}
    if not args.small:
        gate = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *GATE]
        if status := run(gate, min(90, end - time.monotonic())):
            raise SystemExit(f"the gate failed with status {status}: nothing is timed")
    for name, (seconds, command) in WORK.items():
        if (args.only and name not in args.only) or (args.small and name == "masked_attention"):
            continue
        if end - time.monotonic() < seconds:
            print(f"{name}: not begun, {seconds} s do not fit", flush=True)
            continue
        out = result_of(name, args.out.resolve(), args.small)
        script, *options = command
        small = ["--small", *(["--steps", "50"] if name == "recipe" else [])] if args.small else []
        given = [str(ROOT / "benchmarks" / script), *options, *small, "--json", str(out)]
        began = time.monotonic()
        status = run([sys.executable, *given], seconds)
        took = time.monotonic() - began
        there = str(out) if out.exists() else None
        said[name] = {"status": status, "seconds": took, "result": there}
        print(f"{name}: status {status} after {took:.0f} s, {there or 'no result'}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
