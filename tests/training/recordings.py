"""Graphs that record and replay on a CPU, and a look into their passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mvsplit.models import DiT
from mvsplit.training.graphs import Graphs, Look, Run, _Recorded
from mvsplit.training.pieces import Piece

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recording(Graphs):
    """On a CPU: a graph that only counts its replays."""

    def __init__(self, model: DiT) -> None:
        super().__init__(model, torch.device("cpu"))
        self._on = self._looks_on = True
        self.replays, self.room, self.fails, self.places = 0, True, False, 100

    def replay(self) -> None:
        self.replays += 1

    def _has_room(self) -> bool:
        return self.room

    def recorded_texts(self) -> list[int]:
        """Text tokens of each graph's piece, in the order of recording."""
        return [r.piece.text.shape[1] for r in self._recorded.values()]

    def _captured(self, piece: Piece, run: Run, look: Look | None = None) -> _Recorded:
        if self.fails:
            raise RuntimeError("nothing is recorded here")
        if len(self._held()) >= self.places:
            raise torch.OutOfMemoryError("graphs hold it")
        if look is None:
            return _Recorded(self, piece, run(piece), ((), piece.times))
        look.forget()
        with look.passes():
            losses = run(piece)
        return _Recorded(self, piece, losses, look.seen())


def some_piece(text: int = 4) -> Piece:
    return Piece(
        data=torch.ones(2, 1, 8, 8),
        noise=torch.ones(2, 1, 8, 8),
        times=torch.ones(2),
        text=torch.ones(2, text, 16),
        text_valid=None,
    )


def losses_of(piece: Piece) -> torch.Tensor:
    return piece.times


class Eye:
    """A look whose numbers are the sums of the pieces' data, as its hooks see them."""

    key = "eye"

    def __init__(self) -> None:
        self.open = False
        self.found: list[torch.Tensor] = []
        self.recalled: tuple[object, torch.Tensor] | None = None

    @contextmanager
    def passes(self) -> Iterator[None]:
        self.open = True
        yield
        self.open = False

    def read_gradients(self) -> None:
        pass

    def seen(self) -> tuple[object, torch.Tensor]:
        return ("sum",), torch.stack(self.found)

    def recall(self, names: object, values: torch.Tensor) -> None:
        self.recalled = names, values

    def forget(self) -> None:
        self.found.clear()


def looked_at(graphs: Graphs, text: int = 4) -> tuple[Eye, bool]:
    """A look at a piece, and whether the piece ran inside it."""
    eye, inside = Eye(), []

    def run(piece: Piece) -> torch.Tensor:
        inside.append(eye.open)
        eye.found.append(piece.data.sum())
        return piece.times

    losses = graphs.run(some_piece(text), run, eye)
    assert losses.shape == (2,)
    assert not eye.open
    return eye, inside == [True]
