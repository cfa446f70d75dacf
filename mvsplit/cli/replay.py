"""Prints what the detector says of a log, ours or any other.

A file is JSONL with a `step` in each line, as metrics.jsonl and layers.jsonl are; a run folder
stands for both of its own, and for the step that ended it, if a value was not finite there: such a
step has no line in them. Several are read as the logs of one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mvsplit.diagnostics.detector import Detector
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.replay import open_logs, replay
from mvsplit.diagnostics.signals import LAYERED, SCALARS
from mvsplit.errors import UserError
from mvsplit.training.fatal import fatal_step

NOTHING_JUDGED = 2
_COLOURS = {"info": "dim", "warning": "yellow", "alarm": "bold red"}


@dataclass(frozen=True, kw_only=True)
class _Options:
    # Logs of one run, or its folder.
    files: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FILE…", help_behavior_hint=""),
    ]
    json: bool = False  # print {"events": […]} and nothing else


def main(arguments: Sequence[str]) -> int:
    """Prints the events of the logs, as a table or as JSON, and returns 0, or 2 where nothing could
    be judged.

    Raises:
        UserError: no file is named, or one does not exist.
    """
    options = tyro.cli(
        _Options, args=list(arguments), prog="mvsplit monitor replay", description=__doc__
    )
    if not options.files:
        raise UserError("files: name at least one log, for example runs/tiny/metrics.jsonl")
    logs = open_logs(options.files)
    detector = Detector()
    events = list(replay(logs, detector))
    fatal = [step for path in options.files if path.is_dir() and (step := fatal_step(path))]
    events += [event for step in fatal for event in detector.update(step.record)]
    if options.json:
        print(json.dumps({"events": [event.as_dict() for event in events]}, allow_nan=False))
    elif detector.understood:
        _print_table(events, detector)
    if not detector.understood:
        known = ", ".join((*SCALARS, *LAYERED))
        print(
            f"mvsplit: nothing was judged: no line holds a step and any of {known}", file=sys.stderr
        )
    for step in fatal:
        print(f"mvsplit: {step}", file=sys.stderr)
    for log in logs:
        if log.dropped.total:
            print(f"mvsplit: {log.path}: lines left out: {log.dropped}", file=sys.stderr)
    return 0 if detector.understood else NOTHING_JUDGED


def _print_table(events: Sequence[Event], detector: Detector) -> None:
    if not events:
        counts = ((detector.steps, "step"), (detector.looks, "look into the layers"))
        told = [_counted(count, what) for count, what in counts if count]
        print(f"Nothing to report in {' and '.join(told)}.")
        return
    Console(highlight=False).print(events_table(events))


def _counted(count: int, what: str) -> str:
    name, *rest = what.split(" ", 1)
    return " ".join([f"{count:,}", name if count == 1 else f"{name}s", *rest])


def events_table(events: Sequence[Event]) -> Table:
    """What the watch said, a row a verdict."""
    table = Table("step", "level", "verdict", "layer", "what", box=None, pad_edge=False)
    for event in events:
        layer = "" if event.layer is None else str(event.layer)
        level = f"[{_COLOURS[event.level]}]{event.level}[/]"
        table.add_row(f"{event.step:,}", level, event.verdict, layer, escape(event.message))
    return table
