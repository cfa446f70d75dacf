"""Claim: one H200 trains 13.64 billion parameters, all of them; and how near to its peak.

The preset `mvsplit-1000l-h200` by the run's own step: true global clipping, 6 bytes a parameter, as
little computed again as memory allows. 30 steps whose loss has to fall (warm-up of 10 steps instead
of 1,000), for time all but the last 4 of one piece; these are of the whole batch, and time and MFU
are their median. Then the time of a layer under load, against that at a tenth of the depth. MFU
counts 6N and attention, nothing that is computed again, of 989 TFLOP/s; of all tokens that are
computed, and of the real ones. Captions are padded to 32 tokens, so that all pieces have one shape.

A checkpoint has 55 GB, more than the disk of the machine at hand. So saving and resuming is shown
at a depth that fits, with `train.deterministic`: 2 + 2 steps write the files that 4 steps in one go
write, bit for bit.

    python benchmarks/thousand_layers.py [--pieces 14 18] [--spare 0.08] [--json FILE]
    python benchmarks/thousand_layers.py --small        (a trial of the code on a CPU)

Cost: under three minutes on one H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from card_load import CardLoad
from step_parts import PEAK, free, keep_busy, peak_gib, seconds, synchronise

import mvsplit.training.pieces as known
from mvsplit.presets import get_preset
from mvsplit.training import Experiment, memory_plan, train
from mvsplit.training.builders import build_loader, build_state
from mvsplit.training.checkpoint import checkpoint_name
from mvsplit.training.pieces import Piece
from mvsplit.training.state import TrainState
from mvsplit.training.step import add_gradients, pieces, train_step
from mvsplit.training.step_time import model_flops

STEPS, WHOLE = 26, 4  # of one piece, at most; of the whole batch
UNDER_LOAD = 2.0  # seconds
AFTER = 8 * UNDER_LOAD  # seconds for the time of a layer, at both depths
TEXT = 32  # captions are padded to a multiple of so many tokens
Found = dict[str, Any]


def preset(small: bool, size: tuple[int, int] | None = None) -> Experiment:
    """`size`: samples of a piece and pieces of a batch, where not those of the preset."""
    found = get_preset("mvsplit-1000l-h200")
    if size is not None:
        samples, count = size
        config = replace(found.train, batch_size=samples * count, accumulate=count)
        found = replace(found, train=config)
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


def learn(experiment: Experiment, deadline: float, keep: Callable[[Found], None]) -> Found:
    """The steps of one piece, then whole ones, then a piece at a tenth of the depth; `deadline` of
    all."""
    one = of_pieces(experiment, 1)
    found, levels, (deep, deep_load) = deepest(experiment, one, deadline, keep)
    free()
    depth = max(1, len(levels) // 10)
    few, load = shallower(one, levels, depth)
    names = str(depth), str(len(levels))
    found["seconds_per_layer"] = dict(zip(names, (few, deep), strict=True))
    found["loads_per_layer"] = dict(zip(names, (load, deep_load), strict=True))
    found["per_layer_ratio"] = deep / few
    return found


def deepest(
    experiment: Experiment, one: Experiment, deadline: float, keep: Callable[[Found], None]
) -> tuple[Found, list[Any], tuple[float, Found]]:
    """What the whole network gave, what its blocks keep, the time of a layer and the load."""
    began = time.perf_counter()
    state = build_state(one)
    synchronise()
    found: Found = {"build_seconds": time.perf_counter() - began, "losses": [], "norms": []}
    found["parameters"] = sum(p.numel() for p in state.model.parameters())
    took: list[float] = []
    parts = experiment.train.accumulate
    while len(took) < STEPS and (
        len(took) < 3 or time.perf_counter() + 1.04 * WHOLE * parts * took[-1] + AFTER < deadline
    ):
        numbers: dict[str, float] = {}
        took.append(seconds(lambda n=numbers: n.update(train_step(state, one.train))))
        found["losses"].append(numbers["loss"])
        found["norms"].append(numbers["grad_norm"])
        if len(took) == 2:  # the first ran kernel by kernel, the second was recorded
            found["cold_start_seconds"] = since_the_process_began()
        if len(took) < 4 or len(took) % 5 == 0:
            print(f"step {len(took)}: {numbers}, {took[-1]:.2f} s, {memory()}", flush=True)
            keep(found)
    found |= {"first_step_seconds": took[0], "step_seconds_of_a_piece": statistics.median(took)}
    whole_steps(state, experiment, found, deadline - AFTER, keep)
    levels = [block.recompute for block in state.model.blocks]  # type: ignore[union-attr]
    took, load = piece_seconds(state, one)
    return found, levels, (took / len(levels), load)


def whole_steps(
    state: TrainState, experiment: Experiment, found: Found, deadline: float,
    keep: Callable[[Found], None],
) -> None:  # fmt: skip
    """Steps of the whole batch, which go on where the others have ended: at least one, and as many
    as there is time for. What they give is added to `found` after each."""
    state.loader = build_loader(experiment)
    took: list[float] = []
    loads = []
    while not took or (len(took) < WHOLE and time.perf_counter() + took[-1] < deadline):
        numbers: dict[str, float] = {}
        with CardLoad() as load:
            took.append(seconds(lambda n=numbers: n.update(train_step(state, experiment.train))))
        loads.append(load.found)
        found["losses"].append(numbers["loss"])
        found["norms"].append(numbers["grad_norm"])
        print(f"whole step {len(took)}: {numbers['loss']:.4f}, {took[-1]:.2f} s", flush=True)
        found |= summary(state, experiment, found["losses"], took) | {"load": loads[len(took) // 2]}
        keep(found)


def summary(
    state: TrainState, experiment: Experiment, losses: list[float], took: list[float]
) -> Found:
    """Of the steps so far, the last of which were of the whole batch and took so long."""
    text, real = text_lengths(experiment, len(took))
    first, last = statistics.fmean(losses[:5]), statistics.fmean(losses[-5:])
    model, batch = experiment.model, experiment.train.batch_size
    image = found_image_tokens(experiment)
    length, each = image + text, statistics.median(took)
    levels = [block.recompute for block in state.model.blocks]  # type: ignore[union-attr]
    return {
        "mean_of_first_5": first,
        "mean_of_last_5": last,
        "falls": last < 0.95 * first,
        "steps": len(losses),
        "whole_steps": len(took),
        "all": list(took),
        "seconds": each,
        "samples": batch,
        "piece": batch // experiment.train.accumulate,
        "length": length,
        "tokens_per_second": batch * length / each,
        "mfu": model_flops(model, batch * length, length) / each / PEAK,
        "mfu_of_real_tokens": real_flops(experiment, image, real) / each / PEAK,
        "recompute": {level: levels.count(level) for level in sorted(set(levels))},
        "bytes_a_parameter": 6,
        "spare": memory_plan.SPARE,
        **memory(),
    }


def piece_seconds(state: TrainState, one: Experiment) -> tuple[float, Found]:
    """Forward and backward of a piece, from a graph, under load; and the card's."""
    (piece,) = pieces(state.loader.next_batch(), 1, of_pieces(one, 1).train, state.device)
    piece = first_samples(piece, one.train.batch_size)
    run = partial(add_gradients, state.model, one.train, [piece], state.graphs)
    keep_busy(run, UNDER_LOAD)
    with CardLoad() as load:
        count, took = keep_busy(run, UNDER_LOAD)
    return took / count, load.found


