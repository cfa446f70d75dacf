"""Checkpoints in the background: the state is copied, and a thread writes the copy.

The step after a save waits for the copy only, which goes at the speed of memory. At most one save
is under way; the next waits for it, so that a disk that cannot keep up slows the run down instead
of filling the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mvsplit.training.checkpoint import Snapshot, save_checkpoint
from mvsplit.training.distributed import group_of_saves
from mvsplit.training.spread import is_spread, local


class Saver:
    """Writes the checkpoints of a run. On several ranks, every rank has to make the same calls.

    Args:
        folder, keep, keep_every: of `save_checkpoint`.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._staging = Staging()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mvsplit-save")
        self._job: Future[Path] | None = None
        self._group = group_of_saves()

    def begin(self, snapshot: Snapshot) -> None:
        """Copies a snapshot and begins to write it. The save before must have been waited for."""
        assert self._job is None
        self._job = self._pool.submit(
            save_checkpoint,
            self.folder,
            self._staging.copy(snapshot),
            keep=self.keep,
            keep_every=self.keep_every,
            group=self._group,
        )

    @property
    def failed(self) -> bool:
        """Whether a save has ended without a checkpoint; `wait` then raises why."""
        job = self._job
        return job is not None and job.done() and job.exception() is not None

    def finished(self) -> Path | None:
        """The checkpoint that was completed since the last call, if any; never waits. A save that
        failed is left to `failed` and `wait`: a rank that raised here would be alone with it."""
        job = self._job
        if job is None or not job.done() or job.exception() is not None:
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """The checkpoint that was being written, once it is complete.

        Raises:
            UserError: it could not be written.
        """
        job, self._job = self._job, None
        return None if job is None else job.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Completes what was begun. Where the run ends by an exception, that is what is raised."""
        self._pool.shutdown(wait=True)
        if exc is None:
            self.wait()


@dataclass
class _Span:
    """The elements of a storage, from the first to the last, that some tensors are views of."""

    key: tuple[int, torch.dtype]
    tensor: Tensor
    first: int
    end: int


def _key(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _spans(tensors: Iterable[Tensor]) -> list[_Span]:
    found: dict[tuple[int, torch.dtype], _Span] = {}
    for tensor in tensors:
        first, key = int(tensor.storage_offset()), _key(tensor)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = first + 1 + sum((n - 1) * step for n, step in steps) if tensor.numel() else first
        span = found.setdefault(key, _Span(key, tensor, first, end))
        span.first, span.end = min(span.first, first), max(span.end, end)
    return list(found.values())


class Staging:
    """Copies of tensors on the CPU, in memory that the next copy uses again.

    Tensors that are views of one buffer stay that, so a copy is a handful of operations at any
    depth; of a buffer, what lies between them is copied. What is on a GPU is copied into pinned
    memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}  # by the order in which they are met
        self._meshes: dict[Any, Any] = {}

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot in memory of its own."""
        held = [local(t) for named in snapshot.tensors.values() for t in named.values()]
        copies = {span.key: self._copy(i, span) for i, span in enumerate(_spans(held))}

        def copied(tensor: Tensor) -> Tensor:
            ours = local(tensor)
            first, copy = copies[_key(ours)]
            view = copy.as_strided(ours.shape, ours.stride(), ours.storage_offset() - first)
            return self._like(tensor, view) if is_spread(tensor) else view

        tensors = {
            file: {name: copied(tensor) for name, tensor in named.items()}
            for file, named in snapshot.tensors.items()
        }
        return replace(snapshot, tensors=tensors)

    def _copy(self, number: int, span: _Span) -> tuple[int, Tensor]:
        """A span's first element in its storage, and its elements in memory of their own."""
        held, length = span.tensor, span.end - span.first
        source = held.detach().as_strided((length,), (1,), span.first)
        buffer = self._buffer(number, length * held.element_size(), pinned=held.is_cuda)
        return span.first, buffer.view(held.dtype).copy_(source)

    def _buffer(self, number: int, size: int, *, pinned: bool) -> Tensor:
        if number not in self._buffers or self._buffers[number].numel() != size:
            self._buffers[number] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._buffers[number]

    def _like(self, tensor: Any, view: Tensor) -> Tensor:
        """A DTensor on the CPU with the placement of `tensor`."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor

        mesh = tensor.device_mesh
        if mesh.device_type != "cpu" and mesh not in self._meshes:
            self._meshes[mesh] = init_device_mesh(
                "cpu", tuple(mesh.shape), mesh_dim_names=mesh.mesh_dim_names
            )
        return DTensor.from_local(
            view,
            self._meshes.get(mesh, mesh),
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
