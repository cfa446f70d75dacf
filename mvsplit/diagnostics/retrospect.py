"""What is known of a step that cannot be run again, from the logs that `Monitor` wrote of it.

A monitor in somebody's own training writes numbers and verdicts. It keeps neither the batch nor the
weights, and knows nothing of the random states. So nothing can be tried on the step; what was seen
can be shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mvsplit.diagnostics.attribution import HISTORY, calm_norm, most_unusual
from mvsplit.diagnostics.events import Event, gravest
from mvsplit.diagnostics.logs import Dropped, Record, as_number, read_jsonl
from mvsplit.errors import UserError

_REMARKS = ("unseen", "skipped")  # events of a monitor that are no verdicts

ABSENT = (
    "Not in this folder: the batch, its noise and the weights before the step. Monitor sees a "
    "model and its gradients, not the loader, the optimiser or the random states, and writes "
    "numbers only.",
    "So the step cannot be run again, and what would have removed a spike is not known: samples "
    "left out, fp32, the mean adjoint shut off. Runs of mvsplit train keep what these trials need.",
)


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a step.

    Attributes:
        value: at the step.
        usual: the median of the finite ones on up to `HISTORY` lines before; None at the first.
        last: on the last line of the log.
    """

    value: float
    usual: float | None
    last: float | None

    @property
    def times(self) -> float | None:
        """How many times the usual it is; None where that has no meaning."""
        return self.value / self.usual if self.usual else None


@dataclass(frozen=True, kw_only=True)
class Retrospect:
    """A step of a watched training, as far as its logs tell.

    Attributes:
        source: the folder.
        watching: what the monitor said of itself when it began, what it cannot measure included.
        remarks: what else it said of itself, and updates that it left out.
        runs: how many trainings wrote into the folder, of which the last is told of.
        first, last, lines: of the steps that it has seen, and how many lines there are of them.
        looks: how often every layer was looked into.
        events: its verdicts, in the order in which they were given.
        step: the one that is told of.
        chosen: why this one.
        numbers: of the step, by field of metrics.jsonl.
        look: the line of layers.jsonl that is nearest to the step; None where there is none.
        left_out: what of the logs could not be read, or was replaced by a later watch, by log.
        absent: what a flight of `mvsplit train` has and this has not, and why, in sentences.
    """

    source: str
    watching: str
    remarks: list[str]
    runs: int
    first: int
    last: int
    lines: int
    looks: int
    events: list[Event]
    step: int
    chosen: str
    numbers: dict[str, Number]
    look: Record | None
    left_out: dict[str, str]
    absent: tuple[str, ...] = ABSENT


def is_watched_elsewhere(folder: Path) -> bool:
    """Whether a folder holds the logs of a monitor and no run of `mvsplit train`."""
    return (folder / "events.jsonl").is_file() and not is_run_of_train(folder, damaged=True)


