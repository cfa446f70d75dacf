"""Trials trained as one ensemble, for claims that ask for losses and similarities alone.

Each gets the run folder that it would have had: its configuration and environment, metrics.jsonl
with the loss, the gradient norm and the learning rate of each step, layers.jsonl with the
similarity of tokens at the steps of its looks, and trial.json, which says how many ran together.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mvsplit.reproduce.depth.ensemble import Family
from mvsplit.reproduce.depth.together import Training
from mvsplit.reproduce.trial import RECORD, Looks, Trial, token_floor
from mvsplit.training.files import write_atomically
from mvsplit.training.optimizer import peak_learning_rate, warmup_then_constant
from mvsplit.training.run_folder import RunFolder

REGIMES = ("start", "front", "thousand")  # whose claims ask for losses and similarities alone


def groups(
    trials: Iterable[Trial], regimes: Sequence[str], members: int | None = None
) -> list[list[Trial]]:
    """Those of some regimes by what they must have in common to be trained as one, at most
    `members` of them."""
    found: dict[Any, list[Trial]] = {}
    for trial in trials:
        regime = trial.name.partition("-")[0]
        if regime in regimes and not trial.reads_times:
            model = trial.experiment.model
            family = Family.named(model.rule, width=model.width, depth=model.depth)
            found.setdefault((regime, family), []).append(trial)
    parts: list[list[Trial]] = []
    for group in found.values():
        most = members or len(group)
        parts += [group[first : first + most] for first in range(0, len(group), most)]
    return parts


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    end: float = math.inf,
    *,
    recompute: bool | None = None,
) -> bool:
    """Trains trials of one shape and family in their folders under `folder`, and says whether they
    came to their end; the time `end`, in seconds of the clock, stops them before, and leaves
    nothing."""
    began, experiments = time.perf_counter(), [trial.experiment for trial in trials]
    config = experiments[0].train
    asked = [Looks(trial) for trial in trials]
    looks = [
        step
        for step in range(1, config.steps + 1)
        if step % config.probe_every == 0 or any(each.wants_look(step) for each in asked)
    ]
    factors = [_factor(trial) for trial in trials]
    # Without a graph such deep networks would take hours, not minutes.
    how: dict[str, Any] = {"recompute": recompute, "graph_or_nothing": True}
    training = Training(experiments, factors=factors, looks=looks, **how)
    if not training.run(end):
        return False
    seconds, floor = time.perf_counter() - began, token_floor(experiments[0])
    common = {"seconds": round(seconds / len(trials), 1), "floor": floor, "together": len(trials)}
    for member, trial in enumerate(trials):
        record: dict[str, Any] = {"label": trial.label, "seed": trial.seed, "times": None}
        record |= {"jump": trial.jump, "factor": trial.factor, "look_every": trial.look_every}
        record |= {"ended": _write(training, member, trial, folder / trial.name)} | common
        write_atomically(folder / trial.name / RECORD, json.dumps(record) + "\n")
    return True


def _factor(trial: Trial) -> Callable[[int], float]:
    return lambda step: trial.factor if trial.jump and step > trial.jump else 1.0


def _write(training: Training, member: int, trial: Trial, path: Path) -> str:
    """The run folder of a member; gives how it ended."""
    config, width = trial.experiment.train, trial.experiment.model.width
    schedule = warmup_then_constant(peak_learning_rate(config, width), config.warmup)
    factor = _factor(trial)
    losses, norms, ended = training.course(member)
    with RunFolder(path, trial.experiment) as folder:
        folder.begin(training.device, {}, rule=trial.experiment.model.rule)
        for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), 1):
            line = {"step": step, "loss": loss, "grad_norm": norm}
            folder.metrics.append(line | {"lr": schedule(step) * factor(step)})
            if step in training.similarity:
                values = training.similarity[step][member].tolist()
                layers = [*range(trial.experiment.model.depth)]
                folder.layers.append({"step": step, "layer": layers, "tcs": values})
    return ended
