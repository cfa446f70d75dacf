"""Claim: a network that grows in depth and such that are as deep from start to end, at equal
compute.

Real digits, MV-Split, 2 → 10 → 50 layers: each stage goes on with the weights, moments and data
position of the one before (`mvsplit train --grow-from`), and new layers do nothing at first.
Compute is counted in layers times steps; processor seconds are noted too. The validation loss is
that of 256 unseen digits with the same noise and times throughout, of the weights as trained. Gate:
at each growth the loss before and after differs by less than 10⁻⁴ of itself. About seven minutes
on one core.

    python benchmarks/growth.py [--json FILE] [--plot FILE] [--seeds 3]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvsplit.cli.start import starter
from mvsplit.data import Digits, Loader
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import (
    DataConfig,
    Experiment,
    Observer,
    Origin,
    TrainConfig,
    TrainState,
    train,
)
from mvsplit.training.builders import build_loader
from mvsplit.training.objective import piece_losses
from mvsplit.training.step import pieces

STAGES = ((2, 600), (10, 120), (50, 72))  # layers, steps
BUDGET = sum(depth * steps for depth, steps in STAGES)  # layers × steps
WAYS = {"grown": STAGES} | {
    f"{depth} layers throughout": ((depth, BUDGET // depth),) for depth in (50, 10, 2)
}
RATES = (1e-3, 3e-3)
HELD_OUT = 256
POINTS = 16  # of a curve
MODEL = DiTConfig(
    depth=2,
    width=32,
    heads=2,
    ffn_width=96,
    channels=1,
    patch=2,
    text_width=32,
    rule=RuleConfig(name="mvsplit", beta=0.2),
)


class Curve(Observer):
    """The validation loss over the compute spent.

    Attributes:
        points: compute, loss.
        jumps: relative change of the loss at each growth.
        seconds: of the processor, for the steps.
    """

    def __init__(self, validation: list[Any]) -> None:
        self._validation = validation
        self._spent, self._mark = 0, 0.0
        self.points: list[tuple[int, float]] = []
        self.jumps: list[float] = []
        self.seconds = 0.0

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        loss = self._loss(state.model, experiment)
        if self.points:
            self.jumps.append(abs(loss / self.points[-1][1] - 1))
        self._experiment = experiment
        if not self.points:
            self.points.append((0, loss))
        self._mark = time.process_time()

    def on_step(self, state: TrainState, line: dict[str, Any]) -> None:
        self._spent += state.model.config.depth
        self.seconds += time.process_time() - self._mark
        due = self.points[-1][0] + BUDGET / POINTS
        if self._spent >= due or state.step == self._experiment.train.steps:
            self.points.append((self._spent, self._loss(state.model, self._experiment)))
        self._mark = time.process_time()

    @torch.no_grad()
    def _loss(self, model: DiT, experiment: Experiment) -> float:
        parts = self._validation
        config = experiment.train
        return float(torch.cat([piece_losses(model, part, config) for part in parts]).mean())


def experiment(depth: int, steps: int, rate: float, seed: int) -> Experiment:
    train_config = TrainConfig(
        steps=steps,
        batch_size=32,
        lr=rate,
        warmup=10,
        ema_decay=0.0,
        seed=seed,
        save_every=steps,
        probe_every=0,
        device="cpu",
    )
    data = DataConfig(dataset="digits", split="train")
    return Experiment(model=replace(MODEL, depth=depth), train=train_config, data=data)


def validation() -> list[Any]:
    """Digits that no run sees, in pieces, with their noise and times."""
    wanted = experiment(2, 1, 1e-3, 99)
    embedder = build_loader(wanted).embedder
    batch = Loader(Digits("held-out"), embedder, batch_size=HELD_OUT, seed=99).next_batch()
    config = replace(wanted.train, batch_size=HELD_OUT, accumulate=4)
    return list(pieces(batch, 0, config, torch.device("cpu")))


def run(stages: tuple[tuple[int, int], ...], rate: float, seed: int, parts: list[Any]) -> Curve:
    """Trains through the stages, each a run of its own that starts from the last."""
    curve = Curve(parts)
    with tempfile.TemporaryDirectory() as folder:
        before: Path | None = None
        for depth, steps in stages:
            wanted = experiment(depth, steps, rate, seed)
            if before is not None:
                source = Origin(source=str(before), ema=False, optimizer="kept", grow="evenly")
                wanted = replace(wanted, origin=source)
            path = Path(folder) / str(depth)
            train(wanted, path, observers=[curve], start=starter(wanted))
            before = path
    if any(jump > 1e-4 for jump in curve.jumps):
        raise SystemExit(f"gate failed: growth changed the loss by {curve.jumps}")
    return curve


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(RATES), figsize=(9, 3.4), sharey=True)
    colours = dict(zip(WAYS, ("tab:blue", "tab:orange", "tab:green", "tab:gray"), strict=True))
    for axis, rate in zip(axes, RATES, strict=True):
        for row in (r for r in rows if r["lr"] == rate):
            spent, losses = zip(*row["points"], strict=True)
            label = row["way"] if row["seed"] == 0 else None
            axis.plot(spent, losses, color=colours[row["way"]], label=label, linewidth=1)
        edge = 0
        for depth, steps in STAGES[:-1]:
            edge += depth * steps
            axis.axvline(edge, color="gray", linewidth=0.6, linestyle=":")
        axis.set(title=f"learning rate {rate:g}", xlabel="layers × steps", yscale="log")
    axes[0].set_ylabel("validation loss")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of the loss at the end."""
    found = []
    for rate in RATES:
        for way in WAYS:
            of = [r for r in rows if (r["way"], r["lr"]) == (way, rate)]
            ends = [r["points"][-1][1] for r in of]
            found.append(
                {
                    "way": way,
                    "lr": rate,
                    "loss": round(statistics.mean(ends), 4),
                    "lowest": round(min(ends), 4),
                    "highest": round(max(ends), 4),
                    "seconds": round(statistics.mean(r["seconds"] for r in of), 1),
                }
            )
    return found


def table(result: dict[str, Any]) -> str:
    """The result as docs/growth.md shows it."""
    lines = [
        "| learning rate | network | loss at the end | lowest, highest | processor seconds |",
        "|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        spread = f"{row['lowest']:.3f}, {row['highest']:.3f}"
        start = f"| {row['lr']:g} | {row['way']} | {row['loss']:.3f} |"
        lines.append(f"{start} {spread} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--plot", type=Path, help="also draw the curves here")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = validation()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for rate in RATES:
            for way, stages in WAYS.items():
                curve = run(stages, rate, seed, parts)
                rows.append(
                    {
                        "way": way,
                        "lr": rate,
                        "seed": seed,
                        "seconds": round(curve.seconds, 1),
                        "jumps": curve.jumps,
                        "points": [(spent, round(loss, 4)) for spent, loss in curve.points],
                    }
                )
                print(way, rate, seed, rows[-1]["points"][-1], rows[-1]["seconds"], flush=True)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "stages": STAGES,
        "layer_steps": BUDGET,
        "summary": summary(rows),
        "runs": rows,
    }
    print(json.dumps(result["summary"], indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
