"""The tables of the bench's page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mvsplit.reproduce.depth.plan import BenchSize, get_entries, get_run
from mvsplit.reproduce.depth.table import (
    Cell,
    Row,
    at_equal_time,
    collapses,
    key,
    mean,
    seconds_alone,
    spread,
    watch_count,
)
from mvsplit.reproduce.depth.timing import SHARED
from mvsplit.reproduce.depth.verdict import SEEDS

NOTHING = "–"
_FEW = 12  # lines of a table that is not folded away


def figure(values: Sequence[float], digits: int = 3, *, mark: bool = False) -> str:
    """Mean ± standard deviation; a single value as it is. With `mark` it says of how many seeds,
    where these are too few for the rule of the verdicts."""
    middle, wide = mean(values), spread(values)
    if middle is None:
        return NOTHING
    text = f"{middle:.{digits}g}"
    if wide is not None:
        text += f" ± {wide:.2g}"
    few = mark and len(values) < SEEDS
    return f"{text} (**{len(values)} seed{'s' if len(values) > 1 else ''}**)" if few else text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, with an empty line after it."""
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cells) + " |" for cells in lines), ""]


def best_table(
    depth: int, size: BenchSize, found: Sequence[Cell], timing: Mapping[str, Any]
) -> list[str]:
    """What each entry reaches at its best rate, the best first."""
    here = [c for c in found if c.depth == depth and c.width == size.width]
    if not here:
        return [f"### {depth} layers\n", "Not run.\n"]
    timed = at_equal_time(here, timing)
    here.sort(key=lambda cell: mean(cell.losses or []) or float("inf"))
    rows = [
        [
            cell.entry.label + (" (control)" if cell.entry.kind == "control" else ""),
            _best_rate(cell),
            loss_words(cell),
            figure(timed.get(key(cell), [])),
            figure(cell.over_seeds("tasks", "geneval_mean"), 2),
            figure(cell.over_seeds("tasks", "shapes_frechet"), 2),
            figure(cell.over_seeds("similarity"), 2),
            _optional(seconds_alone(timing, cell.entry, depth, size.width)),
            _optional(max(cell.over_seeds("peak_gib"), default=None)),
        ]
        for cell in here
    ]
    head = (
        *("entry", "best rate", "validation loss", "training loss at equal time", "GenEval"),
        *("Fréchet", "token similarity", "s a step", "peak GiB"),
    )
    return [f"### {depth} layers\n", *table(head, rows)]


def _best_rate(cell: Cell) -> str:
    tried = f"{len(cell.tried)} tried" + ("" if cell.swept else ", sweep not whole")
    tried += ", **best at an end**" if cell.at_end and cell.swept else ""
    tried += smaller_words(cell)
    return f"{NOTHING if cell.rate is None else f'{cell.rate:.2g}'} ({tried})"


def smaller_words(cell: Cell) -> str:
    """That a rate with fewer seeds has a smaller mean, which the rule passes by."""
    if cell.smaller is None:
        return ""
    rate, losses = cell.smaller
    return f"; {figure(losses, mark=True)} at {rate:.2g}, fewer seeds"


def loss_words(cell: Cell | None) -> str:
    """The validation loss at the best rate, or why there is none."""
    if cell is None:
        return "not run"
    if cell.rate is None:
        tried = ", ".join(f"{rate:.2g}" for rate in cell.tried)
        return "nothing lives" if cell.swept else f"dead at {tried}, others not run"
    return figure(cell.losses or [], mark=True)


def dead_words(size: BenchSize, found: Sequence[Cell]) -> str:
    """Which entries the picture of best losses leaves out, since no rate that was run lives."""
    lines = []
    for depth in size.depths:
        here = [c for c in found if (c.depth, c.width) == (depth, size.width) and c.rate is None]
        each = [f"{c.entry.label} (at {', '.join(f'{r:.2g}' for r in c.tried)})" for c in here]
        lines += [f"at {depth} layers {', '.join(each)}"] if each else []
    if not lines:
        return "In the picture, by depth: all that was run."
    return f"Dead at every rate that was run, so not in the picture: {'; '.join(lines)}."


