"""What the policies make of a plain network that its learning rate kills.

    python benchmarks/policies.py REGIME [--only NAME …] [--seeds 0 1] [--workers N] --json FILE
    python benchmarks/policies.py table --json FILE

Every trial is a run of `mvsplit.training.train` with the watch and the policy as a user has them; a
regime may raise the learning rate at some step. At the end each network is given the same 1024
samples with the same noise and times, and its loss is set against that of the network of the same
regime and seed that had MV-Split from the start. Trials that are in FILE are not run again; what
those that run have done so far is in FILE's neighbour `.progress.jsonl`.

Cost: for each trial 25 seconds (digits-32, which `mvsplit bench` takes), one minute (digits-64) or
three minutes (digits-400) on one CPU core; for one of shapes-400 about two minutes on one H200 that
two trials share.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mvsplit.diagnostics.counterfactual import CenteredAdjoints
from mvsplit.models import DiTConfig
from mvsplit.reproduce.workers import worker_pool
from mvsplit.residuals import RuleConfig
from mvsplit.training import (
    DataConfig,
    Experiment,
    NonFiniteError,
    Observer,
    TrainConfig,
    TrainState,
    build_state,
    train,
)
from mvsplit.training.checkpoint import load_latest, read_checkpoint
from mvsplit.training.config import Policy, ReactionConfig
from mvsplit.training.files import read_lines
from mvsplit.training.objective import piece_losses
from mvsplit.training.step import pieces

PLAIN = RuleConfig(name="plain")
REFERENCE = "mvsplit from the start"
SAMPLES = 1024
_PLAIN_EVENTS = ("saved", "started", "watching", "finished")


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A network, its data and a learning rate that is raised after step `jump`."""

    depth: int
    width: int
    lr: float
    steps: int
    jump: int = 0
    factor: float = 1.0
    batch_size: int = 16
    warmup: int = 10
    save_every: int = 20
    probe_every: int = 10
    probe_burst: int = 10
    dataset: str = "digits"
    size: int | None = None
    patch: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    def experiment(self, trial: Trial, seed: int) -> Experiment:
        model = DiTConfig(
            depth=self.depth,
            width=self.width,
            heads=2,
            ffn_width=3 * self.width,
            channels=1 if self.dataset == "digits" else 3,
            patch=self.patch,
            text_width=self.width,
            rule=trial.rule,
        )
        config = TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            ema_decay=0.0,
            precision=self.precision,
            seed=seed,
            save_every=self.save_every,
            keep=4,
            probe_every=self.probe_every,
            probe_burst=self.probe_burst,
            on_alarm=trial.on_alarm,
            reaction=trial.reaction,
            device=self.device,
        )
        data = DataConfig(dataset=self.dataset, size=self.size)
        return Experiment(model=model, train=config, data=data)


