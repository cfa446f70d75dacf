"""What of the training step has not been measured yet, in one command, most telling first.

    python benchmarks/step_gpu.py [--minutes 15] [--only NAME …] [--out FOLDER] [--json FILE]
    python benchmarks/step_gpu.py --small --out FOLDER         (a trial of the code on a CPU)

First the kernels against fp64 on the GPU. Then one script after the other, each within its seconds
and as long as the minutes last; what a script has written stays when it is stopped. Where the
kernels' tests do not pass, what has no gate of its own is not begun, for its times would be of
kernels that are wrong. What failed is named at the end, and the status is 1. `mvsplit bench page`
puts the results into docs/performance.md.

Cost: 15 minutes on one H200 for everything. What still runs when --minutes are over is stopped, and
what it has written stays.
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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NO_SMALL = ("ffn_products", "masked_attention", "fused_ops_merge")  # run on a GPU only
ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_hopper_merge.py",
    "tests/kernels/test_hopper_block_product.py",
    "tests/kernels/test_hopper_unit_heads.py",
    "tests/kernels/test_triton_attention_ffn.py",
    "tests/kernels/test_low_adamw.py",
    "tests/kernels/test_split_adamw.py",
    "tests/kernels/test_gpu_block.py",
    "tests/kernels/test_masked_attention.py",
    "tests/kernels/test_triton_split_merge.py",
)


@dataclass(frozen=True)
class Work:
    """A script that is run.

    Attributes:
        least, most: seconds without which it is not begun, and that it may take.
        command: script and arguments.
        budget: whether the script takes `--budget`.
        gated: whether it compares what it times with the truth before, and ends where that is off.
    """

    least: int
    most: int
    command: tuple[str, ...]
    budget: bool = True
    gated: bool = False


_LONG = "26 × (256+64), nothing"
_WAYS = (
    "all products by libraries",
    "norm and rotation on their own",
    "attention by libraries",
    "attention without CUDA C++",
    "gradients of attention by cudnn",
    "merge without clusters",
    "q, k, v copied",
)
_UNIT_HEADS = (
    ", 64 queries", " in CUDA C++, gradients by it", " in CUDA C++, gradients by cudnn",
)  # fmt: skip
_SHORT = "16 × (256+32 masked), packed"
WORK: dict[str, Work] = {
    "ffn_products": Work(
        45, 75, ("ffn_products.py", "--seconds", "65"), budget=False, gated=True
    ),
    "train_step": Work(
        110, 170, ("train_step.py", "--stages", "gate", "step bf16", "compiled"), gated=True
    ),
    "step_classes": Work(
        15, 130,
        ("step_classes.py", "--only", _LONG, *(f"{_LONG}, {way}" for way in _WAYS[:2]), _SHORT,
         *(f"{_SHORT}, {way}" for way in _WAYS[:2]), *(f"{_LONG}, {way}" for way in _WAYS[2:]),
         f"{_SHORT}, attention by libraries", f"{_SHORT}, attention without CUDA C++",
         f"{_SHORT}, merge in clusters"),
    ),
    "thousand_layers": Work(85, 190, ("thousand_layers.py", "--stages", "learn")),
    "train_step_weights": Work(30, 60, ("train_step.py", "--stages", "step split", "step fp32")),
    "fused_ops_merge": Work(
        15, 70, ("fused_ops.py", "--ops", "merge"), budget=False, gated=True
    ),
    "recipe": Work(120, 185, ("recipe.py", "--seeds", "0")),
    "train_step_layers": Work(70, 105, ("train_step.py", "--stages", "per layer")),
    "train_step_rounding": Work(15, 25, ("train_step.py", "--stages", "rounding")),
    "thousand_layers_resume": Work(
        25, 50, ("thousand_layers.py", "--stages", "resume", "--resume-depth", "24"), budget=False
    ),
    "masked_attention": Work(
        20, 75,
        ("masked_attention.py", "--ways", "cudnn, no mask", "cudnn with zero keys",
         *(f"unit heads{which}" for which in _UNIT_HEADS)),
        budget=False, gated=True,
    ),
}  # fmt: skip


def run(command: list[str], limit: float) -> int:
    """The exit status of a command, 124 where it took too long. All that it has started ends."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
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
    script = WORK[name].command[0].removesuffix(".py")
    rest = name.removeprefix(script)
    device = "cpu" if small else "h200"
    return folder / f"{script}_{device}_{datetime.date.today().isoformat()}_late{rest}.json"


def run_tests(limit: float) -> dict[str, Any]:
    """The kernels against fp64 on the GPU, eight processes at a time."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    parallel = ["-n", "8"] if find_spec("xdist") else []
    status = run([*command, *parallel, *TESTS], limit)
    return {"status": status, "seconds": time.monotonic() - began}


def run_work(name: str, out: Path, left: float, small: bool) -> dict[str, Any]:
    """Runs a script as long as there is time for; how it ended."""
    work = WORK[name]
    script, *options = work.command
    given = [str(ROOT / "benchmarks" / script), *options, "--json", str(out)]
    limit = min(work.most, left)
    if work.budget:
        given += ["--budget", f"{limit - 8:.0f}"]
    if small:
        given += ["--small", *(["--steps", "50"] if script == "recipe.py" else [])]
    began = time.monotonic()
    status = run([sys.executable, *given], limit)
    took = time.monotonic() - began
    there = str(out) if out.exists() else None
    print(f"{name}: status {status} after {took:.0f} s, {there or 'no result'}", flush=True)
    return {"status": status, "seconds": took, "result": there}


def not_begun(work: Work, left: float, proven: bool) -> str | None:
    """Why a script is not begun, None where it is.

    Args:
        left: seconds.
        proven: whether the kernels' tests passed, or were not asked for.
    """
    if not (proven or work.gated):
        return "for the kernels' tests did not pass, and it has no gate of its own"
    return f"{left:.0f} s are left of {work.least}" if left < work.least else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--only", nargs="*", choices=["tests", *WORK])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--json", type=Path, help="what was run, and how it ended")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + 60 * args.minutes
    said: dict[str, Any] = {"date": datetime.date.today().isoformat()}

    def keep(name: str, found: dict[str, Any]) -> None:
        said[name] = found
        if args.json:
            args.json.write_text(json.dumps(said, indent=1) + "\n")

    wanted = args.only or ["tests", *WORK]
    if "tests" in wanted and not args.small:
        keep("tests", run_tests(min(90, end - time.monotonic())))
        print(f"tests: {said['tests']}", flush=True)
    proven = "tests" not in said or said["tests"]["status"] == 0
    for name, work in WORK.items():
        if name not in wanted or (args.small and name in NO_SMALL):
            continue
        left = end - time.monotonic()
        if why_not := not_begun(work, left, proven):
            print(f"{name}: not begun, {why_not}", flush=True)
            continue
        keep(
            name, run_work(name, result_of(name, args.out.resolve(), args.small), left, args.small)
        )
    if failed := [n for n, e in said.items() if isinstance(e, dict) and e["status"]]:
        raise SystemExit(f"not as they should be: {', '.join(failed)}")


if __name__ == "__main__":
    main()
