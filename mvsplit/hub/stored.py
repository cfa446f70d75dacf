"""Tensors of weight files by name, each read only when it is asked for and then straight from its
place on the disk: no mapping that counts as memory, no pickled code that runs.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mvsplit.errors import UserError

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor that is not in memory yet.

    Attributes:
        shape, dtype: as it is stored.
        copy_to: reads it into a tensor of as many values, of any dtype, on any device; straight
            into its memory where that is possible.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    copy_to: Callable[[Tensor], None]

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self.copy_to(values)
        return values


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The tensors of one or several files, and the text that a safetensors file may carry."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_weights(path: Path) -> WeightFile:
    """The tensors of a `.safetensors` file, of its shards by their index file, or of a `.pt` file.

    A `.pt` file holds the state dict itself or under "model" or "state_dict"; it is read without
    running any code that it may hold.

    Raises:
        UserError: no such file; a file that is cut off or holds no state dict; a shard that the
            index names and that is missing, or lacks a tensor.
    """
    if not path.is_file():
        raise UserError(f"checkpoint: there is no file {path}; name a run or a file of weights")
    try:
        if path.name.endswith(".index.json"):
            return _shards(path)
        return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except UnpicklingError as error:  # whose own text advises to run what the file holds
        raise UserError(
            f"checkpoint: {path} is truncated or no checkpoint (not a PyTorch file of tensors only)"
        ) from error
    except (SafetensorError, ValueError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint: {path} is truncated or no checkpoint ({reason})") from error


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The same interface for tensors that are there already."""
    return {
        key: Stored(shape=tuple(t.shape), dtype=t.dtype, copy_to=partial(_copy, t.detach()))
        for key, t in tensors.items()
    }


def unwrap(content: object, source: str) -> Mapping[str, Tensor]:
    """The state dict in `content`: itself, or under "model" or "state_dict". Raises UserError."""
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise UserError(
            f"checkpoint: {source} holds no state dict, neither itself nor under 'model' or "
            "'state_dict'"
        )
    return content


def _safetensors(path: Path) -> WeightFile:
    with safe_open(path, framework="pt"):  # which checks the header against the file's length
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {key: _entry(path, key, entry, 8 + length) for key, entry in header.items()}
    return WeightFile(tensors=tensors, metadata=metadata)


def _entry(path: Path, key: str, entry: dict[str, Any], start: int) -> Stored:
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"checkpoint: {path}: {key} is of dtype {entry['dtype']}; weights here are one of "
            f"{', '.join(_DTYPES)}"
        )
    shape = tuple(entry["shape"])
    return _at(path, start + entry["data_offsets"][0], _DTYPES[entry["dtype"]], shape)


def _shards(index: Path) -> WeightFile:
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = {name: _shard(index, name) for name in sorted(set(places.values()))}
    lost = [key for key, name in places.items() if key not in files[name].tensors]
    if lost:
        raise UserError(f"checkpoint: {index.parent / places[lost[0]]} lacks {', '.join(lost)}")
    metadata = {key: text for file in files.values() for key, text in file.metadata.items()}
    tensors = {key: files[name].tensors[key] for key, name in places.items()}
    return WeightFile(tensors=tensors, metadata=metadata)


def _shard(index: Path, name: str) -> WeightFile:
    if Path(name).name != name or not (index.parent / name).is_file():
        raise UserError(f"checkpoint: {index} names the shard {name}, which is not beside it")
    return read_weights(index.parent / name)


def _pickled(path: Path) -> WeightFile:
    if not zipfile.is_zipfile(path):  # files of old versions of torch have to be read as a whole
        content = torch.load(path, map_location="cpu", weights_only=True)
        return WeightFile(tensors=in_memory(unwrap(content, str(path))), metadata={})
    with FakeTensorMode():  # shapes and places in the file without any data
        content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {}
    for key, fake in unwrap(content, str(path)).items():
        start = cast(int, fake.untyped_storage()._checkpoint_offset)
        offset = start + int(fake.storage_offset()) * fake.element_size()
        tensors[key] = _at(path, offset, fake.dtype, tuple(fake.shape), fake.stride())
    return WeightFile(tensors=tensors, metadata={})


def _at(
    path: Path,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
) -> Stored:
    """The tensor that begins at byte `offset`; in the usual order of values if `stride` is None."""
    usual = torch.empty(shape, device="meta").stride()
    if stride is None or stride == usual or 0 in shape:
        copy_to = partial(_read_in_order, path, offset, dtype)
    else:
        copy_to = partial(_read_strided, path, offset, dtype, shape, stride)
    return Stored(shape=shape, dtype=dtype, copy_to=copy_to)


def _copy(values: Tensor, out: Tensor) -> None:
    out.copy_(values.reshape(out.shape))


def _read_in_order(path: Path, offset: int, dtype: torch.dtype, out: Tensor) -> None:
    if out.is_cpu and out.dtype == dtype and out.is_contiguous():
        return _read_bytes(path, offset, out.view(-1))
    staged = torch.empty(out.numel(), dtype=dtype)
    _read_bytes(path, offset, staged)
    return _copy(staged, out)


def _read_strided(
    path: Path,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    out: Tensor,
) -> None:
    spanned = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    staged = torch.empty(spanned, dtype=dtype)
    _read_bytes(path, offset, staged)
    _copy(staged.as_strided(shape, stride), out)


def _read_bytes(path: Path, offset: int, flat: Tensor) -> None:
    if not flat.numel():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        if file.readinto(flat.view(torch.uint8).numpy().data) < flat.nbytes:
            raise UserError(f"checkpoint: {path} is truncated at byte {offset}; fetch it again")