REGIMES: dict[str, Regime] = {
    # Dead by step 40 under a learning rate that was too high from the start.
    "digits-32-start": Regime(depth=32, width=32, lr=1.5e-2, steps=200),
    # Learns for about a hundred steps at one rate, then collapses by itself: the paper's event.
    "digits-32-late": Regime(depth=32, width=32, lr=1.2e-2, steps=200),
    # Healthy, then the learning rate rises at once: the paper's event, on demand.
    "digits-64-jump": Regime(depth=64, width=32, lr=4e-4, steps=240, jump=100, factor=30),
    "digits-400-jump": Regime(
        depth=400, width=32, lr=2e-4, steps=160, jump=60, factor=20, batch_size=32
    ),
    # The same at 400 layers on 64 image tokens, in bf16 on a GPU.
    "shapes-400-jump": Regime(
        depth=400,
        width=128,
        lr=1e-4,
        steps=180,
        jump=100,
        factor=10,
        batch_size=32,
        warmup=50,
        save_every=25,
        probe_every=50,  # a look costs as much as twenty steps that are replayed
        probe_burst=3,
        dataset="shapes",
        size=32,
        patch=4,
        precision="bf16",
        device="cuda",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A rule, and what is done on an alarm. `centered`: after a rollback the writers receive
    adjoints without a token mean, so that ΔW_μ (Eq. 5) is zero and nothing else is changed."""

    name: str
    rule: RuleConfig = PLAIN
    on_alarm: Policy = "record"
    reaction: ReactionConfig = field(default_factory=ReactionConfig)
    centered: bool = False


def trials() -> list[Trial]:
    """The references first, then the policies as they are, then what else was tried."""
    usual = ReactionConfig()
    protect: dict[str, Any] = {"on_alarm": "protect"}
    return [
        Trial(name=REFERENCE, rule=RuleConfig(name="mvsplit", beta=0.05)),
        Trial(name="plain, record"),
        Trial(name="skip", on_alarm="skip"),
        Trial(name="rollback", on_alarm="rollback"),
        Trial(name="protect", on_alarm="protect"),
        Trial(name="mvsplit from the start, beta 1", rule=RuleConfig(name="mvsplit", beta=1.0)),
        Trial(name="protect, where it stands", reaction=replace(usual, go_back=False), **protect),
        Trial(name="protect, gain 1", reaction=replace(usual, gain=1.0), **protect),
        Trial(
            name="protect, gain 1, no anneal", reaction=replace(usual, gain=1, anneal=0), **protect
        ),
        Trial(name="protect, gain 1/16", reaction=replace(usual, gain=1 / 16), **protect),
        Trial(name="protect, no anneal", reaction=replace(usual, anneal=0), **protect),
        Trial(name="protect, anneal 10", reaction=replace(usual, anneal=10), **protect),
        Trial(
            name="rollback, a tenth",
            on_alarm="rollback",
            reaction=replace(usual, lr_factor=0.1),
        ),
        Trial(
            name="rollback, fresh moments",
            on_alarm="rollback",
            reaction=replace(usual, fresh_moments=True),
        ),
        Trial(
            name="rollback, same lr, centered adjoints",
            on_alarm="rollback",
            reaction=replace(usual, lr_factor=1.0),
            centered=True,
        ),
    ]


class Jump(Observer):
    """Raises the learning rate of a run after a step."""

    def __init__(self, regime: Regime) -> None:
        self.regime = regime

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        before, regime = state.schedule, self.regime
        late = regime.factor if regime.jump else 1.0
        state.schedule = lambda step: before(step) * (late if step > regime.jump else 1.0)


class Progress(Observer):
    """Adds what a trial has done to a file every so many steps, for one that is stopped early."""

    def __init__(self, file: Path, trial: str, seed: int, every: int = 20) -> None:
        self.file, self.names, self.every = file, {"trial": trial, "seed": seed}, every

    def on_step(self, state: TrainState, line: dict[str, Any]) -> None:
        if line["step"] % self.every == 0:
            self._add({name: line[name] for name in ("step", "loss", "grad_norm", "lr")})

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] not in _PLAIN_EVENTS:
            self._add({name: event[name] for name in ("event", "step", "message")})

    def _add(self, found: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.names | found) + "\n")


class Center(Observer):
    """From the first rollback on, writers receive adjoints without a token mean."""

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        self._state = state

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "rolled-back" and event["rollbacks"] == 1:
            CenteredAdjoints(self._state.taps, ("attn", "ffn")).__enter__()


def run(name: str, trial: Trial, seed: int, progress: Path) -> dict[str, Any]:
    """One row: how a trial ended."""
    torch.set_num_threads(1)
    regime, began = REGIMES[name], time.perf_counter()
    experiment = regime.experiment(trial, seed)
    watchers: list[Observer] = [Jump(regime), Progress(progress, trial.name, seed)]
    watchers += [Center()] if trial.centered else []
    with tempfile.TemporaryDirectory() as folder:
        try:
            stopped = train(experiment, folder, observers=watchers).alarm
        except NonFiniteError:
            stopped = True
        lines = read_lines(Path(folder) / "metrics.jsonl")
        events = read_lines(Path(folder) / "events.jsonl")
        loss = final_loss(experiment, Path(folder))
    kept = {event["step"]: event["loss"] for event in lines}  # the last time each was taken
    return {
        "regime": name,
        "trial": trial.name,
        "seed": seed,
        "loss": loss,
        "train_loss": statistics.fmean(list(kept.values())[-20:]),
        "steps": lines[-1]["step"],
        "batches": len(lines),
        "stopped": stopped,
        "events": [_short(e) for e in events if e["event"] not in _PLAIN_EVENTS],
        "losses": [float(f"{line['loss']:.4g}") for line in lines],
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {"regime": dataclasses.asdict(regime), "trial": dataclasses.asdict(trial)},
    }


def _short(event: dict[str, Any]) -> list[Any]:
    return [event["event"], event.get("at_step", event["step"]), event["message"]]


@torch.no_grad()
def final_loss(experiment: Experiment, folder: Path, checkpoint: Path | None = None) -> float:
    """The loss of the weights of a checkpoint, the newest of the run if none is named, on samples
    that are the same for every trial."""
    snapshot = read_checkpoint(checkpoint) if checkpoint else load_latest(folder / "checkpoints")[0]
    assert snapshot is not None
    config = replace(experiment.train, batch_size=SAMPLES, accumulate=SAMPLES // 64, seed=12345)
    state = build_state(replace(experiment, train=config))
    batch = state.loader.next_batch()
    state.restore(replace(snapshot, values=_data_of(snapshot.values, state)))
    losses = [
        piece_losses(state.model, piece, config) for piece in pieces(batch, 1, config, state.device)
    ]
    return float(torch.cat(losses).double().mean())


def _data_of(values: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """The values of a checkpoint with the data of another run."""
    return {**values, "data": state.loader.state_dict()}


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """The loss of each row over that of its reference."""
    losses = {(r["regime"], r["seed"]): r["loss"] for r in rows if r["trial"] == REFERENCE}
    for row in rows:
        reference = losses.get((row["regime"], row["seed"]))
        row["ratio"] = None if reference is None else round(row["loss"] / reference, 4)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a file as Markdown, a column for each regime: the loss over the reference's, one
    number for each seed."""
    regimes = [name for name in REGIMES if any(r["regime"] == name for r in rows)]
    names = [t.name for t in trials() if any(r["trial"] == t.name for r in rows)]
    lines = ["| | " + " | ".join(regimes) + " |", "|---" * (len(regimes) + 1) + "|"]
    for name in names:
        cells = []
        for regime in regimes:
            here = [r for r in rows if r["regime"] == regime and r["trial"] == name]
            shown = [_cell(r) for r in sorted(here, key=lambda r: r["seed"])]
            cells.append(", ".join(shown) or "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if row["trial"] == REFERENCE:
        return f"loss {row['loss']:.3f}"
    return f"{row['ratio']:.2f}" + (" (stopped)" if row["stopped"] else "")


def environment() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("regime", choices=[*REGIMES, "table"])
    parser.add_argument("--only", nargs="*", help="names of trials, whole")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    rows = found["rows"]
    if options.regime == "table":
        print(table(rows))
        return
    there = {(r["regime"], r["trial"], r["seed"]) for r in rows}
    todo = [
        (options.regime, trial, seed, options.json.with_suffix(".progress.jsonl"))
        for seed in options.seeds
        for trial in trials()
        if (not options.only or trial.name in options.only)
        and (options.regime, trial.name, seed) not in there
    ]
    with worker_pool(options.workers) as pool:
        for job in as_completed([pool.submit(run, *arguments) for arguments in todo]):
            rows.append(row := job.result())
            add_ratios(rows)
            options.json.write_text(json.dumps({"environment": environment(), "rows": rows}) + "\n")
            acted = [e[:2] for e in row["events"]]
            print(row["trial"], row["seed"], f"{row['loss']:.4f}", row["ratio"], acted, flush=True)


if __name__ == "__main__":
    main()
