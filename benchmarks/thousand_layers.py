"""Claim: one H200 trains 13.64 billion parameters, all of them, at 40 % of its peak or more.

The preset `mvsplit-1000l-h200` by the run's own step: true global clipping, 7 bytes a parameter, as
little computed again as memory allows. First 30 steps of one piece of 29 samples, whose loss has to
fall (warm-up of 10 steps instead of 1,000, for time); then whole steps of 261 samples, from which
time and MFU are taken. MFU counts 6N and attention, nothing that is computed again, of 989 TFLOP/s;
of all tokens that are computed, and of the real ones (captions are padded to the longest).

A checkpoint has 95 GB, more than the disk of the machine at hand. So saving and resuming is shown
at a depth that fits, with `train.deterministic`: 2 + 2 steps write the files that 4 steps in one go
write, bit for bit.

    python benchmarks/thousand_layers.py [--resume-depth 100] [--budget 170] [--json FILE]
    python benchmarks/thousand_layers.py --small        (a trial of the code on a CPU)

Cost: under three minutes on one H200.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_parts import PEAK, free, peak_gib, seconds, synchronise

from mvsplit.presets import get_preset
from mvsplit.training import Experiment, train
from mvsplit.training.builders import build_loader, build_state
from mvsplit.training.checkpoint import checkpoint_name
from mvsplit.training.pieces import TEXT_LENGTHS
from mvsplit.training.step import train_step
from mvsplit.training.step_time import model_flops

STEPS, WHOLE = 30, 2


def preset(small: bool) -> Experiment:
    found = get_preset("mvsplit-1000l-h200")
    found = replace(found, train=replace(found.train, warmup=10, probe_every=0))
    if not small:
        return found
    model = replace(found.model, depth=4, width=64, heads=2, ffn_width=192, text_width=64)
    config = replace(found.train, precision="fp32", weights="fp32", batch_size=4, accumulate=2)
    return replace(found, model=model, train=config)


def of_pieces(experiment: Experiment, pieces: int) -> Experiment:
    """The same with another number of pieces of the same size."""
    config = experiment.train
    samples = config.batch_size // config.accumulate
    return replace(
        experiment, train=replace(config, batch_size=samples * pieces, accumulate=pieces)
    )


def learn(experiment: Experiment, deadline: float) -> dict[str, Any]:
    """The steps of one piece, then the whole ones."""
    began = time.perf_counter()
    one = of_pieces(experiment, 1)
    state = build_state(one)
    synchronise()
    found: dict[str, Any] = {"build_seconds": time.perf_counter() - began, "losses": []}
    found["parameters"] = sum(p.numel() for p in state.model.parameters())
    took, norms = [], []
    for number in range(STEPS):
        numbers: dict[str, float] = {}
        took.append(seconds(lambda n=numbers: n.update(train_step(state, one.train))))
        found["losses"].append(numbers["loss"])
        norms.append(numbers["grad_norm"])
        if number == 1:  # the first ran kernel by kernel, the second was recorded
            found["cold_start_seconds"] = since_the_process_began()
        if number % 5 == 0 or number < 4:
            print(f"step {number + 1}: {numbers}, {took[-1]:.2f} s, {memory()}", flush=True)
        if time.perf_counter() > deadline:
            break
    first, last = (
        statistics.fmean(found["losses"][part]) for part in (slice(0, 5), slice(-5, None))
    )
    found |= {
        "norms": norms,
        "first_step_seconds": took[0],
        "step_seconds_of_a_piece": statistics.median(took),
        "mean_of_first_5": first,
        "mean_of_last_5": last,
        "falls": last < 0.95 * first,
        "steps": len(took),
    }
    state.loader = build_loader(experiment)
    text, real = text_lengths(experiment, WHOLE)
    steps = [seconds(lambda: train_step(state, experiment.train)) for _ in range(WHOLE)]
    model, batch = experiment.model, experiment.train.batch_size
    image = found_image_tokens(experiment)
    length = image + text
    return found | {
        "all": steps,
        "seconds": min(steps),
        "samples": batch,
        "piece": batch // experiment.train.accumulate,
        "length": length,
        "tokens_per_second": batch * length / min(steps),
        "mfu": model_flops(model, batch * length, length) / min(steps) / PEAK,
        "mfu_of_real_tokens": real_flops(experiment, image, real) / min(steps) / PEAK,
        "recompute": {
            level: [b.recompute for b in state.model.blocks].count(level)  # type: ignore[union-attr]
            for level in {b.recompute for b in state.model.blocks}  # type: ignore[union-attr]
        },
        **memory(),
    }


def since_the_process_began() -> float:
    """Seconds, imports and compilation included (Linux)."""
    return time.time() - Path("/proc/self").stat().st_ctime


def found_image_tokens(experiment: Experiment) -> int:
    return (experiment.data.size // experiment.model.patch) ** 2  # type: ignore[operator]


def text_lengths(experiment: Experiment, steps: int) -> tuple[int, list[int]]:
    """Text tokens as a GPU pads them, and the real ones of each sample of the last batch."""
    loader = build_loader(experiment)
    for _ in range(steps):
        batch = loader.next_batch()
    longest = batch.text.shape[1]
    valid = batch.text_valid
    real = [longest] * len(batch.text) if valid is None else valid.tolist()
    return longest + -longest % TEXT_LENGTHS, real


def real_flops(experiment: Experiment, image: int, real: list[int]) -> float:
    """Of the samples as they would be without padding."""
    return sum(model_flops(experiment.model, image + n, image + n) for n in real)


def memory() -> dict[str, float | None]:
    """GiB: the most that was allocated, what PyTorch holds, and what the GPU has given out."""
    if not torch.cuda.is_available():
        return {"peak_gib": None}
    left, total = torch.cuda.mem_get_info()
    return {
        "peak_gib": peak_gib(),
        "reserved_gib": torch.cuda.memory_reserved() / 2**30,
        "used_gib": (total - left) / 2**30,
    }


def resume(experiment: Experiment, depth: int, folder: Path) -> dict[str, Any]:
    """2 + 2 steps against 4, by the files that they end with."""
    free()
    shallow = replace(experiment, model=replace(experiment.model, depth=depth))
    shallow = of_pieces(shallow, 2)
    sums = {}
    began = time.perf_counter()
    for name, stops in (("whole", (4,)), ("resumed", (2, 4))):
        for steps in stops:
            config = replace(
                shallow.train, steps=steps, save_every=1000, keep=1, deterministic=True
            )
            train(replace(shallow, train=config), folder / name)
            free()
        manifest = folder / name / "checkpoints" / checkpoint_name(4) / "manifest.json"
        files = json.loads(manifest.read_text())["files"]
        sums[name] = {n: f for n, f in files.items() if n.endswith(".safetensors")}
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return {
        "depth": depth,
        "bytes": sum(f["bytes"] for f in sums["whole"].values()),
        "same": sums["whole"] == sums["resumed"],
        "files": sorted(sums["whole"]),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", nargs="*", default=["learn", "resume"])
    parser.add_argument("--resume-depth", type=int, default=100)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    began = time.perf_counter()
    experiment = preset(args.small)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }

    def keep(name: str, found: dict[str, Any]) -> None:
        result[name] = found
        print(f"[{time.perf_counter() - began:6.1f} s] {name}: {json.dumps(found)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    if "learn" in args.stages:
        try:
            keep("thousand", learn(experiment, began + 0.6 * args.budget))
        except torch.OutOfMemoryError as error:
            keep("thousand", {"out_of_memory": str(error)[:600], **memory()})
    if "resume" in args.stages:
        depth = 3 if args.small else args.resume_depth
        with tempfile.TemporaryDirectory() as folder:
            keep("resume", resume(experiment, depth, Path(folder)))
    passed = result.get("thousand", {}).get("falls", True) and result.get("resume", {}).get(
        "same", True
    )
    if not passed:
        raise SystemExit("the loss does not fall, or the resumed run differs")


if __name__ == "__main__":
    main()
