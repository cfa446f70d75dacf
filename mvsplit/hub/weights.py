"""Weights from whatever holds them: released files, our runs and checkpoints, diffusers folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mvsplit.errors import UserError
from mvsplit.hub.fill import fill_in
from mvsplit.hub.released import LikelyHeads, load_released, released_ends
from mvsplit.hub.stored import INDEX, Stored, in_memory, read_weights
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.lora import merge_lora
from mvsplit.residuals import RuleConfig, as_recorded
from mvsplit.training.checkpoint import (
    DamagedCheckpoint,
    list_checkpoints,
    read_checkpoint,
    verified_file,
)
from mvsplit.training.config import Experiment, TuneConfig, read_model_config
from mvsplit.training.finetune import choose_parameters
from mvsplit.training.load import weight_files
from mvsplit.training.run_folder import read_experiment

DIFFUSERS_CLASS = "MVSplitDiTTransformer2DModel"
DIFFUSERS_PREFIX = "dit."  # of every key of that class
_DIFFUSERS_FILES = tuple(
    f"{stem}.safetensors{index}"
    for index in (".index.json", "")
    for stem in ("diffusion_pytorch_model", "model")
)


def load_weights(
    source: str | Path,
    *,
    ema: bool = True,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    likely_heads: LikelyHeads | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DiT:
    """The DiT that `source` holds, read tensor by tensor straight to its dtype and device.

    Args:
        source: a file in the released layout (`model.pt`, `.safetensors`, the index of its
            shards) or a folder with one; a run folder or one of its checkpoints; the folder of a
            diffusers pipeline or transformer.
        ema: of a run, the averaged weights where it keeps any; False for the weights as trained.
        num_heads, num_kv_heads, likely_heads: for the released layout, see `load_released`.
        dtype: of all parameters; as stored if None.
        device: of all parameters.

    Raises:
        UserError: nothing there that can be read; a damaged or foreign file; missing, unknown or
            wrong-shaped keys, by name; a tensor with values that are not finite.
    """
    path = Path(source)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if is_ours(path):
        return _from_checkpoint(path, ema, options)
    if (transformer := diffusers_transformer(path)) is not None:
        return _from_diffusers(transformer, options)
    options |= {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "likely_heads": likely_heads}
    return load_released(_released_file(path), **options)


def ends_of(source: Path) -> tuple[int, int]:
    """Channels of the latents and width of the text states, without reading the weights. Raises
    UserError where nothing at `source` can be read as weights."""
    if is_ours(source):
        config = _trained_as(find_checkpoint(source))[0]
    elif (transformer := diffusers_transformer(source)) is not None:
        config = _diffusers_config(transformer)
    else:
        return released_ends(read_weights(_released_file(source)).tensors)
    return config.channels, config.text_width


def diffusers_transformer(path: Path) -> Path | None:
    """The folder of the transformer, of a diffusers pipeline or its own; None if it is neither."""
    if (path / "model_index.json").is_file():
        return path / "transformer"
    config = path / "config.json"
    return path if config.is_file() and "_class_name" in _json(config) else None


# A run or a checkpoint of ours


def _from_checkpoint(path: Path, ema: bool, options: dict[str, Any]) -> DiT:
    checkpoint = find_checkpoint(path)
    config, experiment = _trained_as(checkpoint)
    names = ["model"] if experiment is None else weight_files(experiment, ema=ema)
    tensors: dict[str, Stored] = {}
    for name in names:
        tensors |= _stored(checkpoint, name)
    tune = TuneConfig() if experiment is None else experiment.train.tune
    model = _ours(config, tensors, str(checkpoint), options, tune)
    merge_lora(model)
    return model.requires_grad_(True)


def _stored(checkpoint: Path, name: str) -> dict[str, Stored]:
    """The tensors of one file of a checkpoint, or of its shards."""
    try:
        file = verified_file(checkpoint, name)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; give another checkpoint of the run") from error
    if file.is_dir():  # of several processes
        return in_memory(read_checkpoint(checkpoint, [file.name]).tensors[file.name])
    return read_weights(file).tensors


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of the run at `path`, or the one that it is itself. Raises UserError
    where there is none."""
    return path if (path / "manifest.json").is_file() else _newest(path)


