"""The detector: reads a run's lines as they come and says what is going wrong, why and where.

It looks at nothing that comes later, needs no field but `step`, and compares numbers with what was
usual in the same run; what it knows in absolute terms has no unit (similarities, ratios of
gradients). Of a mean-mode collapse (paper §1) it sees, in the order in which they appear: the
tokens of the deep layers becoming alike while G_mean outgrows G_ctr (Eq. 5), the spike of the
writer gradients, and the Q/K gradients dying away (Lemma 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mvsplit.diagnostics import findings
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.logs import Record
from mvsplit.diagnostics.order import Order
from mvsplit.diagnostics.signals import LayerSignals, StepSignals


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where the detector draws its lines. Counts are of lines, ratios are to the usual value.

    Attributes:
        settle: lines after a start, a resume or a rollback in which large changes are normal.
        hold: lines for which a verdict, once given, is not repeated.
        alike, mode_ratio: similarity of the deep tokens, and G_mean / G_ctr, of a collapse.
        alike_at_start, mode_ratio_at_start: the same while the run settles.
        worse: by how much either must have changed for the worse since the run was calm.
        near_alike, near_mode_ratio: the same of a network that is close to it.
        starved: fall of the Q/K gradients against the writers'.
        starved_at_start: share of the writers' at which they count as dead from the start.
        spike_loss, spike_sigmas, spike_grad: a spike, in ratios and standard deviations.
        lr_jump: rise of the learning rate from one line to the next.
        lr_memory: lines for which a later rise of the loss is put down to it.
        elevated, elevated_lines: a loss above the run's best that does not come back.
        back_to_start: share of the first loss to which a collapsed network returns.
        bare_spike, bare_lines: in a log without more: the spike of the gradient norm that, if the
            loss is then back at its start for so many lines, means mean-mode.
        stalled_lines, stalled: lines after which a loss that is still this share of its first
            values has not moved.
        logit, logit_rise: attention logits that saturate a softmax, and their rise.
    """

    settle: int = 20
    hold: int = 40
    alike: float = 0.9
    mode_ratio: float = 10.0
    alike_at_start: float = 0.99
    mode_ratio_at_start: float = 100.0
    worse: float = 2.0
    near_alike: float = 0.5
    near_mode_ratio: float = 5.0
    starved: float = 30.0
    starved_at_start: float = 1e-3
    spike_loss: float = 1.8
    spike_sigmas: float = 8.0
    spike_grad: float = 4.0
    lr_jump: float = 2.5
    lr_memory: int = 20
    elevated: float = 1.3
    elevated_lines: int = 40
    back_to_start: float = 0.75
    bare_spike: float = 8.0
    bare_lines: int = 12
    stalled_lines: int = 150
    stalled: float = 0.97
    logit: float = 50.0
    logit_rise: float = 3.0


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
        stirred: whether the latest line of metrics left the usual, so that a look into the layers
            is worth its cost.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.stirred = False
        self._steps = findings.StepHistory(self.thresholds)
        self._layers = findings.LayerHistory(self.thresholds)
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
