"""The tensors of a checkpoint of several processes: torch.distributed.checkpoint, in safetensors.

    step_00001000/model/00000.safetensors, 00001.safetensors, …    one a rank
    step_00001000/ema/…, optimizer/…, random/…

Each rank writes its shards, and where they begin into the file's header, as
`HuggingFaceStorageReader` reads them on any number of processes. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from mvsplit.data.atomic import sha256
from mvsplit.training.files import fsync

# What `HuggingFaceStorageReader` looks for in the header of a file.
_HEADER = {"DCP_VERSION": "1.0", "format": "pt"}

Files = dict[str, dict[str, Any]]  # bytes and SHA-256 by path within the checkpoint


def write_shards(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    rank: int,
    group: Any,
    begin: Callable[[], None],
    publish: Callable[[Files], None],
) -> None:
    """Writes what every rank holds of `tensors`; every rank has to call it.

    Args:
        folder: where the files go.
        tensors: for each file its tensors; DTensors on the CPU, or plain ones of this rank alone.
        rank: this process's number.
        group: the processes, which talk by it and by nothing else meanwhile.
        begin: is called on the first rank before anything is written.
        publish: is called on the first rank once all is on the disk.

    Raises:
        OSError: what kept any of the ranks from writing, on every rank.
    """
    flat = {f"{file}/{name}": t for file, named in tensors.items() for name, t in named.items()}
    writer = _Writer(folder, rank, begin, publish)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save_shards(flat, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        number, (cause, _) = next(iter(sorted(error.failures.items())))
        raise OSError(f"rank {number}: {cause}") from error


class _Writer(StorageWriter):
    """One file a rank for each part of the state, on the disk before anybody hears of it."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        begin: Callable[[], None],
        publish: Callable[[Files], None],
    ) -> None:
        self.folder, self.rank = folder, rank
        self._begin, self._publish = begin, publish

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._begin()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, dict[str, Tensor]] = {}
        offsets: dict[str, dict[str, Any]] = {}
        for item in plan.items:
            file, _, name = item.index.fqn.partition("/")
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            assert item.tensor_data is not None
            if value.numel():
                tensors.setdefault(file, {})[name] = value
                start = list(item.tensor_data.chunk.offsets)
                offsets.setdefault(file, {})[name] = {"saved_offsets": start}
        files = {}
        for file, named in tensors.items():
            path = Path(file) / f"{self.rank:05d}.safetensors"
            files[str(path)] = self._write(self.folder / path, named, offsets[file])
        # What is told of the items is not used but for the first: which files there are.
        told = [WriteResult(item.index, 0, None) for item in plan.items[1:]]
        told += [WriteResult(item.index, 0, files) for item in plan.items[:1]]
        done: Future[list[WriteResult]] = Future()
        done.set_result(told)
        return done

    def _write(self, path: Path, tensors: Mapping[str, Tensor], offsets: Any) -> dict[str, Any]:
        path.parent.mkdir(exist_ok=True)
        header = _HEADER | {"DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file(dict(tensors), path, header)
        os.chmod(path, path.parent.stat().st_mode & 0o666)  # its writer lets only the owner read it
        fsync(path)
        fsync(path.parent)
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: Files = {}
        for result in (r for of_rank in results for r in of_rank):
            files |= result.storage_data or {}
        self._publish(files)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class ShardedFiles(Mapping[str, Mapping[str, Tensor]]):
    """The tensors of a checkpoint by file, each file read when it is asked for: whole into memory,
    or by `copy_to` straight into the tensors of a run, of which a rank reads its shards only."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self._names = path, names

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        if name not in self._names:
            raise KeyError(name)
        stored = self._stored(name)
        tensors = {key: torch.empty(e.size, dtype=e.properties.dtype) for key, e in stored.items()}
        self.copy_to(name, tensors)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self, name: str) -> dict[str, torch.Size]:
        """The tensors in a file, without reading them."""
        return {key: entry.size for key, entry in self._stored(name).items()}

    @torch.no_grad()
    def copy_to(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Reads the tensors of a file into those of the same names."""
        reader = HuggingFaceStorageReader(str(self.path / name))
        with warnings.catch_warnings():  # that there are no other processes is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load_shards(dict(targets), storage_reader=reader, no_dist=True)

    def _stored(self, name: str) -> dict[str, Any]:
        reader = HuggingFaceStorageReader(str(self.path / name))
        return dict(reader.read_metadata().state_dict_metadata)
