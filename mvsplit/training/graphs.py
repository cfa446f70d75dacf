"""Forward and backward of a piece as one CUDA graph.

A step of 400 layers launches some 18,000 kernels, and launching takes longer than running them. A
graph is recorded once for each shape of a piece and replayed from then on: Python, autograd and the
launches are gone, the arithmetic is the same. Gradients are added to buffers that stay where they
are; a piece is copied into the graph's own input.

A graph runs the network as it was when it was recorded. So it is used only while nobody watches a
part of the network (`Graphs.usable`) and while the same parameters learn, and it is dropped when
parameters move (`Graphs.clear`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

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
NODE_BYTES = 600_000  # of a graph for every layer: some fifty nodes of about 10 KB

Run = Callable[[Piece], Tensor]  # adds gradients, gives the loss of each sample


@dataclass
class _Recorded:
    graph: Any
    piece: Piece
    losses: Tensor


class Graphs:
    """The graphs of one network and its optimiser.

    Args:
        model: the network; its gradients are buffers that stay.
        device: a GPU, or no graph is ever recorded.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._on = device.type == "cuda"
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None
        self._bytes = 0  # that the graphs hold

    def run(self, piece: Piece, run: Run) -> Tensor:
        """Runs `run` on a piece, from a graph where that is possible. The first piece of a shape
        runs as it is written, so that every kernel is compiled and every choice made; the graphs
        make room for it, for the memory plan counts on all that they hold.

        Returns:
            The loss of each sample, [B].
        """
        if not self._on or not self.usable():
            self._make_room()
            return run(piece)
        shapes = (_shape(getattr(piece, field.name)) for field in fields(piece))
        key = (self._frozen(), *shapes)
        if key not in self._recorded:
            if key not in self._seen:
                self._seen.add(key)
                if self._recorded:
                    self.clear()
                return run(piece)
            # A larger piece finds no room in the blocks of a smaller one's graph.
            smaller = any(_size(r.piece) < _size(piece) for r in self._recorded.values())
            if smaller or len(self._recorded) >= _MOST:
                self.clear()
            self._record(key, piece, run)
        if key not in self._recorded:
            return run(piece)
        recorded = self._recorded[key]
        for field in fields(piece):
            target = getattr(recorded.piece, field.name)
            if target is not None:
                target.copy_(getattr(piece, field.name))
        recorded.graph.replay()
        return recorded.losses.clone()

    @property
    def recorded(self) -> int:
        """How many there are."""
        return len(self._recorded)

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

    def _frozen(self) -> tuple[int, ...]:
        """The numbers of the parameters that do not learn."""
        return tuple(i for i, p in enumerate(self._model.parameters()) if not p.requires_grad)

    def clear(self) -> None:
        """Lets all graphs and their memory go: parameters or buffers are about to move."""
        self._recorded.clear()
        self._pool, self._bytes = None, 0
        if self._on:
            gc.collect()
            torch.cuda.empty_cache()

    def _make_room(self) -> None:
        """What runs without a graph needs memory that a graph may hold."""
        if self._bytes and self._bytes > torch.cuda.mem_get_info(self._device)[0]:
            self.clear()

    def _record(self, key: Any, piece: Piece, run: Run) -> None:
        parts: dict[str, Any] = {f.name: _own(getattr(piece, f.name)) for f in fields(piece)}
        own = Piece(**parts)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with capture(graph, self._pool):
                losses = run(own)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._on = False
            self.clear()
            _logger.warning("the step runs without a CUDA graph, and slower: %s", error)
            return
        self._bytes += torch.cuda.memory_reserved(self._device) - before
        self._recorded[key] = _Recorded(graph, own, losses)


def _shape(value: Tensor | None) -> Any:
    return None if value is None else (tuple(value.shape), value.dtype)


def _size(piece: Piece) -> int:
    return piece.data.numel() + piece.text.numel()


def _own(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()