def is_ours(path: Path) -> bool:
    """Whether `path` is a run or one of its checkpoints."""
    return (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()


def _newest(run: Path) -> Path:
    if not (found := list_checkpoints(run / "checkpoints")):
        raise UserError(f"{run} has no checkpoint yet; train it until the first is saved")
    return found[-1]


def _trained_as(checkpoint: Path) -> tuple[DiTConfig, Experiment | None]:
    """The network's configuration, and its experiment: from the run, or from the checkpoint itself,
    with no experiment, where `mvsplit convert` made it."""
    state = _json(checkpoint / "state.json")
    if "model" in state:
        return read_model_config(state["model"], f"{checkpoint}/state.json: model"), None
    experiment = read_experiment(checkpoint.parent.parent)
    # Which a policy may have changed since the start.
    rule = RuleConfig(**as_recorded(state["rule"]))
    return replace(experiment.model, rule=rule), experiment


# A diffusers folder


def _diffusers_config(folder: Path) -> DiTConfig:
    config = _json(folder / "config.json")
    if config.get("_class_name") != DIFFUSERS_CLASS:
        raise UserError(
            f"checkpoint: {folder} holds a {config.get('_class_name')}; only {DIFFUSERS_CLASS} can "
            "be read"
        )
    known = {field.name for field in fields(DiTConfig)} & config.keys()
    return read_model_config({key: config[key] for key in known}, f"{folder}/config.json")


def _from_diffusers(folder: Path, options: dict[str, Any]) -> DiT:
    model = _diffusers_config(folder)
    found = [folder / name for name in _DIFFUSERS_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"checkpoint: {folder} has no {' or '.join(_DIFFUSERS_FILES[::2])}")
    tensors = {
        key.removeprefix(DIFFUSERS_PREFIX): stored
        for key, stored in read_weights(found[0]).tensors.items()
    }
    return _ours(model, tensors, str(found[0]), options)


# What both have in common: our own names, a tensor for each parameter


def _ours(
    config: DiTConfig,
    tensors: Mapping[str, Stored],
    source: str,
    options: dict[str, Any],
    tune: TuneConfig | None = None,
) -> DiT:
    with torch.device("meta"):
        model = DiT(config)
        choose_parameters(model, tune or TuneConfig())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    faults = [f"missing {name}" for name in shapes if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in shapes]
    faults += [
        f"{name} {list(tensors[name].shape)} (expected {list(shape)})"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise UserError(f"checkpoint: {source} does not fit its configuration: {_some(faults)}")
    fill_in(model, tensors, {name: {name: shape} for name, shape in shapes.items()}, **options)
    return model


def _some(faults: list[str]) -> str:
    more = f" and {len(faults) - 20} more" if len(faults) > 20 else ""
    return ", ".join(faults[:20]) + more


# A file in the released layout


def _released_file(path: Path) -> Path:
    if whole := _whose_part(path):
        raise UserError(f"checkpoint: {path} is a part of {whole[0]}; name the folder {whole[-1]}")
    if not path.is_dir():
        return path
    names = (INDEX, "model.safetensors", "model.pt")
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise UserError(
            f"checkpoint: {path} is no run, no checkpoint and no diffusers folder, and holds none "
            f"of {', '.join(names)}"
        )
    return found[0]


def _whose_part(path: Path) -> tuple[Path | str, ...]:
    """The run or checkpoint that `path` is a part of, and last what to name; empty for no part, as
    what was exported into a run's folder is none."""
    for folder in path.parents[:2]:  # shards have a folder of their own
        run = folder.parent.parent
        listed = (folder / "manifest.json").is_file() and folder.parent.name == "checkpoints"
        if listed and is_ours(run):
            return run, f"{run}, or {folder} for that step"
    records = path.suffix in (".json", ".jsonl") and not path.name.endswith(".index.json")
    part = (records or path.name == "checkpoints") and is_ours(path.parent)
    return (path.parent,) if part else ()


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint: {path} cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"checkpoint: {path} must hold a JSON object")
    return tree