def _optional(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def rate_table(size: BenchSize, found: Sequence[Cell]) -> list[str]:
    """Which learning rates live; what was tried stands beside it, for a range may go on."""

    def span(rates: Sequence[float]) -> str:
        return NOTHING if not rates else f"{rates[0]:.2g} … {rates[-1]:.2g}"

    def words(cell: Cell | None) -> str:
        if cell is None:
            return "not run"
        if cell.living == cell.tried:
            return f"all of {span(cell.tried)}"
        return f"{span(cell.living)} of {span(cell.tried)}"

    return _by_depth("### Learning rates that live\n", size, found, words)


def _by_depth(
    title: str, size: BenchSize, found: Sequence[Cell], words: Callable[[Cell | None], str]
) -> list[str]:
    have = {(c.entry.name, c.depth): c for c in found}
    names = {c.entry.name: c.entry.label for c in found}
    rows = [
        [label, *(words(have.get((name, depth))) for depth in size.depths)]
        for name, label in names.items()
    ]
    return [title, *table(("entry", *(f"{d} layers" for d in size.depths)), rows)]


def collapse_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs that lost what they had learned, and what the watch said over all runs."""
    count = watch_count(rows)
    seen = (
        f"Of {count.dead} runs that do not live the watch raised an alarm in "
        f"{count.dead_with_alarm}; of {count.living} that live, in {count.living_with_alarm}. "
        if count.dead + count.living
        else ""
    )
    unseen = f"The watch saw none of the {count.unseen} trained as one. " if count.unseen else ""
    head = ("run", "collapse at step", "after, s", "the watch")
    lost = [
        [
            row["run"],
            str(row["collapse_step"]),
            _optional(row["collapse_seconds"]),
            _watch(row["watch"]),
        ]
        for row in collapses(rows)
    ]
    return [
        "### Collapses, and the watch\n",
        f"{seen}{unseen}Below: runs whose loss was under 0.8 of the floor and is above 0.9 of it "
        "at the end, or not finite; seconds with several runs sharing the device.\n",
        *(table(head, lost) if lost else ["None.\n"]),
    ]


def _watch(said: Mapping[str, Any] | None) -> str:
    if said is None:
        return "nothing"
    return f"{said['level']} {said['verdict']} at step {said['step']}"


def both_ways(
    gate: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]]
) -> list[str]:
    """How far runs that were trained as one are from the same ones alone, or in other company."""
    if not gate and not again:
        return []
    parts = ["### As one and alone\n"]
    if gate:
        worst = {n: max(each[n] for each in gate["runs"]) for n in ("curve", "validation_loss")}
        parts.append(
            f"Gate, {gate['device']}: {len(gate['runs'])} of {gate['wanted']} kinds, "
            f"{gate['steps']} steps, as {gate['runs'][0]['run']}: training losses within "
            f"{worst['curve']:.1e} of those alone, validation losses within "
            f"{worst['validation_loss']:.1e}, where {gate['limit']:g} is the limit: "
            f"**{'passed' if gate['passed'] else 'not passed'}**.\n"
        )
        parts[-1] = parts[-1].rstrip() + _ungated(gate, rows) + "\n"
    counts = {row["run"]: row for row in rows}
    pairs = [(counts[other["run"]], other) for other in again if other["run"] in counts]
    parts += _twice(
        "Whole runs of the bench that were trained both ways; the first counts above.\n",
        ("run", "alone", "as one", "apart"),
        [pair for pair in pairs if "together" not in pair[0] and "together" in pair[1]],
    )
    for words, together in (
        ("Runs that were trained as one more than once, with other members", True),
        ("Runs that were run alone more than once", False),
    ):
        same = [pair for pair in pairs if {"together" in each for each in pair} == {together}]
        head = ("run", "counts", "beside it", "apart")
        parts += _twice(f"{words}; {_which_counts(same)}.\n", head, same)
    return parts


def _which_counts(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Why of two rows of a run by the same way the first is the one above."""
    known = "the later counts above"
    if all("date" in row for pair in pairs for row in pair):
        return known
    return (
        f"{known}. A row without a date, from before rows had one, is taken to be older than one "
        "that has it; of two without, nothing says which is later, and what counts is left as it is"
    )


def _twice(words: str, head: Sequence[str], pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """How far apart they are, and a line for each run of which there are two rows, folded away
    where they are many; nothing where there are none."""
    lines = [
        [row["run"], *(_ending(each) for each in (row, other)), _share(row, other)]
        for row, other in pairs
    ]
    lines = [list(line) for line in dict.fromkeys(map(tuple, lines))]  # the same again says nothing
    if len(lines) <= _FEW:
        return [words, *table(head, lines)] if lines else []
    apart = [abs(share) for row, other in pairs if (share := _apart(row, other)) is not None]
    summary = f"{len(lines)} pairs"
    if apart:
        summary += (
            f", {apart.count(0)} with the same loss; in the middle {statistics.median(apart):.1%}, "
            f"at most {max(apart):.1%} apart"
        )
    folded = f"<details><summary>{summary}</summary>\n"
    return [words, folded, *table(head, lines), "</details>\n"]


def _ungated(gate: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The entries trained as one whose kind of merge the gate had no network of."""
    runs = [get_run(each["run"]) for each in gate["runs"]]
    merges, depth = {run.entry.merge(run.depth) for run in runs}, runs[0].depth
    names = dict.fromkeys(row["entry"] for row in rows if "together" in row)
    labels = [e.label for e in get_entries([*names]) if e.merge(depth) not in merges]
    return f" It had no network that starts as {', '.join(labels)}." if labels else ""


def _ending(row: Mapping[str, Any]) -> str:
    loss = row["validation_loss"]
    return row["ended"] if loss is None else f"{loss:.4g}"


def _share(row: Row, other: Row) -> str:
    share = _apart(row, other)
    return NOTHING if share is None else f"{share:+.1%}"


def _apart(row: Row, other: Row) -> float | None:
    """By which part of the first's loss the second is above it."""
    mine, theirs = row["validation_loss"], other["validation_loss"]
    return None if None in (mine, theirs) else theirs / mine - 1


def shape_table(size: BenchSize, found: Sequence[Cell], timing: Mapping[str, Any]) -> list[str]:
    """Depth against width at equally many parameters."""
    shapes = [shape for shape in size.shapes if any(_shape(c) == shape for c in found)]
    title = "### Depth against width, at equally many parameters\n"
    if len(shapes) < 2:
        return [title, "Not run.\n"]
    have = {(c.entry.name, _shape(c)): c for c in found if c.rate}
    names = {n: c.entry.label for (n, shape), c in have.items() if shape in size.shapes[1:]}
    timed = at_equal_time([c for c in found if _shape(c) in shapes], timing)
    rows = [
        [
            label,
            *(
                f"{figure(have[name, shape].losses or [], mark=True)}; "
                f"{figure(timed.get(key(have[name, shape]), []))}"
                if (name, shape) in have
                else "not run"
                for shape in shapes
            ),
        ]
        for name, label in names.items()
    ]
    head = ("entry", *(f"{depth} × {width}" for depth, width in shapes))
    words = (
        "Layers × width; L·D² is the same, and so is the arithmetic of a step but for attention, "
        "so that equal steps are equal compute. Validation loss after all steps; training loss "
        "in the time in which the fastest takes all its steps. Each at its own best rate.\n"
    )
    return [title, words, *table(head, rows)]


def _shape(cell: Cell) -> tuple[int, int]:
    return cell.depth, cell.width


def timing_table(timing: Mapping[str, Any], size: BenchSize, picture: str) -> list[str]:
    """Seconds a step, alone and side by side."""
    rows = [
        [count, _optional(max(each["seconds"])), f"{each['steps_a_second']:.3g}"]
        for count, each in timing["side_by_side"].items()
    ]
    head = ("processes", "s a step", "steps a second, all together")
    return [
        "### Time\n",
        f"{timing['device']}, torch {timing['torch']}; medians of {timing['steps']} steps. "
        f"Processes that share the device, each with a copy of {SHARED}, {size.depths[-2]} layers "
        f"of width {size.width}:\n",
        *table(head, rows),
        f"![Seconds a step]({picture})\n",
    ]
