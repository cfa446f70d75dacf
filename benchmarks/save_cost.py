"""Claim: saving in the background costs at most 2 % of the time of the steps between two saves.

What the steps lose is the time of the copy, which they wait for, and at most the processor time of
the thread that writes, where no core is free for it: both over the time of the steps between two
saves. Beside it, because it counts everything but varies by some percent on a machine that others
use too, the clock: windows of as many steps as lie between two saves, in turns without a save, with
one that goes on in the background (and ends within the window), and with one that the steps wait
for; the shortest window of each kind counts.

Gate: the checkpoint holds, bit for bit, the state as it was when the save began, although the steps
have changed it since.

    python benchmarks/save_cost.py [--turns 3] [--json FILE]
    python benchmarks/save_cost.py --preset mvsplit-400l --batch 32 --window 1000 --turns 1

Cost: about eight minutes on two CPU cores for the first command.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mvsplit.presets import get_preset
from mvsplit.training import build_state, train_step
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from mvsplit.training.checkpoint_saver import Saver

TARGET = 0.02


class Bench:
    """A run whose checkpoints go to `folder`, one at a time."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        preset = get_preset(args.preset)
        config = replace(preset.train, device=args.device, probe_every=0)
        if args.batch:
            config = replace(config, batch_size=args.batch, accumulate=1)
        model = replace(preset.model, depth=args.depth or preset.model.depth)
        self.experiment = replace(preset, model=model, train=config)
        self.state = build_state(self.experiment)
        self.saver = Saver(folder, keep=1)
        self.window = args.window or config.save_every

    def steps(self, count: int) -> None:
        for _ in range(count):
            train_step(self.state, self.experiment.train)

    def without(self) -> None:
        self.steps(self.window)

    def background(self) -> None:
        self.saver.begin(self.state.snapshot())
        self.steps(self.window)
        self.saver.wait()

    def blocking(self) -> None:
        self.saver.begin(self.state.snapshot())
        self.saver.wait()
        self.steps(self.window)

    def copying(self) -> float:
        """Seconds that the steps wait for the copy."""
        start = time.perf_counter()
        self.saver.begin(self.state.snapshot())
        seconds = time.perf_counter() - start
        self.saver.wait()
        return seconds

    def writing(self) -> float:
        """Seconds of a processor that the thread takes."""
        start = time.thread_time()
        save_checkpoint(self.saver.folder, self.state.snapshot(), keep=1)
        return time.thread_time() - start


def check(bench: Bench) -> int:
    """Raises SystemExit if a checkpoint is not the state that it was begun with; else its bytes."""
    snapshot = bench.state.snapshot()
    before = copy.deepcopy({f: dict(named) for f, named in snapshot.tensors.items()})
    bench.saver.begin(snapshot)
    bench.steps(2)
    bench.saver.wait()
    path = list_checkpoints(bench.saver.folder)[-1]
    saved = read_checkpoint(path).tensors
    for file, named in before.items():
        for name, tensor in named.items():
            if not torch.equal(saved[file][name], tensor.cpu()):
                raise SystemExit(f"{file}: {name} is not what was to be saved; no time is taken")
    return sum(file.stat().st_size for file in path.iterdir())


def seconds_of(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(bench: Bench, turns: int) -> dict[str, list[float]]:
    kinds = {"without": bench.without, "background": bench.background, "blocking": bench.blocking}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(turns):
        for name, action in kinds.items():
            times[name].append(seconds_of(action))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits-400l-mvsplit")
    for name, value in (("depth", 0), ("batch", 0), ("window", 0), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder) / "checkpoints")
        size = check(bench)
        copying = min(bench.copying() for _ in range(5))
        writing = min(bench.writing() for _ in range(5))
        times = measure(bench, args.turns)
    least = {name: min(found) for name, found in times.items()}
    cost = (copying + writing) / least["without"]
    clock = {name: least[name] / least["without"] - 1 for name in ("background", "blocking")}
    on_gpu = bench.state.device.type == "cuda"
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/save_cost.py --preset {args.preset} --depth {args.depth} "
        f"--batch {args.batch} --window {args.window} --turns {args.turns}",
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "checkpoint_bytes": size,
        "steps_between_saves": bench.window,
        "seconds_of_a_window": times,
        "seconds_of_the_copy": copying,
        "processor_seconds_of_the_writing": writing,
        "cost_at_most": cost,
        "by_the_clock": clock,
        "target": TARGET,
        "met": cost <= TARGET,
    }
    step = least["without"] / bench.window
    print(f"{size / 1e6:,.1f} MB a checkpoint, {step * 1e3:.1f} ms a step, one in {bench.window}")
    print(f"copy {copying * 1e3:.1f} ms, writing {writing * 1e3:.1f} ms of a processor")
    print(f"cost at most {100 * cost:.2f} % (target {100 * TARGET:.0f} %); by the clock: ", end="")
    print(", ".join(f"{name} {100 * share:+.2f} %" for name, share in clock.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
