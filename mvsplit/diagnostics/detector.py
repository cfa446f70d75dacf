"""The detector: reads a run's lines as they come and says what is going wrong, why and where.

It looks at nothing that comes later, needs no field but `step`, and compares numbers with what was
usual in the same run; what it knows in absolute terms has no unit (similarities, ratios of
gradients). Of a mean-mode collapse (paper §1) it sees, in the order in which they appear: the
tokens of the deep layers becoming alike while G_mean outgrows G_ctr (Eq. 5), the spike of the
writer gradients, and the Q/K gradients dying away (Lemma 1).
"""

from __future__ import annotations

from collections.abc import Iterator

from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.findings import StepHistory
from mvsplit.diagnostics.findings_layers import LayerHistory
from mvsplit.diagnostics.logs import Record
from mvsplit.diagnostics.order import Order
from mvsplit.diagnostics.signals import LayerSignals, StepSignals
from mvsplit.diagnostics.thresholds import Thresholds

# What needs no saying once there was an alarm of these: it is what comes of it.
_OUTCOMES: dict[str, frozenset[str]] = {
    "stalled": frozenset({"mean-mode", "divergence", "non-finite"}),
    "divergence": frozenset({"mean-mode"}),
}


class Detector:
    """Takes the lines of metrics.jsonl and layers.jsonl in the order in which they were written.

        detector = Detector()
        for record in lines:
            for event in detector.update(record): ...

    Attributes:
        understood: how many records held a field that it reads.
        steps, looks: how many of them had numbers of a step, and of its layers.
        stirred: whether the latest line of metrics left the usual, so that a look into the layers
            is worth its cost.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.stirred = False
        self.understood = self.steps = self.looks = 0
        self._steps = StepHistory(self.thresholds)
        self._layers = LayerHistory(self.thresholds)
        self._order = Order()
        self._said: dict[str, tuple[int, int]] = {}  # verdict → (gravity, line at which last held)
        self._alarmed: set[str] = set()
        self._lines = 0

    def update(self, record: Record) -> list[Event]:
        """What the line says that was not said before. A line that comes late is passed over; one
        that goes back in time is a rollback, after which the run settles anew."""
        scalars, layers = StepSignals.of(record), LayerSignals.of(record)
        if scalars is None and layers is None:
            return []
        self.understood += 1
        self.steps += scalars is not None
        self.looks += layers is not None
        place = self._order.place(record)
        if place == "late":
            return []
        if place == "back":
            self._settle_anew()
        return [event for event in self._look(scalars, layers) if self._is_news(event)]

    def _look(self, scalars: StepSignals | None, layers: LayerSignals | None) -> Iterator[Event]:
        if layers is not None:
            settling = self._steps.settling or self._layers.settling(self._steps.lines)
            yield from self._layers.look(layers, settling, self._steps.lines)
        if scalars is not None:
            self._lines += 1
            yield from self._steps.look(scalars, self._layers)
            self.stirred = self._steps.stirred or self._layers.near(self._steps.lines)

    def _settle_anew(self) -> None:
        self._steps.restart()
        self._layers.restart()
        self._said.clear()
        self._alarmed.clear()

    def _is_news(self, event: Event) -> bool:
        """Whether the verdict is new, graver than when it was last given, or back after a while."""
        gravity, line = self._said.get(event.verdict, (-1, 0))
        if not self._alarmed.isdisjoint(_OUTCOMES.get(event.verdict, ())):
            return False
        if event.level == "alarm":
            self._alarmed.add(event.verdict)
        over = self._lines - line > self.thresholds.hold
        graver = event.gravity > gravity
        self._said[event.verdict] = (
            event.gravity if over else max(gravity, event.gravity),
            self._lines,
        )
        return over or graver