def is_run_of_train(folder: Path, *, damaged: bool = False) -> bool:
    """Whether a folder holds a run of `mvsplit train`, which has its experiment in config.json; a
    config.json of another program is none. `damaged` is the answer for one that cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return damaged
    return isinstance(config, dict) and {"model", "train", "data"} <= config.keys()


def look_back(folder: Path, step: int | None = None) -> Retrospect:
    """What the logs of the monitor in `folder` say of a step.

    Where a later watch began in the same folder, at a step that the one before it had passed, what
    the earlier one wrote from there on is left out.

    Args:
        step: which one; None for the first of the gravest verdicts, without any for the step whose
            gradient norm is the largest multiple of the median before it, or for the last.

    Raises:
        UserError: no monitor wrote these logs, they hold no step, or not this one.
    """
    said = _Said.of(folder)
    lines, left_out, runs = _standing(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder}: metrics.jsonl holds no step; call monitor.step() once a step")
    step, chosen = _choose(said.events, lines) if step is None else (step, "as asked")
    at = next((place for place, line in enumerate(lines) if line["step"] == step), None)
    first, last = lines[0]["step"], lines[-1]["step"]
    if at is None:
        more = f"; {other_runs(runs, first, last, folder)}" if runs > 1 else ""
        raise UserError(f"step={step}: {folder} has the steps {first} to {last}{more}")
    looks, looks_left_out, _ = _standing(folder / "layers.jsonl")
    reasons = {**said.left_out, "metrics.jsonl": left_out, "layers.jsonl": looks_left_out}
    return Retrospect(
        source=str(folder),
        watching=said.watching,
        remarks=said.remarks,
        runs=runs,
        first=first,
        last=last,
        lines=len(lines),
        looks=len(looks),
        events=said.events,
        step=step,
        chosen=chosen,
        numbers=_numbers(lines, at),
        look=min(looks, key=lambda look: abs(look["step"] - step), default=None),
        left_out={log: reason for log, reason in reasons.items() if reason},
    )


def other_runs(runs: int, first: int, last: int, source: Path | str) -> str:
    """That the folder holds other runs than the one that is shown, and how to see them."""
    return (
        f"{runs} runs in this folder; showing the last (steps {first:,} to {last:,}); "
        f"mvsplit monitor replay {source} gives the verdicts on all, one after the other"
    )


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What events.jsonl holds of a monitor."""

    watching: str
    remarks: list[str]
    events: list[Event]
    left_out: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> _Said:
        log = read_jsonl(folder / "events.jsonl", latest=False)
        watching: str | None = None
        kept: list[Record] = []
        replaced = 0
        for line in log:
            if line.get("event") == "watching":
                watching, start = str(line.get("message")), line["step"]
                replaced += sum(earlier["step"] > start for earlier in kept)
                kept = [earlier for earlier in kept if earlier["step"] <= start]
            else:
                kept.append(line)
        if watching is None:
            raise UserError(
                f"{folder}: its events.jsonl does not say that a monitor watched; mvsplit monitor "
                f"replay {folder} judges its logs now"
            )
        return cls(
            watching=watching,
            remarks=[str(e.get("message")) for e in kept if e.get("event") in _REMARKS],
            events=[event for line in kept if (event := Event.of_line(line)) is not None],
            left_out={"events.jsonl": _left_out(log.dropped, replaced)},
        )


def _standing(path: Path) -> tuple[list[Record], str, int]:
    """The lines of a log whose steps no later watch took again, what was left out, and how many
    runs there are: one that begins no later than all that came before is another."""
    if not path.is_file():
        return [], "", 0
    log = read_jsonl(path, latest=False)
    lines: list[Record] = []
    replaced = runs = 0
    for line in log:
        runs += not lines or line["step"] <= lines[0]["step"]
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
            replaced += 1
        lines.append(line)
    return lines, _left_out(log.dropped, replaced), runs


def _left_out(dropped: Dropped, replaced: int) -> str:
    """One sentence, "" where nothing was."""
    reasons = [str(dropped)] if dropped.total else []
    reasons += [f"{replaced:,} of an earlier watch in this folder"] if replaced else []
    return ", ".join(reasons)


def _choose(events: Sequence[Event], lines: Sequence[Record]) -> tuple[int, str]:
    """A step of which there is a line, and why it is told of."""
    steps = [line["step"] for line in lines]
    there = set(steps)
    if (told := gravest(events, there)) is not None:
        whole = all(event.step in there for event in events)
        lost = "" if whole else " of which the numbers are there"
        return told.step, f"its first {told.level}{lost}"
    why = "no line has the step of a verdict" if events else "there is no verdict"
    norms = [as_number(line.get("grad_norm")) for line in lines]
    if all(norm is None for norm in norms):
        return steps[-1], f"the last, for {why} and no gradient norm"
    place = most_unusual([norm or 0.0 for norm in norms])
    return steps[place], f"chosen by its gradient norm, for {why}"


def _numbers(lines: Sequence[Record], at: int) -> dict[str, Number]:
    """The numbers of the line at a place, beside those of the lines before it and of the last."""
    found = {}
    for name, given in lines[at].items():
        value = as_number(given)
        if name != "step" and value is not None:
            column = [as_number(line.get(name)) for line in lines[max(0, at - HISTORY) : at]]
            usual = calm_norm([number for number in column if number is not None])
            last = as_number(lines[-1].get(name))
            found[name] = Number(value=value, usual=usual, last=last)
    return found
