"""Checkpoints on the disk: each appears whole or not at all, and the newest few stay.

    checkpoints/step_00001000/
        model.safetensors, ema.safetensors, optimizer.safetensors, random.safetensors
        state.json        everything that is not a tensor
        manifest.json     bytes and SHA-256 of each file, written last

Several processes write a folder of shards in the place of each tensor file (`checkpoint_shards`). A
checkpoint is written under a hidden name, forced to the disk, and renamed. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvsplit.data.atomic import sha256
from mvsplit.errors import UserError
from mvsplit.training.distributed import from_each, from_first, rank, share
from mvsplit.training.files import fsync
from mvsplit.training.spread import local, part_like

FORMAT = "mvsplit-checkpoint"
VERSION, SHARDED_VERSION = 1, 2
_REPLACED = ".replaced"  # of a whole checkpoint whose step is saved again
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
        sharded: whether every rank holds a part of the tensors only.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: dict[str, Any]
    sharded: bool = False

    def copy_to(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Copies every tensor of the file `name` into the one of the same name in `targets`; every
        rank has to call it, with those that it holds.

        Raises:
            UserError: a name that only one of them has, or two shapes that differ.
        """
        file = f"{name}.safetensors"
        elsewhere = set().union(*from_each(set(targets))) - targets.keys()
        if not self.sharded:
            found = self.tensors.get(name, {})
            copy_tensors({n: found[n] for n in found if n not in elsewhere}, targets, file)
            return
        from mvsplit.training.checkpoint_shards import ShardedFiles

        assert isinstance(self.tensors, ShardedFiles)
        shapes = self.tensors.shapes(name)
        _refuse_others(
            _shapes(targets), {n: s for n, s in shapes.items() if n not in elsewhere}, file
        )
        self.tensors.copy_to(name, targets)


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], where: str) -> None:
    """Copies every tensor of `source` into the one of the same name in `target`, of which a rank
    may hold a part only.

    Raises:
        UserError: a name that only one of them has, or two shapes that differ.
    """
    _refuse_others(_shapes(target), _shapes(source), where)
    for name, tensor in target.items():
        local(tensor).copy_(part_like(source[name], tensor))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _refuse_others(
    wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: str
) -> None:
    for verb, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has the unknown", found.keys() - wanted.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{where} {verb} {min(names)}{more}; the checkpoint is of another model"
            )
    for name, shape in wanted.items():
        if shape != found[name]:
            raise UserError(
                f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}; the "
                f"checkpoint is of another model"
            )


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


