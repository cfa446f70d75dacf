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
from mvsplit.models.lora import merge_lora
from mvsplit.residuals import RuleConfig, as_recorded
from mvsplit.training.builders import build_data, build_embedder
from mvsplit.training.checkpoint import (
    DamagedCheckpoint,
    Snapshot,
    checkpoint_name,
    cut_off,
    load_latest,
    read_checkpoint,
)
from mvsplit.training.config import Experiment
from mvsplit.training.finetune import choose_parameters
from mvsplit.training.run_folder import read_experiment


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run's network in evaluation mode, what encodes its prompts, and where it stood."""

    model: DiT
    embedder: WordEmbedder | CachedText
    experiment: Experiment
    step: int


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run was trained as, what encodes its prompts, and where it stood."""

    experiment: Experiment
    embedder: WordEmbedder | CachedText
    step: int


def load_settings(path: Path | str) -> RunSettings:
    """What a run's newest checkpoint says beside its weights, of which no file is opened.

    Args:
        path: a run folder, or one of its checkpoints.

    Raises:
        UserError: there is no run or no readable checkpoint.
    """
    path = Path(path)
    experiment, snapshot = _experiment_of(path), _read(path, [])
    embedder = _load_embedder(experiment, snapshot.values["embedder"])
    return RunSettings(experiment=experiment, embedder=embedder, step=snapshot.step)


def load_run(
    path: Path | str, *, ema: bool = True, device: torch.device | str = "cpu"
) -> LoadedRun:
    """The newest whole checkpoint of a run; a damaged newer one is passed over with a warning.
    Another says what is cut off of the files that only training needs.

    Args:
        path: a run folder, or one of its checkpoints.
        ema: the averaged weights; False for the weights as trained.
        device: where the network goes. What low-rank adapters have learned is merged into it.

    Raises:
        UserError: there is no run or no readable checkpoint, or the run keeps no averaged weights.
    """
    path = Path(path)
    experiment = _experiment_of(path)
    if ema and not experiment.train.ema_decay:
        raise UserError(
            f"{path} keeps no averaged weights (train.ema_decay=0); ask for the weights as trained "
            "with --no-ema"
        )
    names = weight_files(experiment, ema=ema)
    snapshot = _read(path, names)
    _warn_of_the_rest(path, snapshot.step, names)
    # Which a policy may have changed since the start.
    rule = RuleConfig(**as_recorded(snapshot.values["rule"]))
    with torch.device("meta"):  # no initial values, and no draw from the global generator
        model = DiT(replace(experiment.model, rule=rule))
        choose_parameters(model, experiment.train.tune)
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.to_empty(device=torch.device(device)).requires_grad_(False).eval()
    weights = dict(model.state_dict())
    for name in names:
        averaged = name == "ema"
        wanted = {n: w for n, w in weights.items() if n in learned} if averaged else weights
        snapshot.copy_to(name, wanted)
    merge_lora(model)
    embedder = _load_embedder(experiment, snapshot.values["embedder"])
    return LoadedRun(model=model, embedder=embedder, experiment=experiment, step=snapshot.step)


def weight_files(experiment: Experiment, *, ema: bool) -> list[str]:
    """The files of a checkpoint that hold its weights; each replaces what it has in common with
    those before it. There is an average only of what learns."""
    averaged = ema and experiment.train.ema_decay > 0
    frozen = experiment.train.tune.freezes
    return [*(["model"] if frozen or not averaged else []), *(["ema"] if averaged else [])]


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


def _is_checkpoint(path: Path) -> bool:
    return (path / "manifest.json").exists()


def _experiment_of(path: Path) -> Experiment:
    return read_experiment(path.parent.parent if _is_checkpoint(path) else path)


def _read(path: Path, names: list[str]) -> Snapshot:
    return _read_one(path, names) if _is_checkpoint(path) else _read_newest(path, names)


def _warn_of_the_rest(path: Path, step: int, names: list[str]) -> None:
    """Of a checkpoint whose files `names` are whole."""
    checkpoint = path if _is_checkpoint(path) else path / "checkpoints" / checkpoint_name(step)
    if lost := cut_off(checkpoint):
        used = " and ".join(f"{name}.safetensors" for name in names)
        warnings.warn(
            f"{checkpoint} is damaged: {'; '.join(lost)}; {used}, of which the network is taken, "
            f"is whole, but mvsplit train cannot go on from this checkpoint",
            stacklevel=3,
        )


def _read_one(path: Path, names: list[str]) -> Snapshot:
    try:
        return read_checkpoint(path, names)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; choose another checkpoint of the run") from error


def _read_newest(path: Path, names: list[str]) -> Snapshot:
    snapshot, damaged = load_latest(path / "checkpoints", names)
    if snapshot is None:
        raise UserError(f"{path} has no checkpoint yet; train it until the first is saved")
    for error in damaged:
        warnings.warn(f"{error}; using step {snapshot.step}", stacklevel=4)
    return snapshot
