"""The step that ended a run, because its loss or gradient was not finite. It made no update and has
no line in metrics.jsonl: events.jsonl says which it was, its flight, if it has one, the rest."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.logs import Record, as_number, read_jsonl
from mvsplit.training.checkpoint import checkpoint_name

_BEGINS = ("started", "resumed")  # events after which an earlier end counts no longer


@dataclass(frozen=True, kw_only=True)
class FatalStep:
    """The step that ended a run.

    Attributes:
        step: its number.
        record: its numbers, as a line of metrics.jsonl would hold them; of a run without a flight
            of this step, those that were not finite.
        message: what the run said of it.
        flight: the folder of its flight; None where none was written.
    """

    step: int
    record: Record
    message: str
    flight: Path | None

    def __str__(self) -> str:
        numbers = {name: as_number(value) for name, value in self.record.items()}
        broken = [n for n, v in numbers.items() if v is not None and not math.isfinite(v)]
        what = f" (not finite: {', '.join(broken)})" if broken else ""
        where = (
            f"its flight is {self.flight}, and mvsplit explain {self.flight} runs it again"
            if self.flight is not None
            else "no flight of it was written"
        )
        return (
            f"step {self.step:,} ended the run{what} and has no line in metrics.jsonl; {where}. "
            f"The run said: {self.message}"
        )


def fatal_step(run: Path) -> FatalStep | None:
    """The step that ended the run in folder `run`; None where none did, where it was resumed since,
    or where the folder holds no run of `mvsplit train`."""
    if not (run / "events.jsonl").is_file():
        return None
    end: Record | None = None
    alarms: list[tuple[Any, dict[str, float]]] = []  # step and what was not finite
    for line in read_jsonl(run / "events.jsonl", latest=False):
        if line.get("event") == "nonfinite":
            end = line
        elif line.get("event") in _BEGINS:
            end, alarms = None, []
        elif line.get("verdict") == "non-finite" and (alarm := Event.of_line(line)) is not None:
            alarms.append((line.get("at_step"), alarm.evidence))
    if end is None:
        return None
    step = end["step"] + 1  # the line's own step counts the updates made
    flight = run / "flights" / checkpoint_name(step)
    record = _recorded(flight, step)
    found = flight if record is not None else None
    if record is None:
        record = next((evidence for at, evidence in alarms if at == step), {})
    return FatalStep(
        step=step,
        record={**record, "step": step},
        message=str(end.get("message")),
        flight=found,
    )


def _recorded(flight: Path, step: int) -> dict[str, Any] | None:
    """The record of a step in its flight; None where there is no flight that can be read."""
    try:
        records = json.loads((flight / "flight.json").read_text(encoding="utf-8"))["records"]
        return next((r for r in reversed(records) if r["step"] == step), None)
    except (OSError, ValueError, LookupError, TypeError):
        return None
