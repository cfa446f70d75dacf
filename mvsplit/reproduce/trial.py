"""One run of a claim: trained as any run is, in a folder that says whether it is finished."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.reproduce.timestep import read_times
from mvsplit.training import (
    Experiment,
    NonFiniteError,
    Observer,
    TrainState,
    read_experiment,
    train,
)
from mvsplit.training.builders import build_data
from mvsplit.training.config import differences
from mvsplit.training.files import read_lines, write_atomically
from mvsplit.training.run_folder import FolderInUse

RECORD = "trial.json"
SAMPLES = 256  # of the data, for the floor of the loss
LOOK = 1.0  # seconds between looks at a run that another process trains
LOOKS_BEFORE, LOOKS_AFTER = 20, 40  # steps around the rise of the rate in which looks are asked for


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run, and what is asked of it afterwards.

    Attributes:
        name: of its folder; the same name is the same run, whichever claim asks for it.
        label: which of a claim's networks it is; its seeds share it.
        jump, factor: the learning rate is multiplied by `factor` after step `jump`.
        look_every: steps between looks around that step, whatever else asks for one; 0 for none.
        reads_times: whether the time is read from its states at the end (App. H).
    """

    name: str
    label: str
    seed: int
    experiment: Experiment
    jump: int = 0
    factor: float = 1.0
    look_every: int = 0
    reads_times: bool = False

    def finished(self, folder: Path) -> bool:
        """Whether its folder holds all of it.

        Raises:
            UserError: the folder holds another run.
        """
        path = folder / self.name / RECORD
        if not path.exists():
            return False
        record = json.loads(path.read_text(encoding="utf-8"))
        changed = differences(read_experiment(folder / self.name), self.experiment)
        there = [record["jump"], record["factor"], record.get("look_every", 0)]
        if changed or there != [self.jump, self.factor, self.look_every]:
            names = ", ".join(changed) or "the rise of the learning rate, or the looks around it"
            raise UserError(
                f"{folder / self.name} is a run with other settings ({names}); choose another --out"
            )
        return record["ended"] is not None and (record["times"] is not None or not self.reads_times)


class Jump(Observer):
    """Raises the learning rate of a run after a step."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        before, trial = state.schedule, self.trial
        state.schedule = lambda step: (
            before(step) * (trial.factor if trial.jump and step > trial.jump else 1.0)
        )


class Looks(Observer):
    """Looks into every layer around the rise of the rate, so that the entry into a collapse is
    seen: the watch asks for a few looks in a row and then for none."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def wants_look(self, step: int) -> bool:
        every, after = self.trial.look_every, step - self.trial.jump
        return every > 0 and -LOOKS_BEFORE <= after <= LOOKS_AFTER and after % every == 0


class Deadline(Observer):
    """Stops a run as SIGTERM does, saved after its step, once the clock says so."""

    def __init__(self, end: float) -> None:
        self.end = end

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if time.time() > self.end:
            signal.raise_signal(signal.SIGTERM)


def run_trial(trial: Trial, folder: Path, end: float = math.inf) -> bool:
    """Trains the trial in its folder under `folder`, from where it stopped if it did, and says
    whether it came to its end: a signal stops it before, and so does the time `end`, in seconds of
    the clock.

    Raises:
        FolderInUse: another process trains it.
        UserError: the folder holds another run.
    """
    if trial.experiment.train.device == "cpu":
        torch.set_num_threads(1)
    path = folder / trial.name
    if trial.finished(folder):
        return True
    if time.time() > end:
        return False
    record: dict[str, Any] = {"label": trial.label, "seed": trial.seed, "ended": None}
    record |= {"jump": trial.jump, "factor": trial.factor, "times": None}
    record |= {"look_every": trial.look_every}
    began, earlier = time.perf_counter(), stepped_seconds(path)
    observers = [Jump(trial), Looks(trial), Deadline(end)]
    try:
        outcome = train(trial.experiment, path, observers=observers)
        if outcome.signal is not None:
            return False
        record["ended"] = "finished"
    except NonFiniteError as error:
        record["ended"] = f"non-finite: {error}"
    record["seconds"] = round(earlier + time.perf_counter() - began, 1)
    record["floor"] = token_floor(trial.experiment)
    if trial.reads_times and record["ended"] == "finished":
        record["times"] = read_times(path, trial.experiment)
    write_atomically(path / RECORD, json.dumps(record) + "\n")
    return True


def wait_for_trial(trial: Trial, folder: Path, end: float = math.inf) -> bool:
    """`run_trial` as soon as no other process trains it; what that has made of it is kept.

    Raises:
        UserError: the folder holds another run.
    """
    while True:
        try:
            return run_trial(trial, folder, end)
        except FolderInUse:
            time.sleep(LOOK)


def stepped_seconds(path: Path) -> float:
    """What the steps of earlier processes took, by the log of a run that is not begun again yet, so
    with those after the last checkpoint, which will be taken a second time."""
    return sum(line["seconds"] for line in read_lines(path / "metrics.jsonl"))


def token_floor(experiment: Experiment) -> float:
    """The loss of a network that answers every image token alike and otherwise perfectly: the
    energy of the centered part P(x0 − x1) of the target, a number of the data alone. A collapsed
    network can do no better."""
    x0 = build_data(experiment.data).fetch(range(SAMPLES)).latents
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    tokens = _patches(x0 - x1, experiment.model.patch)
    return float((tokens - tokens.mean(1, keepdim=True)).square().mean())


def _patches(pictures: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, T, patch²·C]."""
    return torch.nn.functional.unfold(pictures, patch, stride=patch).mT
