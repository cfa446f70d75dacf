"""What may watch a run while it is taken."""

from __future__ import annotations

from typing import Any

from mvsplit.training.config import Experiment
from mvsplit.training.state import TrainState
from mvsplit.training.step import Gradients


class Observer:
    """Watches a run; every method does nothing unless overridden. It may not change the state."""

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        """The run is about to take step `state.step + 1`."""

    def wants_look(self, step: int) -> bool:
        """Whether every layer is to be looked into during `step`, beside the looks that are due; is
        asked before it, once a step. One such observer is enough."""
        return False

    def on_gradients(self, state: TrainState, gradients: Gradients) -> None:
        """The gradients of step `state.step + 1` are known, finite or not; its update is not made
        yet."""

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """A step was taken; `metrics` is its line of metrics.jsonl."""

    def on_probe(self, state: TrainState, layers: dict[str, Any]) -> None:
        """Every layer was looked into during step `state.step + 1`, after `on_gradients` and before
        the update is made; `layers` is the line of layers.jsonl."""

    def on_event(self, event: dict[str, Any]) -> None:
        """Something happened; `event` is the line of events.jsonl, with a readable `message`."""
