"""A trained run, ready to sample from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mvsplit.data import CachedText, WordEmbedder
from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.residuals import RuleConfig
from mvsplit.training.builders import build_data, build_embedder
from mvsplit.training.checkpoint import (
    DamagedCheckpoint,
    Snapshot,
    load_latest,
    read_checkpoint,
)
from mvsplit.training.config import Experiment
from mvsplit.training.run_folder import read_experiment


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run's network in evaluation mode, what encodes its prompts, and where it stood."""

    model: DiT
    embedder: WordEmbedder | CachedText
    experiment: Experiment
    step: int


def load_run(
    path: Path | str, *, ema: bool = True, device: torch.device | str = "cpu"
) -> LoadedRun:
    """The newest whole checkpoint of a run; a damaged newer one is passed over with a warning.

    Args:
        path: a run folder, or one of its checkpoints.
        ema: the averaged weights; False for the weights as trained.
        device: where the network goes.

    Raises:
        UserError: there is no run or no readable checkpoint, or the run keeps no averaged weights.
    """
    path = Path(path)
    one = (path / "manifest.json").exists()
    experiment = read_experiment(path.parent.parent if one else path)
    if ema and not experiment.train.ema_decay:
        raise UserError(
            f"{path} keeps no averaged weights (train.ema_decay=0); ask for the weights as trained "
            "with --no-ema"
        )
    name = "ema" if ema else "model"
    snapshot = _read_one(path, name) if one else _read_newest(path, name)
    rule = RuleConfig(**snapshot.values["rule"])  # which a policy may have changed since the start
    with torch.device("meta"):  # no initial values, and no draw from the global generator
        model = DiT(replace(experiment.model, rule=rule))
    model.to_empty(device=torch.device(device)).requires_grad_(False).eval()
    snapshot.copy_to(name, dict(model.state_dict()))
    embedder = _load_embedder(experiment, snapshot.values["embedder"])
    return LoadedRun(model=model, embedder=embedder, experiment=experiment, step=snapshot.step)


def _load_embedder(experiment: Experiment, spec: dict[str, Any]) -> WordEmbedder | CachedText:
    if spec["kind"] != "cache":
        return WordEmbedder.from_spec(spec)
    data = replace(experiment.data, verify=False)  # a few captions are all that is read
    embedder = build_embedder(data, build_data(data), experiment.model.text_width)
    if embedder.spec() != spec:
        raise UserError(
            f"data.path: the text states of {data.path} are of {embedder.spec()}, the run was "
            f"trained with {spec}; put the cache of then there"
        )
    return embedder


def _read_one(path: Path, name: str) -> Snapshot:
    try:
        return read_checkpoint(path, [name])
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; choose another checkpoint of the run") from error


def _read_newest(path: Path, name: str) -> Snapshot:
    snapshot, damaged = load_latest(path / "checkpoints", [name])
    if snapshot is None:
        raise UserError(f"{path} has no checkpoint yet; train it until the first is saved")
    for error in damaged:
        warnings.warn(f"{error}; using step {snapshot.step}", stacklevel=3)
    return snapshot
