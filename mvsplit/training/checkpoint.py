"""Checkpoints on the disk: each appears whole or not at all, and the newest few stay.

    checkpoints/step_00001000/
        model.safetensors, ema.safetensors, optimizer.safetensors, random.safetensors
        state.json        everything that is not a tensor
        manifest.json     bytes and SHA-256 of each file, written last

A checkpoint is written under a hidden name, forced to the disk, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.training.files import fsync

FORMAT = "mvsplit-checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(Exception):
    """A checkpoint of ours that is truncated or whose bytes have changed."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        step: optimiser steps taken.
        tensors: for each file, its tensors by name.
        values: everything else, as JSON can hold it.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """step_00001000 for 1000."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by rising step; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """1000 for step_00001000."""
    return int(path.name.removeprefix("step_"))


def save_checkpoint(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`.

    Raises:
        UserError: it cannot be written, the disk being full for example; the older ones stay.
    """
    final = folder / checkpoint_name(snapshot.step)
    temporary = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir()
        _write(temporary, snapshot)
        if final.exists():
            _remove(final)
        temporary.rename(final)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(_cannot_save(folder, snapshot.step, error)) from error
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return final


def _cannot_save(folder: Path, step: int, error: Exception) -> str:
    older = list_checkpoints(folder)
    stays = f"{older[-1]} stays" if older else "there is no older one"
    return (
        f"cannot save the checkpoint of step {step} in {folder}: {error}; {stays}; free some "
        f"space, then give the same command again"
    )


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name, tensors in snapshot.tensors.items():
        save_file(tensors, folder / f"{name}.safetensors")
    state = {"step": snapshot.step, **snapshot.values}
    (folder / "state.json").write_text(json.dumps(state))
    for path in folder.glob("*.safetensors"):  # which its writer makes readable by the owner only
        shutil.copymode(folder / "state.json", path)
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "version": VERSION, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in (*folder.iterdir(), folder):
        fsync(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _remove(path: Path) -> None:
    """Removes a checkpoint so that no part of it is ever seen under its name."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Removes what a kill during a save or a removal left behind."""
    for path in folder.glob(".step_*"):
        shutil.rmtree(path)


def read_checkpoint(path: Path, files: Iterable[str] | None = None) -> Snapshot:
    """The checkpoint at `path`, on the CPU; only the named tensor files if `files` is given.

    Raises:
        UserError: it is not one of ours, or lacks one of `files`.
        DamagedCheckpoint: it is ours, but a file is truncated, changed or missing.
    """
    manifest = _read_manifest(path)
    stored = [n.removesuffix(".safetensors") for n in manifest if n.endswith(".safetensors")]
    wanted = stored if files is None else list(files)
    for name in wanted:
        if name not in stored:
            raise UserError(f"{path} holds no {name!r}; it has {', '.join(stored)}")
    for name in ("state.json", *(f"{n}.safetensors" for n in wanted)):
        _verify(path / name, manifest)
    values = json.loads((path / "state.json").read_text())
    tensors = {name: load_file(path / f"{name}.safetensors") for name in wanted}
    return Snapshot(step=values.pop("step"), tensors=tensors, values=values)


def verified_file(path: Path, name: str) -> Path:
    """The tensor file `name` of the checkpoint at `path`, its bytes compared with the manifest.

    Raises:
        UserError: it is not one of ours, or has no such file.
        DamagedCheckpoint: it is ours, but the file is truncated, changed or missing.
    """
    manifest = _read_manifest(path)
    file = path / f"{name}.safetensors"
    if file.name not in manifest:
        raise UserError(f"{path} holds no {name!r}; it has {', '.join(sorted(manifest))}")
    _verify(file, manifest)
    return file


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not a checkpoint of mvsplit: it has no manifest.json; move it elsewhere"
        ) from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: manifest.json is damaged") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of mvsplit; move it elsewhere")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has checkpoint version {manifest.get('version')}, this program reads "
            f"{VERSION}; use the version of mvsplit that wrote it"
        )
    return manifest["files"]


def _verify(path: Path, manifest: dict[str, Any]) -> None:
    expected = manifest.get(path.name)
    if expected is None or not path.exists():
        raise DamagedCheckpoint(f"{path.parent}: {path.name} is missing")
    size = path.stat().st_size
    if size < expected["bytes"]:
        raise DamagedCheckpoint(
            f"{path.parent}: {path.name} is truncated ({size} of {expected['bytes']} bytes)"
        )
    if _fingerprint(path) != expected:
        raise DamagedCheckpoint(f"{path.parent}: {path.name} is damaged (checksum)")


def load_latest(
    folder: Path, files: Iterable[str] | None = None
) -> tuple[Snapshot | None, list[DamagedCheckpoint]]:
    """The newest checkpoint that is whole, and the damaged ones that are newer.

    (None, []) where there is no checkpoint at all.

    Raises:
        UserError: one that is not ours, or damaged ones only.
    """
    damaged: list[DamagedCheckpoint] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path, files), damaged
        except DamagedCheckpoint as error:
            damaged.append(error)
    if damaged:
        raise UserError(
            f"{damaged[0]}, and there is no older checkpoint; restore it, or start in a new "
            f"run folder"
        )
    return None, []


def set_aside_after(folder: Path, step: int, suffix: str = "damaged") -> None:
    """Renames the checkpoints past `step` to NAME.suffix, so that they neither come back nor count
    among those to keep."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.{suffix}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
