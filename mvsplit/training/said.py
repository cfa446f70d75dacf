"""What the watch said at a step that is explained, beside what the trials on that step show.

The watch judges a step by the numbers of its loss, gradients and layers, against the steps before;
the trials run it again. So the two may differ, and a reader who sees both has to know why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mvsplit.diagnostics.attribution import (
    HISTORY,
    SPIKE,
    Conclusion,
    ModeSplit,
    calm_norm,
    is_spike,
    most_unusual,
)
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.findings import USUAL_LINES
from mvsplit.diagnostics.signals import LayerSignals
from mvsplit.diagnostics.thresholds import Thresholds
from mvsplit.training.files import read_lines
from mvsplit.training.flight import Flight

_TRIED = ("data-outlier", "mean-mode", "precision")  # causes that a trial can show


def said_at(flight: Flight) -> list[Event]:
    """The verdicts on the step in the events.jsonl of its run, the last of each level and kind: a
    step comes again after a rollback. None where the flight was taken away from its run."""
    path = flight.path
    run = path.parent.parent if (path / "flight.json").exists() else path
    told = (Event.of_line(line) for line in read_lines(run / "events.jsonl"))
    at_step = [event for event in told if event is not None and event.step == flight.step]
    return [*{(event.level, event.verdict): event for event in at_step}.values()]


def sentences(
    said: Sequence[Event],
    conclusion: Conclusion,
    mode_split: dict[str, list[float | None]],
    largest: ModeSplit | None,
) -> tuple[str, ...]:
    """What the watch said, why, and where the trials see otherwise; nothing where it said nothing.

    Args:
        mode_split: of `Trace`.
        largest: where the mean-coherent gradient is largest.
    """
    return tuple(_sentences(said, conclusion, mode_split, largest)) if said else ()


def _sentences(
    said: Sequence[Event],
    conclusion: Conclusion,
    mode_split: dict[str, list[float | None]],
    largest: ModeSplit | None,
) -> Iterator[str]:
    for event in said:
        place = "" if event.layer is None else f", layer {event.layer}"
        kind = f"{event.level.upper()} {event.verdict}{place}"
        yield f"The watch said at this step: {kind}: {event.message}"
    if any(event.verdict == "mean-mode" for event in said):
        yield from _layers(mode_split, largest)
    found = conclusion.verdict
    for verdict in dict.fromkeys(event.verdict for event in said):
        if found in _TRIED and verdict in _TRIED and verdict != found:
            yield (
                f"The trials see otherwise: {found}, not {verdict}. The watch had only the numbers "
                f"of the step; here it was run again."
            )
        elif found == "unexplained" and verdict in _TRIED:
            yield f"The trials do not bear out {verdict}: none of them removes the spike."
    if any({"grad_rise", "loss_rise"} & event.evidence.keys() for event in said):
        yield (
            f"Its multiples are of the medians of up to {USUAL_LINES} steps before, and of the "
            f"writers' gradients where these rose more than the norm; the table's, of the median "
            f"norm of up to {HISTORY} recorded steps before (calm)."
        )


def _layers(mode_split: dict[str, Any], largest: ModeSplit | None) -> Iterator[str]:
    """What the step that was run again shows of a mean-mode verdict, as the watch reduces it."""
    signals = LayerSignals.of({"step": 0, **mode_split})
    if signals is None or signals.similarity is None or signals.mode_ratio is None:
        return
    alike = signals.similarity > Thresholds().alike and signals.front is not None
    where = f", alike from layer {signals.front} down" if alike else ""
    text = (
        f"Run again, the tokens of the deepest quarter of the layers have a cosine similarity of "
        f"{signals.similarity:.3f}{where}, and the mean part of the writer gradients there is "
        f"{signals.mode_ratio:.3g} times the centered (medians)"
    )
    if largest is not None:
        text += (
            f"; the mean part is largest in {largest.writer} of layer {largest.layer}, "
            f"G_mean {largest.g_mean:.3g} against G_ctr {largest.g_ctr:.3g}"
        )
    yield f"{text}."


def spike_before(flight: Flight) -> int | None:
    """Of the recorded steps before the flight's, the one whose gradient norm is the largest
    multiple of the usual, where that is a spike."""
    earlier = [record for record in flight.records if record["step"] < flight.step]
    norms = [record["grad_norm"] for record in earlier]
    if not norms:
        return None
    place = most_unusual(norms)
    calm = calm_norm(norms[max(0, place - HISTORY) : place])
    return earlier[place]["step"] if is_spike(norms[place], calm) else None


def no_spike(conclusion: Conclusion, said: Sequence[Event]) -> str | None:
    """What to say in the place of "nothing to explain" where the watch raised an alarm."""
    alarm = next((event for event in said if event.level == "alarm"), None)
    if conclusion.verdict != "no-spike" or alarm is None:
        return None
    return (
        f"The gradient norm is no spike (less than {SPIKE:g} times that of the steps before), so "
        f"there is none to remove: the {alarm.verdict} alarm was not given for it."
    )