def first_samples(piece: Piece, samples: int) -> Piece:
    cut = {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece)}
    return Piece(**{n: t if t is None or t.ndim == 0 else t[:samples] for n, t in cut.items()})


def shallower(one: Experiment, levels: Sequence[Any], depth: int) -> tuple[float, Found]:
    """Seconds a layer at another depth, where blocks keep the same in the same shares; with writers
    that are not zero, as they are not in a network that has learned."""
    state = build_state(replace(one, model=replace(one.model, depth=depth, writers="standard")))
    state.planner = None
    for number, block in enumerate(state.model.blocks):
        block.recompute = levels[number * len(levels) // depth]
    took, load = piece_seconds(state, one)
    return took / depth, load


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
    return longest + -longest % TEXT, real


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
    parser.add_argument("--pieces", nargs=2, type=int, metavar=("SAMPLES", "COUNT"))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--spare", type=float, help="share of the memory that the plan leaves free")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    began = time.perf_counter()
    known.TEXT_LENGTHS = TEXT
    if args.spare is not None:
        memory_plan.SPARE = args.spare
    experiment = preset(args.small, args.pieces)
    result: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }

    def keep(name: str, found: dict[str, Any]) -> None:
        result[name] = found
        if "losses" not in found or "mfu" in found:
            shown = {k: v for k, v in found.items() if k not in ("losses", "norms")}
            print(f"[{time.perf_counter() - began:6.1f} s] {name}: {json.dumps(shown)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    if "learn" in args.stages:
        try:
            said = partial(keep, "thousand")
            keep("thousand", learn(experiment, began + args.budget, said))
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
