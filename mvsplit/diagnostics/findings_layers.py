"""The detector's rules on looks into the layers: what they show of the tokens and the mean mode."""

from __future__ import annotations

from collections.abc import Iterator

from mvsplit.diagnostics.baseline import Baseline
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.signals import LayerSignals
from mvsplit.diagnostics.thresholds import Thresholds

FRESH = 60  # lines for which a look speaks for the network
MANY = 1e9  # stands for a ratio to nothing
_LOOKS = 8  # looks into the layers that make up what is usual there


class LayerHistory:
    """What the looks into the layers have shown."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.t = thresholds
        self.restart()

    def restart(self) -> None:
        self.latest: LayerSignals | None = None
        self._line = 0  # of metrics, at the latest look
        self._looks = 0
        self._alike_before = False  # so the look before the latest
        self._distance, self._ratio = Baseline(_LOOKS), Baseline(_LOOKS)

    def settling(self, lines: int) -> bool:
        """Whether a log without metrics is still at its start."""
        return lines == 0 and self._looks < 4

    def look(self, signals: LayerSignals, settling: bool, line: int) -> Iterator[Event]:
        """What a line of layers says by itself."""
        self._alike_before = self._alike
        self.latest, self._line = signals, line
        self._looks += 1
        if signals.broken is not None:
            layer, name = signals.broken
            yield Event(
                step=signals.step,
                level="alarm",
                verdict="non-finite",
                layer=layer,
                message=f"{name} of layer {layer} is not finite.",
            )
        if self.collapsed(settling):
            yield self._alarm(signals)
        elif self._is_near(signals) and self._worsened(signals):
            yield self._warning(signals)
        self._remember(signals)

    def collapsed(self, settling: bool) -> bool:
        """Whether the latest look shows the tokens alike and the mean mode in command."""
        s, t = self.latest, self.t
        if s is None or s.similarity is None:
            return False
        ratio = MANY if s.mode_ratio is None else s.mode_ratio
        if s.similarity > t.alike_at_start and ratio > t.mode_ratio_at_start:
            return s.mode_ratio is not None or self._worsened(s)
        sure = ratio > t.mode_ratio_at_once or self._alike_before
        return self._alike and sure and not settling and self._worsened(s)

    @property
    def _alike(self) -> bool:
        """Whether the latest look alone speaks of a collapse."""
        s = self.latest
        if s is None or s.similarity is None or s.similarity <= self.t.alike:
            return False
        return s.mode_ratio is None or s.mode_ratio > self.t.mode_ratio

    def near(self, line: int) -> bool:
        """Whether a recent look showed a network close to a collapse, and closer than usual."""
        s = self.latest
        recent = s is not None and line - self._line <= FRESH
        return recent and s is not None and self._is_near(s) and self._worsened(s)

    def refutes(self, line: int) -> bool:
        """Whether a recent look shows that the mean mode is not in command."""
        s = self.latest
        if s is None or line - self._line > FRESH:
            return False
        mild = s.mode_ratio is not None and s.mode_ratio < self.t.near_mode_ratio / 2
        return mild or (s.similarity is not None and s.similarity < self.t.near_alike)

    def evidence(self) -> dict[str, float]:
        """The numbers of the latest look."""
        s = self.latest
        named = {} if s is None else {"tcs_deep": s.similarity, "mode_ratio": s.mode_ratio}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def front(self) -> int | None:
        return None if self.latest is None else self.latest.front

    def _is_near(self, s: LayerSignals) -> bool:
        if s.similarity is None or s.similarity <= self.t.near_alike:
            return False
        return s.mode_ratio is None or s.mode_ratio > self.t.near_mode_ratio

    @property
    def _has_past(self) -> bool:
        return len(self._distance) >= 2

    def _worsened(self, s: LayerSignals) -> bool:
        """Whether it got worse since it was calm: a network may have similar tokens by nature."""
        if not self._has_past or s.similarity is None:
            return False
        closer = self._distance.median / max(1 - s.similarity, 1e-9)
        return closer > self.t.worse or self._ratio.times(s.mode_ratio or 0.0) > self.t.worse

    def _remember(self, s: LayerSignals) -> None:
        if self._is_near(s) and self._worsened(s):
            return  # what is not calm is no standard of calm
        if s.similarity is not None:
            self._distance.add(1 - s.similarity)
        if s.mode_ratio is not None:
            self._ratio.add(s.mode_ratio)

    def _alarm(self, s: LayerSignals) -> Event:
        where = "of the deep layers" if s.front is None else f"from layer {s.front} down"
        modes = ""
        if s.mode_ratio is not None:
            modes = f"; the writer gradients' mean part is {s.mode_ratio:.3g} times the centered"
        return Event(
            step=s.step,
            level="alarm",
            verdict="mean-mode",
            layer=s.front,
            message=(
                f"Mean-mode collapse: the tokens {where} have become alike (cosine similarity "
                f"{s.similarity:.3f}){modes}."
            ),
            evidence=self.evidence(),
        )

    def _warning(self, s: LayerSignals) -> Event:
        return Event(
            step=s.step,
            level="warning",
            verdict="mean-mode",
            layer=s.front,
            message=(
                f"The tokens of the deep layers are growing alike (cosine similarity "
                f"{s.similarity:.2f}); a mean-mode collapse may follow."
            ),
            evidence=self.evidence(),
        )
