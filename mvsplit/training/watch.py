"""The watch over a run of ours: the detector sees each step before its update is made."""

from __future__ import annotations

from typing import Any, Protocol

from mvsplit.diagnostics.detector import Detector
from mvsplit.diagnostics.events import Event
from mvsplit.training.observer import Observer
from mvsplit.training.state import TrainState
from mvsplit.training.step import Gradients


class Tell(Protocol):
    """Takes what happened, for events.jsonl and all who listen."""

    def __call__(self, name: str, message: str, **fields: Any) -> None: ...


class Watch(Observer):
    """Tells what the detector finds: `name` is the level, the fields are those of the event.

    Attributes:
        stirred: whether the next step is worth a look into every layer, beside those that are due.
            At most `burst` in a row are, so that a run which stays restless is not slowed down.
    """

    def __init__(self, tell: Tell, *, burst: int = 10) -> None:
        self._tell, self._burst = tell, burst
        self._detector = Detector()
        self._looks = 0

    @property
    def stirred(self) -> bool:
        return self._detector.stirred and self._looks < self._burst

    def on_gradients(self, state: TrainState, gradients: Gradients) -> None:
        self._judge({"step": gradients.step, **gradients.metrics})
        self._looks = self._looks if self._detector.stirred else 0

    def on_probe(self, state: TrainState, layers: dict[str, Any]) -> None:
        self._looks += self._detector.stirred
        self._judge(layers)

    def _judge(self, record: dict[str, Any]) -> None:
        for event in self._detector.update(record):
            self._say(event)

    def _say(self, event: Event) -> None:
        told = event.as_dict()
        message = told.pop("message")
        told["at_step"] = told.pop("step")  # the line's own step counts the updates made
        self._tell(event.level, message, **told)
