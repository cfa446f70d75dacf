"""Low-rank adapters as files of the peft library, in both directions.

    adapter_model.safetensors   base_model.model.NAME.lora_A.weight, ….lora_B.weight
    adapter_config.json         rank, α, and the maps by name

Beside what peft reads, the tensor file names the weights that the adapter was trained for, by the
`fingerprint` of their values. An adapter without one, which peft has written, is not refused.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.hub.weights import find_checkpoint
from mvsplit.models import DiT
from mvsplit.models.lora import LoRAConfig, add_lora, fingerprint, lora_parameters, merge_lora
from mvsplit.training.checkpoint import DamagedCheckpoint, copy_tensors, read_checkpoint
from mvsplit.training.run_folder import read_experiment

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_BASE = "mvsplit.base_sha256"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a folder holds.

    Attributes:
        config: rank, α and the ends of the names of its maps.
        tensors: by our parameter names.
        base: of the weights that it belongs to; None where the file does not say.
        source: the folder.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base: str | None
    source: str

    @property
    def maps(self) -> set[str]:
        """The names of the linear maps that it changes."""
        return {name.partition(".lora_")[0] for name in self.tensors}

    def require_base(self, sha256: str, weights: str) -> None:
        """Raises UserError where the adapter is known to belong to other weights."""
        if self.base not in (None, sha256):
            raise UserError(
                f"adapter: {self.source} was trained for weights with sha256 {self.base}, those of "
                f"{weights} have {sha256}; give those that it was trained for"
            )


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder of peft's layout.

    Raises:
        UserError: the files are missing or damaged, or the adapter is of a kind that is not read
            here.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, framework="pt") as file:
            metadata = file.metadata() or {}
        stored = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter: {folder} holds no whole {TENSORS} and {CONFIG} ({error})") from (
            error
        )
    _require_plain(config, folder)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    ends = {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors}
    lora = LoRAConfig(rank=config["r"], alpha=config["lora_alpha"], targets=tuple(sorted(ends)))
    return Adapter(config=lora, tensors=tensors, base=metadata.get(_BASE), source=str(folder))


def merge_adapter(model: DiT, adapter: Adapter, *, weights: str) -> None:
    """Adds what an adapter has learned to the weights of `model`, in place.

    Raises:
        UserError: it was trained for other weights, or for maps that the model has not.
    """
    adapter.require_base(fingerprint(model), weights)
    add_lora(model, adapter.config, only=adapter.maps)
    copy_tensors(adapter.tensors, dict(lora_parameters(model)), adapter.source)
    merge_lora(model)


def export_adapter(run: str | Path, target: str | Path, *, ema: bool = True) -> Path:
    """Writes the adapters of a run, or of one of its checkpoints, as a new folder.

    Raises:
        UserError: the run trains no adapters, or the target exists or cannot be written.
    """
    target, checkpoint = Path(target), find_checkpoint(Path(run))
    experiment = read_experiment(checkpoint.parent.parent)
    tune, averaged = experiment.train.tune, ema and experiment.train.ema_decay > 0
    if tune.what != "lora":
        raise UserError(
            f"to=adapter: {run} was trained with train.tune.what={tune.what!r}, not lora"
        )
    if target.exists():
        raise UserError(f"target: {target} exists already; choose another name")
    name = "ema" if averaged else "model"
    try:
        snapshot = read_checkpoint(checkpoint, [name])
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; give another checkpoint of the run") from error
    tensors = {n: t for n, t in snapshot.tensors[name].items() if ".lora_" in n}
    source = experiment.origin.source if experiment.origin else None
    adapter = Adapter(
        config=tune.lora, tensors=tensors, base=snapshot.values["base"], source=str(run)
    )
    return _write(adapter, target, source)


def _write(adapter: Adapter, target: Path, weights: str | None) -> Path:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        tensors = {PREFIX + name: t.contiguous() for name, t in adapter.tensors.items()}
        metadata = {"format": "pt"} | ({_BASE: adapter.base} if adapter.base else {})
        save_file(tensors, temporary / TENSORS, metadata)
        text = json.dumps(_peft_config(adapter, weights), indent=2) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        (temporary / TENSORS).chmod((temporary / CONFIG).stat().st_mode)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"target: cannot write {target} ({error}); free some space or choose another place"
        ) from error
    return target


def _peft_config(adapter: Adapter, weights: str | None) -> dict[str, Any]:
    """Every map is named in full, for some layers may have none."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": weights,
        "inference_mode": True,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "target_modules": sorted(adapter.maps),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _require_plain(config: dict[str, Any], folder: Path) -> None:
    """Raises UserError for what changes the formula y = Wx + (α/r)·B(Ax)."""
    wanted: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "fan_in_fan_out": (False, None),
        "use_rslora": (False, None),
        "use_dora": (False, None),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "modules_to_save": ([], None),
    }
    for name, allowed in wanted.items():
        if config.get(name) not in allowed:
            raise UserError(
                f"adapter: {folder}/{CONFIG}: {name}={config[name]!r}; only {allowed[0]!r} can be "
                "read"
            )
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float):
            raise UserError(f"adapter: {folder}/{CONFIG}: {name} is missing or no number")
