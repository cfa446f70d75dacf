"""What the watch says: an event with its level, verdict, place, a sentence and its evidence."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Level = Literal["info", "warning", "alarm"]
LEVELS: tuple[Level, ...] = ("info", "warning", "alarm")  # by rising gravity

Verdict = Literal[
    "mean-mode",
    "data-outlier",
    "non-finite",
    "attention-logits",
    "learning-rate",
    "divergence",
    "stalled",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One statement about a run.

    Attributes:
        step: the step whose numbers gave it, before or as its update was made.
        level: `info` to know, `warning` to look at, `alarm` to act on.
        verdict: what it is.
        layer: where it begins, None where the numbers do not tell.
        message: one sentence for a person.
        evidence: the numbers behind it, by name.
    """

    step: int
    level: Level
    verdict: Verdict
    message: str
    layer: int | None = None
    evidence: dict[str, float] = field(default_factory=dict)

    @property
    def gravity(self) -> int:
        """0 for info, 1 for a warning, 2 for an alarm."""
        return LEVELS.index(self.level)

    def as_dict(self) -> dict[str, Any]:
        """What `mvsplit monitor replay --json` prints and events.jsonl holds. Non-finite evidence
        becomes "NaN", "Infinity" or "-Infinity", which JSON has no numbers for."""
        return {
            "step": self.step,
            "level": self.level,
            "verdict": self.verdict,
            "layer": self.layer,
            "message": self.message,
            "evidence": {name: _for_json(value) for name, value in self.evidence.items()},
        }

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Event | None:
        """The verdict that a line of events.jsonl holds, None where it holds none. In those of
        `mvsplit train` the line's own step counts the updates made, and `at_step` is the step."""
        layer, evidence, step = line.get("layer"), line.get("evidence"), line.get("at_step")
        known = line.get("level") in LEVELS and line.get("verdict") in get_args(Verdict)
        if not known or not isinstance(evidence, dict):
            return None
        try:
            numbers = {name: float(value) for name, value in evidence.items()}
        except (TypeError, ValueError):  # of another program
            return None
        return cls(
            step=step if isinstance(step, int) else line["step"],
            level=line["level"],
            verdict=line["verdict"],
            layer=layer if isinstance(layer, int) else None,
            message=str(line.get("message")),
            evidence=numbers,
        )


def gravest(events: Iterable[Event], steps: Container[int]) -> Event | None:
    """The first of the gravest verdicts on one of `steps`; None where there is none."""
    told = (event for event in events if event.step in steps)
    return max(told, key=lambda event: event.gravity, default=None)


def _for_json(value: float) -> float | str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.6g}")
