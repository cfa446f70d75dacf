"""Claim: a network that grows in depth and such that are as deep from start to end, at equal
compute.

MV-Split; each stage goes on with the weights, moments and data position of the one before, as
`mvsplit train --grow-from` does, and new layers do nothing at first. Compute is counted in layers
times steps; seconds of the steps are noted too. The validation loss is that of 256 unseen samples
with the same noise and times throughout, of the weights as trained. Gate: at each growth the loss
before and after differs by less than 10⁻⁴ of itself, in bf16 by less than 10⁻².

    python benchmarks/growth.py [--size cpu] [--json FILE] [--plot FILE] [--seeds 3]
    python benchmarks/growth.py --size gpu --seeds 1 --ways grown --json FILE      (a process a way)
    python benchmarks/growth.py --from FILE… [--json FILE] [--plot FILE]

Cost: --size cpu, the default (real digits, 2 → 10 → 50 layers, width 32): about seven minutes on
one CPU core. --size thousand (2 → 10 → 100 → 400 → 1000 layers, the same data): five minutes on one
CPU core, one for each of five ways. --size gpu (shapes, the same depths, width 128, bf16): 25
minutes, five for each way, on one H200 shared with a dozen other programs. The file is written at
each point of a curve, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mvsplit.data import Loader
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import (
    DataConfig,
    Experiment,
    Origin,
    Start,
    TrainConfig,
    TrainState,
    build_state,
    train_step,
)
from mvsplit.training.builders import build_data, build_embedder
from mvsplit.training.finetune import begin_from
from mvsplit.training.objective import piece_losses
from mvsplit.training.step import pieces

HELD_OUT = 256
POINTS = 16  # of a curve
Stages = tuple[tuple[int, int], ...]  # layers, steps


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network, its data and its stages.

    Attributes:
        beta: where β starts, in layers of a stage of that depth; None for 1/√depth.
        deep: depths of the networks that keep theirs, in the order in which they are run.
    """

    stages: Stages
    deep: tuple[int, ...]
    rates: tuple[float, ...]
    beta: float | None
    width: int
    batch_size: int
    warmup: int
    tolerance: float
    data: DataConfig
    held_out: DataConfig
    channels: int = 1
    patch: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    @property
    def budget(self) -> int:
        """Layers × steps."""
        return sum(depth * steps for depth, steps in self.stages)

    def ways(self) -> dict[str, Stages]:
        deep = {f"{d} layers throughout": ((d, self.budget // d),) for d in self.deep}
        return {"grown": self.stages} | deep

    def experiment(self, depth: int, steps: int, rate: float, seed: int) -> Experiment:
        model = DiTConfig(
            depth=depth,
            width=self.width,
            heads=2,
            ffn_width=3 * self.width,
            channels=self.channels,
            patch=self.patch,
            text_width=self.width,
            rule=RuleConfig(name="mvsplit", beta=depth**-0.5 if self.beta is None else self.beta),
        )
        train = TrainConfig(
            steps=steps,
            batch_size=self.batch_size,
            lr=rate,
            warmup=self.warmup,
            ema_decay=0.0,
            precision=self.precision,
            seed=seed,
            probe_every=0,
            device=self.device,
        )
        return Experiment(model=model, train=train, data=self.data)


SIZES = {
    "cpu": Size(
        stages=((2, 600), (10, 120), (50, 72)),
        deep=(50, 10, 2),
        rates=(1e-3, 3e-3),
        beta=0.2,
        width=32,
        batch_size=32,
        warmup=10,
        tolerance=1e-4,
        data=DataConfig(dataset="digits", split="train"),
        held_out=DataConfig(dataset="digits", split="held-out"),
    ),
    "thousand": Size(
        stages=((2, 600), (10, 200), (100, 40), (400, 15), (1000, 10)),
        deep=(1000, 400, 100, 10),
        rates=(3e-3,),
        beta=None,
        width=32,
        batch_size=16,
        warmup=5,
        tolerance=1e-4,
        data=DataConfig(dataset="digits", split="train"),
        held_out=DataConfig(dataset="digits", split="held-out"),
    ),
    "gpu": Size(
        stages=((2, 1000), (10, 500), (100, 200), (400, 80), (1000, 50)),
        deep=(1000, 400, 100, 10),
        rates=(1e-3,),
        beta=None,
        width=128,
        batch_size=32,
        warmup=40,
        tolerance=1e-2,
        data=DataConfig(dataset="shapes", size=32),
        held_out=DataConfig(dataset="shapes", size=32, series=99),
        channels=3,
        patch=4,
        precision="bf16",
        device="cuda",
    ),
}


class Curve:
    """The validation loss over the compute spent.

    Attributes:
        points: compute, loss.
        jumps: relative change of the loss at each growth.
        seconds: for the steps; on a CPU, of the processor.
    """

    def __init__(self, size: Size) -> None:
        self._size, self._parts = size, validation(size)
        self._clock = time.process_time if size.device == "cpu" else time.perf_counter
        self._spent = 0
        self.points: list[tuple[int, float]] = []
        self.jumps: list[float] = []
        self.seconds = 0.0

    def begin(self, state: TrainState, config: TrainConfig) -> None:
        """Notes the loss at the start, or how growth has changed it."""
        loss = self._loss(state.model, config)
        if self.points:
            self.jumps.append(abs(loss / self.points[-1][1] - 1))
        else:
            self.points.append((0, loss))

    def take(self, state: TrainState, config: TrainConfig) -> bool:
        """Takes a step, and looks at the loss now and then and at the end: whether it has."""
        began = self._clock()
        train_step(state, config)  # waits for the device
        self.seconds += self._clock() - began
        self._spent += state.model.config.depth
        due = self.points[-1][0] + self._size.budget / POINTS
        looks = self._spent >= due or state.step == config.steps
        if looks:
            self.points.append((self._spent, self._loss(state.model, config)))
        return looks

    @torch.no_grad()
    def _loss(self, model: DiT, config: TrainConfig) -> float:
        return float(torch.cat([piece_losses(model, p, config) for p in self._parts]).mean())


def validation(size: Size) -> list[Any]:
    """Samples that no run sees, in pieces, with their noise and times."""
    wanted = size.experiment(2, 1, 1e-3, 99)
    dataset = build_data(size.held_out)
    embedder = build_embedder(size.data, dataset, size.width)
    batch = Loader(dataset, embedder, batch_size=HELD_OUT, seed=99).next_batch()
    # In pieces that a processor's cache can hold; a GPU wants one.
    cuts = 4 if size.device == "cpu" else 1
    config = replace(wanted.train, batch_size=HELD_OUT, accumulate=cuts)
    return list(pieces(batch, 0, config, torch.device(size.device)))


def run(
    size: Size,
    stages: Stages,
    rate: float,
    seed: int,
    keep: Callable[[Curve], None],
    until: float = math.inf,
) -> Curve:
    """Trains through the stages, each of which starts from the last, or until the clock says
    `until`; `keep` is handed the curve as often as it has a new point.

    Raises:
        SystemExit: a growth has changed the function.
    """
    curve = Curve(size)
    state: TrainState | None = None
    for depth, steps in stages:
        wanted = size.experiment(depth, steps, rate, seed)
        start = None if state is None else _start_from(state)
        if start is not None:
            origin = Origin(source="the last stage", ema=False, optimizer="kept", grow="evenly")
            wanted = replace(wanted, origin=origin)
        state = build_state(wanted)
        begin_from(state, wanted, start)
        del start
        gc.collect()  # the stage before
        curve.begin(state, wanted.train)
        while state.step < steps and time.perf_counter() < until:
            if curve.take(state, wanted.train):
                keep(curve)
        if state.graphs is not None:
            state.graphs.clear()
    if any(jump > size.tolerance for jump in curve.jumps):
        raise SystemExit(f"gate failed: growth changed the loss by {curve.jumps}")
    return curve


def _start_from(state: TrainState) -> Callable[[], Start]:
    """What a deeper run reads: as from a checkpoint of `state`, the weights on the CPU."""
    with torch.device("meta"):
        model = DiT(state.model.config)
    model.to_empty(device="cpu").load_state_dict(state.model.state_dict())
    return lambda: Start(model=model, source=state.snapshot())


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, stages = result["runs"], result["stages"]
    ways = list(dict.fromkeys(r["way"] for r in rows))
    rates = sorted({r["lr"] for r in rows})
    figure, axes = pyplot.subplots(
        1, len(rates), figsize=(4.6 * max(len(rates), 1.4), 3.4), sharey=True, squeeze=False
    )
    colours = dict(
        zip(ways, ("tab:blue", "tab:orange", "tab:green", "tab:gray", "tab:red"), strict=False)
    )
    for axis, rate in zip(axes[0], rates, strict=True):
        for row in (r for r in rows if r["lr"] == rate):
            spent, losses = zip(*row["points"], strict=True)
            label = row["way"] if row["seed"] == rows[0]["seed"] else None
            axis.plot(spent, losses, color=colours[row["way"]], label=label, linewidth=1)
        edge = 0
        for depth, steps in stages[:-1]:
            edge += depth * steps
            axis.axvline(edge, color="gray", linewidth=0.6, linestyle=":")
        axis.set(title=f"learning rate {rate:g}", xlabel="layers × steps", yscale="log")
    axes[0][0].set_ylabel("validation loss")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of the loss at the end."""
    found = []
    for rate, way in dict.fromkeys((r["lr"], r["way"]) for r in rows):
        of = [r for r in rows if (r["way"], r["lr"]) == (way, rate)]
        ends = [r["points"][-1][1] for r in of]
        found.append(
            {
                "way": way,
                "lr": rate,
                "seeds": len(of),
                "loss": round(statistics.mean(ends), 4),
                "lowest": round(min(ends), 4),
                "highest": round(max(ends), 4),
                "seconds": round(statistics.mean(r["seconds"] for r in of), 1),
            }
        )
    return sorted(found, key=lambda row: row["lr"])


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of those of several processes, of one size."""
    first = results[0]

    def same(result: dict[str, Any]) -> list[Any]:
        settings = {k: v for k, v in result["settings"].items() if k != "deep"}
        return [result["size"], result["device"], result.get("note"), settings]

    if any(same(result) != same(first) for result in results):
        raise SystemExit("these are other runs: size, device, its other users or settings differ")
    rows = [row for result in results for row in result["runs"]]
    found = summary([r for r in rows if r["ended"]])
    commands = [r["command"] for r in results]
    return {**first, "command": commands, "summary": found, "runs": rows}


def table(result: dict[str, Any]) -> str:
    """The result as docs/growth.md shows it."""
    kind = "seconds" if result.get("size") == "gpu" else "processor seconds"
    lines = [
        f"| learning rate | network | loss at the end | lowest, highest | {kind} |",
        "|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        spread = f"{row['lowest']:.3f}, {row['highest']:.3f}"
        start = f"| {row['lr']:g} | {row['way']} | {row['loss']:.3f} |"
        lines.append(f"{start} {spread} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def stage_table(result: dict[str, Any]) -> str:
    """Of the network that grows, the loss when the layers of each depth came and at the end of
    their steps, beside that of a network that was as deep from the start, where it was looked at
    after most nearly as much compute; of the first seed."""
    runs = {run["way"]: run["points"] for run in reversed(result["runs"])}
    lines = [
        "| layers | loss when they came | at the end of their steps | as deep from the start |",
        "|---|---|---|---|",
    ]
    losses, spent = dict(runs["grown"]), 0
    for depth, steps in result["stages"]:
        before, spent = losses[spent], spent + depth * steps
        beside = runs.get(f"{depth} layers throughout", [])
        _, near = min(((abs(at - spent), loss) for at, loss in beside), default=(0, math.nan))
        cells = [f"{loss:.3f}" for loss in (before, losses[spent], near)]
        lines.append(f"| {depth} | {' | '.join(cells)} |".replace("nan", "–"))
    return "\n".join(lines)


def environment(name: str) -> dict[str, Any]:
    size = SIZES[name]
    return {
        "date": datetime.date.today().isoformat(),
        "device": "CPU" if size.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "size": name,
        "settings": asdict(size),
        "stages": size.stages,
        "layer_steps": size.budget,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs of a size that begin in time; the file is written after each."""
    size, began = SIZES[options.size], time.perf_counter()
    rows: list[dict[str, Any]] = []
    result = environment(options.size) | {"note": options.note, "summary": [], "runs": rows}
    todo = [
        (seed, rate, way, stages)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for rate in size.rates
        for way, stages in size.ways().items()
        if not options.ways or way in options.ways
    ]

    def keep(curve: Curve) -> None:
        rows[-1]["seconds"], rows[-1]["jumps"] = round(curve.seconds, 1), curve.jumps
        rows[-1]["points"] = [(at, round(loss, 4)) for at, loss in curve.points]
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    longest = 0.0
    for seed, rate, way, stages in todo:
        if time.perf_counter() - began + longest > options.budget:
            print(f"no time for {way}, seed {seed}", flush=True)
            break
        started = time.perf_counter()
        rows.append({"way": way, "lr": rate, "seed": seed, "ended": False})
        curve = run(size, stages, rate, seed, keep, began + options.budget)
        longest = max(longest, time.perf_counter() - started)
        rows[-1]["ended"] = time.perf_counter() < began + options.budget
        result["summary"] = summary([row for row in rows if row["ended"]])
        keep(curve)
        print(way, rate, seed, rows[-1]["points"][-1], curve.seconds, curve.jumps, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--ways", nargs="+", help="these alone, in a process of their own")
    parser.add_argument(
        "--from", dest="sources", type=Path, nargs="+", help="results instead of new runs"
    )
    parser.add_argument("--plot", type=Path, help="also draw the curves here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for all runs")
    parser.add_argument("--note", help="kept with the result: who else used the GPU, for example")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.sources:
        result = together([json.loads(path.read_text()) for path in options.sources])
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        result = measure(options)
    print(table(result))
    if any(row["way"] == "grown" and row["ended"] for row in result["runs"]):
        print(stage_table(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
