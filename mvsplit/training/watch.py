"""The watch over a run of ours: the detector sees each step before its update is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    def remember(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Comes to where it was after the lines of an earlier process, without saying it again."""
        for line in lines:
            self._see(dict(line))

    def on_gradients(self, state: TrainState, gradients: Gradients) -> None:
        self._judge({"step": gradients.step, **gradients.metrics})

    def on_probe(self, state: TrainState, layers: dict[str, Any]) -> None:
        self._judge(layers)

    def _judge(self, record: dict[str, Any]) -> None:
        for event in self._see(record):
            self._say(event)

    def _see(self, record: dict[str, Any]) -> list[Event]:
        look = "layer" in record
        self._looks += look and self._detector.stirred
        events = self._detector.update(record)
        if not look and not self._detector.stirred:
            self._looks = 0
        return events

    def _say(self, event: Event) -> None:
        told = event.as_dict()
        message = told.pop("message")
        told["at_step"] = told.pop("step")  # the line's own step counts the updates made
        self._tell(event.level, message, **told)
