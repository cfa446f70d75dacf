"""What `mvsplit explain` shows of a training that `mvsplit.diagnostics.Monitor` watched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table

from mvsplit.cli.replay import events_table
from mvsplit.diagnostics.logs import Record
from mvsplit.diagnostics.retrospect import Retrospect, other_runs

_LAYERS = 5  # rows of the table of writers
_REMARKS = 5  # lines of what the monitor said beside its verdicts

WriterRow = tuple[str, int, float | None, float | None, float | None]


def show(found: Retrospect, console: Console) -> None:
    """What the logs tell of the step, and what they do not hold, for a reader."""
    for line in (*_head(found), ""):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if found.events:
        console.print(events_table(found.events))
        console.print()
    console.print(_numbers(found))
    for part in _layers(found):
        console.print(part, highlight=False)
    rest = (f"left out of {log}: {reason}" for log, reason in found.left_out.items())
    advice = ("docs/watch.md says what to do at each verdict.",) if found.events else ()
    for line in ("", *rest, *advice, *found.absent):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _head(found: Retrospect) -> Iterator[str]:
    yield (
        f"step {found.step:,} of {found.source}, {found.chosen}; {found.lines:,} steps from "
        f"{found.first:,} to {found.last:,}, {found.looks:,} looks into every layer"
    )
    if found.runs > 1:
        yield other_runs(found.runs, found.first, found.last, found.source)
    yield found.watching
    yield from found.remarks[:_REMARKS]
    if len(found.remarks) > _REMARKS:
        yield f"… and {len(found.remarks) - _REMARKS:,} more such lines in events.jsonl"
    if not found.events:
        yield "The watch gave no verdict."


def _numbers(found: Retrospect) -> Table:
    table = Table(title=f"the numbers of step {found.step:,}", title_justify="left")
    table.add_column("number")
    for name in ("it was", "usual before", "÷ usual", f"at step {found.last:,}, the last"):
        table.add_column(name, justify="right")
    for name, number in found.numbers.items():
        values = (number.value, number.usual, number.times, number.last)
        table.add_row(name, *map(short, values))
    return table


def _layers(found: Retrospect) -> Iterator[Table | str]:
    if found.look is None:
        yield "No layer was looked into: there is nothing to say of where it begins."
        return
    title = f"the look at step {found.look['step']:,}: mode split at the writers, the largest first"
    table = writers_table(writers_of(found.look), title)
    if table.row_count:
        yield table
    else:
        yield f"The look at step {found.look['step']:,} holds no writer's mean and centered part."


def writers_of(look: Record) -> Iterator[WriterRow]:
    """Writer, layer, G_mean, G_ctr and token similarity of all of which a look holds G_mean."""
    layers = look.get("layer", [])
    tcs = look.get("tcs", [None] * len(layers))
    for writer, branch in (("W_O", "attn"), ("W_2", "ffn")):
        columns = [look.get(f"{part}_{branch}", []) for part in ("g_mean", "g_ctr")]
        for layer, mean, centered, alike in zip(layers, *columns, tcs, strict=False):
            if mean is not None:
                yield writer, layer, mean, centered, alike


def writers_table(rows: Iterable[WriterRow], title: str) -> Table:
    """The writers whose mean-coherent gradient is largest."""
    table = Table(title=title, title_justify="left")
    for name in ("writer", "layer", "G_mean", "G_ctr", "G_mean / G_ctr", "token similarity"):
        table.add_column(name, justify="right")
    largest = sorted(rows, key=lambda row: -rank(row[2]))[:_LAYERS]
    for writer, layer, mean, centered, alike in largest:
        ratio = f"{mean / centered:.3g}" if mean is not None and centered else ""
        table.add_row(writer, str(layer), short(mean), short(centered), ratio, short(alike))
    return table


def rank(value: float | None) -> float:
    """For sorting by size: what is not finite is largest, what was not measured smallest."""
    return -1.0 if value is None else value if math.isfinite(value) else math.inf


def short(value: float | None) -> str:
    """A number for a table; nothing where there is none."""
    return "" if value is None else f"{value:.3g}"
