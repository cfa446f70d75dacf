"""Forward and backward of a piece as one CUDA graph.

A step of 400 layers launches some 18,000 kernels, and launching takes longer than running them. A
graph is recorded once for each shape of a piece and replayed from then on: Python, autograd and the
launches are gone, the arithmetic is the same. Gradients are added to buffers that stay where they
are; a piece is copied into the graph's own input.

A graph runs the network as it was when it was recorded. So it is used only while nobody watches a
part of the network (`Graphs.usable`) and while the same parameters learn, and it is dropped when
parameters move (`Graphs.clear`).

A look into the passes (`Look`) has graphs of its own, which hold what it computes, too: in a narrow
network launching that takes far longer than a step does. They are recorded where half of the memory
is free before, of the four shapes that were looked at first.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mvsplit.kernels.block_parts import has_gradient_hooks
from mvsplit.kernels.capture import capture
from mvsplit.models.block import _is_watched
from mvsplit.training.pieces import Piece

_logger = logging.getLogger(__name__)
_MOST = 8  # graphs that are kept, the shapes last seen
_MOST_LOOKS = 4  # and those first looked at: a recording costs more than a look
NODE_BYTES = 600_000  # of a graph for every layer: some fifty nodes of about 10 KB

Run = Callable[[Piece], Tensor]  # adds gradients, gives the loss of each sample


class Look(Protocol):
    """What looks into the passes of a piece, with hooks, and computes numbers from what it sees
    (`mvsplit.diagnostics.LayerProbe`)."""

    @property
    def key(self) -> Hashable:
        """Looks with the same key see the same of passes of one network that are alike."""

    def passes(self) -> AbstractContextManager[None]:
        """For the passes: what runs inside is seen."""

    def read_gradients(self) -> None:
        """Reads the gradients of the parameters, once they are those of the whole batch."""

    def seen(self) -> tuple[Any, Tensor]:
        """What it has seen: names, and their values [n] on the device."""

    def recall(self, names: Any, values: Tensor) -> None:
        """Takes for seen what a graph has computed again, with the names that `seen` gave."""

    def forget(self) -> None:
        """Lets go of what it has seen."""


@dataclass
class _Recorded:
    graph: Any
    piece: Piece
    losses: Tensor
    seen: tuple[Any, Tensor]  # by a look

    def replay(self, piece: Piece) -> Tensor:
        """The losses of a piece."""
        for field in fields(piece):
            target = getattr(self.piece, field.name)
            if target is not None:
                target.copy_(getattr(piece, field.name))
        self.graph.replay()
        return self.losses.clone()


class Graphs:
    """The graphs of one network and its optimiser.

    Args:
        model: the network; its gradients are buffers that stay.
        device: a GPU, or no graph is ever recorded.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._on = self._looks_on = device.type == "cuda"
        self._refused = False
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}
        self._looks: dict[Any, _Recorded] = {}
        self._pool: Any = None
        self._bytes = 0  # that the graphs hold

    def run(self, piece: Piece, run: Run, look: Look | None = None) -> Tensor:
        """Runs `run` on a piece, from a graph where that is possible. The first piece of a shape
        runs as it is written, so that every kernel is compiled and every choice made; the graphs
        make room for it, for the memory plan counts on all that they hold. `look` sees it run.

        Returns:
            The loss of each sample, [B].
        """
        if not self._on or not self.usable():
            return self._run_as_written(piece, run, look)
        key = self._key(piece)
        if key not in self._seen:
            self._seen.add(key)
            if look is not None:
                self._seen.add((look.key, *key))
            if self._held():
                self.clear()
            return self._run_as_written(piece, run, look)
        if look is not None:
            return self._run_seen(piece, run, look, (look.key, *key))
        if key not in self._recorded:
            # A larger piece finds no room in the blocks of a smaller one's graph.
            smaller = any(_size(r.piece) < _size(piece) for r in self._held())
            if smaller or len(self._recorded) >= _MOST:
                self.clear()
            self._record(key, piece, run)
        return self._recorded[key].replay(piece) if key in self._recorded else run(piece)

    def _run_seen(self, piece: Piece, run: Run, look: Look, key: Any) -> Tensor:
        """`run` with a look into it: from the second such look on from a graph, if it has room."""
        if self._looks_on and key not in self._looks and len(self._looks) < _MOST_LOOKS:
            if key in self._seen and self._has_room():
                self._record_look(key, piece, run, look)
            self._seen.add(key)
        if key not in self._looks:
            return self._run_as_written(piece, run, look)
        recorded = self._looks[key]
        losses = recorded.replay(piece)
        names, values = recorded.seen
        look.recall(names, values.clone())  # before another graph of the pool is replayed
        return losses

    def _run_as_written(self, piece: Piece, run: Run, look: Look | None) -> Tensor:
        self._make_room()
        with nullcontext() if look is None else look.passes():
            return run(piece)

    def _held(self) -> list[_Recorded]:
        return [*self._recorded.values(), *self._looks.values()]

    @property
    def recorded(self) -> int:
        """How many there are without a look."""
        return len(self._recorded)

    @property
    def looks(self) -> int:
        """How many there are with one."""
        return len(self._looks)

    def usable(self) -> bool:
        """Whether nobody has hooked onto a part of the network or a gradient, given a part another
        `forward`, or listens to operations one by one: a replay passes all of them by."""
        return not (
            _has_any_global_hook()
            or _get_current_dispatch_mode() is not None
            or torch.is_anomaly_enabled()
            or any(map(_is_watched, self._model.modules()))
            or any(map(has_gradient_hooks, self._model.parameters()))
        )

    def _key(self, piece: Piece) -> tuple[Any, ...]:
        """What pieces must have in common to run from one graph."""
        shapes = (_shape(getattr(piece, field.name)) for field in fields(piece))
        return self._frozen(), *shapes

    def _frozen(self) -> tuple[int, ...]:
        """The numbers of the parameters that do not learn."""
        return tuple(i for i, p in enumerate(self._model.parameters()) if not p.requires_grad)

    def clear(self) -> None:
        """Lets all graphs and their memory go: parameters or buffers are about to move."""
        self._recorded.clear()
        self._looks.clear()
        self._pool, self._bytes = None, 0
        if self._on:
            gc.collect()
            torch.cuda.empty_cache()

    def _make_room(self) -> None:
        """What runs without a graph needs memory that a graph may hold."""
        if self._bytes and self._bytes > torch.cuda.mem_get_info(self._device)[0]:
            self.clear()

    def _has_room(self) -> bool:
        """Whether half of the memory that this process could have is free: a look keeps about as
        much as a step does. Where it is not, that is said once."""
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self._device)[0]
        used = torch.cuda.memory_reserved(self._device)
        if free <= used and not self._refused:
            self._refused = True
            words = (
                "looks run without a CUDA graph: less memory is free, %.1f GiB, than in use, %.1f"
            )
            _logger.warning(words, free / 2**30, used / 2**30)
        return bool(free > used)

    def _record(self, key: Any, piece: Piece, run: Run) -> None:
        for _ in range(2):
            looks, error = len(self._looks), None
            try:
                self._recorded[key] = self._captured(piece, run)
                return
            except torch.OutOfMemoryError:
                if not looks:
                    raise
            except RuntimeError as reason:
                error = str(reason)
            self.clear()  # the looks may have had the memory; no traceback holds it any more
            if error is not None:
                self._on = False
                _logger.warning("the step runs without a CUDA graph, and slower: %s", error)
                return

    def _record_look(self, key: Any, piece: Piece, run: Run, look: Look) -> None:
        error = None
        try:
            self._looks[key] = self._captured(piece, run, look)
        except RuntimeError as reason:  # memory ran out, too: without a graph a look may fit
            error = str(reason)
        look.forget()  # a recording computes nothing
        if error is not None:
            self.clear()
            self._looks_on = False
            _logger.warning("looks run without a CUDA graph, and slower: %s", error)

    def _captured(self, piece: Piece, run: Run, look: Look | None = None) -> _Recorded:
        """Raises RuntimeError where it cannot be recorded."""
        parts: dict[str, Any] = {f.name: _own(getattr(piece, f.name)) for f in fields(piece)}
        own = Piece(**parts)
        gc.collect()
        torch.cuda.empty_cache()
        before = self._taken()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if look is not None:
            look.forget()  # what it saw before is no part of these passes
        with capture(graph, self._pool):
            with nullcontext() if look is None else look.passes():
                losses = run(own)
            seen = ((), losses) if look is None else look.seen()
        # Nodes of a graph are no memory of PyTorch's, and on a GPU of several programs what the
        # device has less is not all of this one.
        self._bytes += max(now - then for now, then in zip(self._taken(), before, strict=True))
        return _Recorded(graph, own, losses, seen)

    def _taken(self) -> tuple[int, int]:
        """Bytes: PyTorch's, and all that is not free."""
        free, total = torch.cuda.mem_get_info(self._device)
        return torch.cuda.memory_reserved(self._device), total - free


def _shape(value: Tensor | None) -> Any:
    return None if value is None else (tuple(value.shape), value.dtype)


def _size(piece: Piece) -> int:
    return piece.data.numel() + piece.text.numel()


def _own(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()
