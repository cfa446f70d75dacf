"""The README's table of the bench: entries with enough seeds, from the rows of one size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvsplit.errors import UserError
from mvsplit.reproduce.depth.conclusion import TODAY, by_depth, joint
from mvsplit.reproduce.depth.page_parts import dead_words, figure, loss_words, table
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES, GPU, BenchSize
from mvsplit.reproduce.depth.table import Cell, cells
from mvsplit.reproduce.depth.verdict import SEEDS

BEGIN, END = "<!-- depth bench -->", "<!-- end -->"


def write_table(readme: Path, results: Path, size: BenchSize = GPU) -> None:
    """Puts the table between its two marks.

    Raises:
        UserError: the marks are not there.
    """
    rows = json.loads((results / f"{size.name}.json").read_text("utf-8"))["rows"]
    head, begin, rest = readme.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme} has no {BEGIN} … {END}, between which the table goes")
    lines = "\n".join(bench_table(cells(size, [*ENTRIES, *CANDIDATES], rows), size))
    readme.write_text(f"{head}{BEGIN}\n{lines.rstrip()}\n{END}{tail}", encoding="utf-8")


def bench_table(found: Sequence[Cell], size: BenchSize) -> list[str]:
    """The losses of entries at their best rates, at the depths at which any has enough seeds; the
    best first of the deepest at which half of the entries have them, the dead last. Those without
    enough seeds at any depth are left out. Below it which of them learned at every one of the
    depths, and which died."""
    here = {(c.entry.label, c.depth): c for c in found if c.width == size.width}
    enough = {at for at, cell in here.items() if cell.rate and len(cell.best) >= SEEDS}
    depths = [depth for depth in size.depths if any(d == depth for _, d in enough)]
    names = list(dict.fromkeys(label for label, _ in enough))
    half = [d for d in depths if 2 * sum((label, d) in enough for label in names) >= len(names)]
    by = (half or depths)[-1]

    def order(label: str) -> tuple[int, float, str]:
        cell = here.get((label, by))
        died = cell is not None and cell.rate is None
        return (2 if died else int(cell is None), _middle(cell), label)

    lines = [
        [label, *(_words(here.get((label, depth))) for depth in depths)]
        for label in sorted(names, key=order)
    ]
    everywhere = [line[0] for line in lines if all(_learned(here, line[0], d) for d in depths)]
    words = "; ".join(label + _few(here, label, depths) for label in everywhere)
    labels = {cell.entry.name: cell.entry.label for cell in found}
    today = {cell.entry.label for cell in found if cell.entry.name == TODAY}
    shown = [[f"**{row[0]}** (default)" if row[0] in today else row[0], *row[1:]] for row in lines]
    head = ("residual rule", *(f"{depth} layers" for depth in depths))
    return [
        *table(head, shown),
        f"Ordered by the loss at {by} layers: not run there after those that learned, dead last.\n",
        f"Learned at each of these depths: {words or 'none of them'}.\n",
        *(f"{sentence}\n" for sentence in joint(by_depth([(size, found)]), labels)[:2]),
        dead_words(size, found),
    ]


def _learned(here: Mapping[tuple[str, int], Cell], label: str, depth: int) -> bool:
    cell = here.get((label, depth))
    return cell is not None and cell.rate is not None and bool(cell.losses)


def _few(here: Mapping[tuple[str, int], Cell], label: str, depths: Sequence[int]) -> str:
    """At which depths this is known of fewer seeds than a verdict wants."""
    counts = {depth: len(here[label, depth].losses or ()) for depth in depths}
    few = [f"{n} seed{'s' * (n > 1)} at {depth}" for depth, n in counts.items() if n < SEEDS]
    return f" ({', '.join(few)})" if few else ""


def _middle(cell: Cell | None) -> float:
    losses = [] if cell is None else cell.losses or []
    return sum(losses) / len(losses) if losses else float("inf")


def _words(cell: Cell | None) -> str:
    if cell is None or cell.rate is None:
        return "learns at no rate" if cell is not None and cell.swept else loss_words(cell)
    end = ", an end of its sweep" if cell.at_end else ""
    if cell.tried == [cell.rate]:
        end = ", the only rate run"
    return f"{figure(cell.losses or [], mark=True)} at {cell.rate:g}{end}"
