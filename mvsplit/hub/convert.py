"""Weights from any format that `load_weights` reads into any of the formats here, bit for bit.

A target appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mvsplit.errors import UserError, nearest
from mvsplit.hub.released import export_released, heads_unsaid, released_metadata
from mvsplit.hub.stored import INDEX
from mvsplit.models import DiT
from mvsplit.training.checkpoint import Snapshot, save_checkpoint

SHARD_GB = 5.0  # as the hub shards files
_BY_SUFFIX = {".pt": "pt", ".safetensors": "safetensors"}


def write_weights(
    model: DiT, target: str | Path, kind: str | None = None, *, shard_gb: float = SHARD_GB
) -> Path:
    """Writes the weights of `model` to a new file or folder.

    Args:
        model: what to write.
        target: where to; it must not exist.
        kind: `pt`, `safetensors` (one file in the released layout), `shards` (a folder of such
            files with an index), `checkpoint` (of ours, weights only) or `diffusers` (a pipeline
            folder; needs the extra `hub`); from the suffix of `target` if None.
        shard_gb: size of a shard at most, in 10⁹ bytes; one tensor is never cut.

    Returns:
        `target`, or the checkpoint in it.

    Raises:
        UserError: an unknown kind; the target exists or cannot be written; a model that the
            released layout cannot hold.
    """
    path = Path(target)
    write = _writer(path, kind)
    if path.exists():
        raise UserError(f"target: {path} exists already; choose another name")
    if not shard_gb > 0:
        raise UserError(f"shard_gb={shard_gb}: must be greater than 0")
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(model, temporary, shard_gb)
        _make_readable(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"target: cannot write {path} ({error}); free some space or choose another place"
        ) from error
    finally:
        _remove(temporary)
    return path


Writer = Callable[[DiT, Path, float], None]


def _writer(path: Path, kind: str | None) -> Writer:
    kind = kind or _BY_SUFFIX.get(path.suffix)
    if kind is None:
        raise UserError(
            f"target: {path} does not say in which format; end it in .pt or .safetensors, or give "
            f"--to {', '.join(KINDS)}"
        )
    if kind not in KINDS:
        raise UserError(f"to={kind!r} is unknown: {nearest(kind, KINDS)}")
    return KINDS[kind]


def _write_pt(model: DiT, path: Path, shard_gb: float) -> None:
    with open(path, "wb") as file:  # given a path, torch raises RuntimeError where it cannot write
        torch.save(export_released(model), file)
    if (unsaid := heads_unsaid(model.config)) is not None:
        warnings.warn(f"target: {unsaid}", stacklevel=4)  # the caller of write_weights


def _write_safetensors(model: DiT, path: Path, shard_gb: float) -> None:
    save_file(export_released(model), path, released_metadata(model))


def _write_shards(model: DiT, folder: Path, shard_gb: float) -> None:
    folder.mkdir()
    tensors = export_released(model)
    shards = list(_cut(tensors, int(shard_gb * 1e9)))
    places = {}
    for number, keys in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name, released_metadata(model))
        places.update(dict.fromkeys(keys, name))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Keys in order, in runs of `limit` bytes at most, or of one key that is larger."""
    keys: list[str] = []
    size = 0
    for key, tensor in tensors.items():
        if keys and size + tensor.nbytes > limit:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    yield keys


def _write_checkpoint(model: DiT, folder: Path, shard_gb: float) -> None:
    holder = folder.with_name(f"{folder.name}.checkpoints")
    holder.mkdir()
    try:
        tensors = {"model": dict(model.state_dict())}
        values = {"model": dataclasses.asdict(model.config)}
        os.replace(
            save_checkpoint(holder, Snapshot(step=0, tensors=tensors, values=values), keep=1),
            folder,
        )
    finally:
        shutil.rmtree(holder)


def _write_diffusers(model: DiT, folder: Path, shard_gb: float) -> None:
    from mvsplit.hub.diffusers_pipeline import MVSplitPipeline

    pipeline = MVSplitPipeline.from_dit(model)
    pipeline.save_pretrained(folder, max_shard_size=int(shard_gb * 1e9))


KINDS: dict[str, Writer] = {
    "pt": _write_pt,
    "safetensors": _write_safetensors,
    "shards": _write_shards,
    "checkpoint": _write_checkpoint,
    "diffusers": _write_diffusers,
}


def _make_readable(path: Path) -> None:
    """Gives weights the mode of any new file, for their writer lets only the owner read them."""
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        shutil.copymode(probe, file)
    probe.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
