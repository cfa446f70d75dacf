"""The progress of a run for a reader: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mvsplit.diagnostics.events import LEVELS
from mvsplit.training.config import Experiment
from mvsplit.training.observer import Observer
from mvsplit.training.state import TrainState

# Without a terminal: a line at least every so many seconds, and at the last step.
PLAIN_INTERVAL = 10.0
_QUIET_EVENTS = ("saved", "watching")


class ProgressLine(Observer):
    """Loss, gradient norm, tokens a second and time left; events as lines of their own."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._printed = 0.0
        self._first = (0, 0.0)  # the step and time at which this process began

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        self._steps = experiment.train.steps
        self._first = (state.step, time.monotonic())
        parameters = sum(p.numel() for p in state.model.parameters())
        model = state.model.config  # whose rule may no longer be that of the experiment
        self._say(
            f"{model.depth} layers, width {model.width}, rule {model.rule.name}, "
            f"{parameters:,} parameters on {state.device}"
        )
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=self._steps, completed=state.step)
            self._bar.start()

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        numbers = (
            f"loss {metrics['loss']:.4f}  grad {metrics['grad_norm']:.3g}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=state.step, description=numbers)
        elif self._due(state.step):
            self._say(f"step {state.step}/{self._steps}  {numbers}  {self._left(state.step)} left")

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] in ("finished", "interrupted", "nonfinite"):
            self.close()
        # A failure is an exception too, which whoever catches it reports.
        if event["event"] not in (*_QUIET_EVENTS, "nonfinite"):
            self._say(_words(event))

    def close(self) -> None:
        """Ends the live line; needed only where the run ended by an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _due(self, step: int) -> bool:
        now = time.monotonic()
        if now - self._printed < PLAIN_INTERVAL and step < self._steps:
            return False
        self._printed = now
        return True

    def _left(self, step: int) -> str:
        first, began = self._first
        each = (time.monotonic() - began) / max(step - first, 1)
        minutes, seconds = divmod(round(each * (self._steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _words(event: dict[str, Any]) -> str:
    """The message of an event; that of a verdict with its step and level before it."""
    if "verdict" not in event or event["event"] not in LEVELS:
        return event["message"]
    place = "" if event.get("layer") is None else f", layer {event['layer']}"
    step, level, verdict = event["at_step"], event["event"].upper(), event["verdict"]
    return f"step {step}: {level} {verdict}{place}: {event['message']}"
