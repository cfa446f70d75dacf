"""The order of the lines of a log: which follow, which come late, and where a run went back."""

from __future__ import annotations

from collections import deque
from typing import Literal

from mvsplit.diagnostics.logs import Record
from mvsplit.diagnostics.signals import has_scalars

Place = Literal["next", "late", "back"]

_REACH = 64  # steps that are remembered one by one


class Order:
    """Places each line among those before it; lines of metrics and of layers are two series."""

    def __init__(self) -> None:
        self._series = {"steps": _Series(), "layers": _Series()}

    def place(self, record: Record) -> Place:
        """`late` for a line whose step was left out before, `back` for the first after a rollback,
        `next` for all others, a second line of the newest step among them."""
        kind = "steps" if has_scalars(record) else "layers"
        place = self._series[kind].place(record["step"])
        if place == "back":  # which the lines of both kinds show: the first of them speaks for both
            other = self._series["steps" if kind == "layers" else "layers"]
            other.forget_from(record["step"])
        return place


class _Series:
    def __init__(self) -> None:
        self._seen: deque[int] = deque(maxlen=_REACH)
        self._newest = -1
        self._late: int | None = None  # the step of the line before, if it came late

    def place(self, step: int) -> Place:
        late, self._late = self._late, None
        if step >= self._newest:
            self._newest = step
            self._seen.append(step)
            return "next"
        first_time = step not in self._seen and bool(self._seen) and step > self._seen[0]
        # Two in a row that rise are no stragglers: a run goes on from an earlier step.
        if first_time and not (late is not None and step > late):
            self._late = step
            return "late"
        self._newest = step
        self._seen.clear()
        self._seen.append(step)
        return "back"

    def forget_from(self, step: int) -> None:
        """What lies at `step` or past it will come again."""
        if self._newest >= step:
            self._seen.clear()
            self._newest = step - 1