def save_checkpoint(
    folder: Path, snapshot: Snapshot, *, keep: int, keep_every: int = 0, group: Any = None
) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep` and multiples of `keep_every`.

    Args:
        group: of a sharded snapshot, the processes that hold it, all of which have to call this.

    Raises:
        UserError: it cannot be written, the disk being full for example; the older ones stay.
    """
    final = folder / checkpoint_name(snapshot.step)
    temporary = folder / f".{final.name}.tmp"
    try:
        if snapshot.sharded:
            _write_sharded(temporary, final, snapshot, group)
        else:
            _begin(temporary)
            _publish(temporary, final, snapshot, _write(temporary, snapshot.tensors), VERSION)
    except (OSError, SafetensorError) as error:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(_cannot_save(folder, snapshot.step, error)) from error
    if rank() == 0:  # an error of this is not the save's
        _prune(folder, keep, keep_every)
    return final


def _begin(temporary: Path) -> None:
    """An empty folder to write into."""
    temporary.parent.mkdir(exist_ok=True)
    remove_leftovers(temporary.parent)
    temporary.mkdir()


def _write_sharded(temporary: Path, final: Path, snapshot: Snapshot, group: Any) -> None:
    # Imported where it can occur only, for the import takes a while.
    from mvsplit.training.checkpoint_shards import Files, write_shards

    def publish(files: Files) -> None:
        _publish(temporary, final, snapshot, files, SHARDED_VERSION)

    write_shards(
        temporary,
        snapshot.tensors,
        rank=rank(),
        group=group,
        begin=lambda: _begin(temporary),
        publish=publish,
    )


def _publish(
    temporary: Path, final: Path, snapshot: Snapshot, files: dict[str, Any], version: int
) -> None:
    """Completes a folder whose tensor files are on the disk, and gives it its name."""
    state = {"step": snapshot.step, **snapshot.values}
    (temporary / "state.json").write_text(json.dumps(state))
    files = {"state.json": _fingerprint(temporary / "state.json"), **files}
    manifest = {"format": FORMAT, "version": version, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in (temporary / "state.json", temporary / "manifest.json", temporary):
        fsync(path)
    replaced = _hide(final, _REPLACED) if final.exists() else None
    temporary.rename(final)
    fsync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # else the next save or start removes it


def _prune(folder: Path, keep: int, keep_every: int) -> None:
    for old in list_checkpoints(folder)[:-keep]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        with _tidying(folder):
            _remove(old)


@contextmanager
def _tidying(folder: Path) -> Iterator[None]:
    """Says in one line what keeps old or half checkpoints from being put out of the way."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot tidy up {folder}: {error.strerror} ({error.filename}); make it writable, then "
            f"give the same command again"
        ) from error


def _cannot_save(folder: Path, step: int, error: Exception) -> str:
    older = list_checkpoints(folder)
    stays = f"{older[-1]} stays" if older else "there is no older one"
    return (
        f"cannot save the checkpoint of step {step} in {folder}: {error}; {stays}; free some "
        f"space, then give the same command again"
    )


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Writes the tensor files; returns their fingerprints by name."""
    readable = folder.stat().st_mode & 0o666
    for name, named in tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(dict(named), path)
        path.chmod(readable)  # its writer lets only the owner read it
        fsync(path)
    return {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _remove(path: Path) -> None:
    """Removes a checkpoint so that no part of it is ever seen under its name."""
    shutil.rmtree(_hide(path))


def _hide(path: Path, suffix: str = ".old") -> Path:
    """Gives a checkpoint a name under which nobody looks for one."""
    return path.rename(path.with_name(f".{path.name}{suffix}"))


def remove_leftovers(folder: Path) -> None:
    """Completes a replacement that a kill broke off between two renames, and removes what else it
    left behind during a save or a removal.

    Raises:
        UserError: it cannot be removed.
    """
    with _tidying(folder):
        for replaced in folder.glob(f".step_*{_REPLACED}"):
            final = folder / replaced.name[1 : -len(_REPLACED)]
            new = folder / f".{final.name}.tmp"  # complete, or the other would have its name
            if not final.exists():
                (new if new.exists() else replaced).rename(final)
        for path in folder.glob(".step_*"):
            shutil.rmtree(path)


def read_checkpoint(path: Path, files: Iterable[str] | None = None) -> Snapshot:
    """The checkpoint at `path`, on the CPU; only the named tensor files if `files` is given. That
    of several processes is read when it is asked for its tensors.

    Raises:
        UserError: it is not one of ours, or lacks one of `files`.
        DamagedCheckpoint: it is ours, but a file is truncated, changed or missing.
    """
    manifest = _read_manifest(path)
    wanted = _wanted(path, manifest, files)
    for name in _parts(manifest, ["state.json", *wanted]):
        _verify(path, name, manifest)
    return _open(path, wanted)


def verified_file(path: Path, name: str) -> Path:
    """The tensor file `name` of the checkpoint at `path`, or the folder of its shards, the bytes
    compared with the manifest.

    Raises:
        UserError: it is not one of ours, or has no such file.
        DamagedCheckpoint: it is ours, but the file is truncated, changed or missing.
    """
    manifest = _read_manifest(path)
    parts = _parts(manifest, _wanted(path, manifest, [name]))
    for part in parts:
        _verify(path, part, manifest)
    return path / Path(parts[0]).parts[0]


def _wanted(path: Path, manifest: Mapping[str, Any], files: Iterable[str] | None) -> list[str]:
    """The tensor files to read: all, or those of `files`, which must be there."""
    stored = list(dict.fromkeys(_stem(name) for name in manifest if name != "state.json"))
    wanted = stored if files is None else list(files)
    for name in wanted:
        if name not in stored:
            raise UserError(f"{path} holds no {name!r}; it has {', '.join(stored)}")
    return wanted


def _stem(name: str) -> str:
    """model for model.safetensors and for model/00001.safetensors."""
    return name.removesuffix(".safetensors").partition("/")[0]


def _parts(manifest: Mapping[str, Any], wanted: Iterable[str]) -> list[str]:
    """The files on the disk that hold the `wanted` ones."""
    return [name for w in wanted for name in manifest if _stem(name) == w]


def _open(path: Path, wanted: list[str]) -> Snapshot:
    """A checkpoint whose bytes are known to be right."""
    values = json.loads((path / "state.json").read_text())
    step = values.pop("step")
    if any((path / name).is_dir() for name in wanted):
        from mvsplit.training.checkpoint_shards import ShardedFiles

        return Snapshot(step=step, tensors=ShardedFiles(path, wanted), values=values, sharded=True)
    tensors = {name: load_file(path / f"{name}.safetensors") for name in wanted}
    return Snapshot(step=step, tensors=tensors, values=values)


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
    if manifest.get("version") not in (VERSION, SHARDED_VERSION):
        raise UserError(
            f"{path} has checkpoint version {manifest.get('version')}, this program reads "
            f"{VERSION} and {SHARDED_VERSION}; use the version of mvsplit that wrote it"
        )
    return manifest["files"]


def _verify(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Compares the file `name` of the checkpoint at `path` with what the manifest says of it."""
    expected = manifest.get(name)
    if (fault := _fault_of_size(path / name, name, expected)) is not None:
        raise DamagedCheckpoint(f"{path}: {fault}")
    if _fingerprint(path / name) != expected:
        raise DamagedCheckpoint(f"{path}: {name} is damaged (checksum)")


def cut_off(path: Path) -> list[str]:
    """Which files of the checkpoint at `path` are missing or shorter than they were written; their
    bytes are not read."""
    faults = (_fault_of_size(path / n, n, written) for n, written in _read_manifest(path).items())
    return [fault for fault in faults if fault is not None]


def _fault_of_size(file: Path, name: str, written: Mapping[str, Any] | None) -> str | None:
    if written is None or not file.exists():
        return f"{name} is missing"
    if (size := file.stat().st_size) < written["bytes"]:
        return f"{name} is truncated ({size} of {written['bytes']} bytes)"
    return None


def read_newest(
    paths: Sequence[Path], files: Iterable[str] | None = None
) -> tuple[Snapshot | None, list[DamagedCheckpoint]]:
    """The last of `paths` that is whole, and the damaged ones after it. The ranks of a run share
    the work of comparing bytes, and agree.

    Raises:
        UserError: one that is not ours.
    """
    damaged: list[DamagedCheckpoint] = []
    for path in reversed(paths):
        damage = next((d for d in from_each(_damage(path, files)) if d), None)
        if damage is None:
            return _open(path, _wanted(path, _read_manifest(path), files)), damaged
        damaged.append(DamagedCheckpoint(damage))
    return None, damaged


def _damage(path: Path, files: Iterable[str] | None) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files, if anything."""
    try:
        manifest = _read_manifest(path)
        wanted = _wanted(path, manifest, files)
        for name in share(_parts(manifest, ["state.json", *wanted])):
            _verify(path, name, manifest)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def load_latest(
    folder: Path, files: Iterable[str] | None = None
) -> tuple[Snapshot | None, list[DamagedCheckpoint]]:
    """The newest checkpoint that is whole, and the damaged ones that are newer.

    (None, []) where there is no checkpoint at all.

    Raises:
        UserError: one that is not ours, or damaged ones only.
    """
    snapshot, damaged = read_newest(from_first(lambda: list_checkpoints(folder)), files)
    if snapshot is not None:
        return snapshot, damaged
    if damaged:
        raise UserError(
            f"{damaged[0]}, and there is no older checkpoint; restore it, or start in a new "
            f"run folder"
        )
    return None, []


def set_aside_after(folder: Path, step: int, suffix: str = "damaged") -> None:
    """Renames the checkpoints past `step` to NAME.suffix, so that they neither come back nor count
    among those to keep.

    Raises:
        UserError: they cannot be renamed.
    """
    with _tidying(folder):
        for path in list_checkpoints(folder):
            if step_of(path) > step:
                aside = path.with_name(f"{path.name}.{suffix}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
