"""The README's table of the bench: entries with enough seeds, from the rows of one size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mvsplit.errors import UserError
from mvsplit.reproduce.depth.conclusion import TODAY, by_depth, joint
from mvsplit.reproduce.depth.page_parts import (
    NOTHING,
    dead_words,
    figure,
    loss_words,
    smaller_words,
    table,
)
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES, GPU, SIZES, BenchSize
from mvsplit.reproduce.depth.table import Cell, cells
from mvsplit.reproduce.depth.verdict import SEEDS

BEGIN, END = "<!-- depth bench -->", "<!-- end -->"


def write_table(readme: Path, results: Path, size: BenchSize = GPU) -> None:
    """Puts between its two marks the table of a size, those of the sizes that have its networks for
    longer, and what all sizes say together.

    Raises:
        UserError: the marks are not there.
    """
    found = {}
    for each in dict.fromkeys((*SIZES.values(), size)):
        path = results / f"{each.name}.json"
        if path.exists():
            rows = json.loads(path.read_text("utf-8"))["rows"]
            found[each] = cells(each, [*ENTRIES, *CANDIDATES], rows)
    head, begin, rest = readme.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme} has no {BEGIN} … {END}, between which the table goes")
    labels = {entry.name: entry.label for entry in (*ENTRIES, *CANDIDATES)}
    if size not in found:
        raise UserError(f"{results} has no rows of size {size.name!r}, of which the table is")
    parts = [*bench_table(found[size], size), ""]
    for each, cells_of_it in found.items():
        if each.like == size.name:
            losses, *_ = loss_table(cells_of_it, each)
            parts += [f"The same networks after {each.steps} steps:\n", *losses]
    parts += [f"{sentence}\n" for sentence in joint(by_depth([*found.items()]), labels)[:2]]
    lines = "\n".join(parts).rstrip()
    readme.write_text(f"{head}{BEGIN}\n{lines}\n{END}{tail}", encoding="utf-8")


def bench_table(found: Sequence[Cell], size: BenchSize) -> list[str]:
    """`loss_table`, and below it which of its entries learned at every one of its depths, and what
    died."""
    lines, names, depths = loss_table(found, size)
    here = {(c.entry.label, c.depth): c for c in found if c.width == size.width}
    everywhere = [name for name in names if all(_learned(here, name, d) for d in depths)]
    words = "; ".join(label + _few(here, label, depths) for label in everywhere)
    return [
        *lines,
        "Ordered by the last column, how far a mean is above the smallest of its depth where that "
        "is most; what was not run at a depth comes after the others, what died at one last. This "
        "order was chosen with rows in sight.\n",
        f"Learned at each of these depths: {words or 'none of them'}.\n",
        dead_words(size, found),
    ]


def loss_table(found: Sequence[Cell], size: BenchSize) -> tuple[list[str], list[str], list[int]]:
    """The losses of entries at their best rates, at the depths at which any has enough seeds. Those
    without enough seeds at any depth are left out. The first is the one that loses least at the
    depth that suits it worst.

    Returns:
        Markdown, the labels in the order of its lines, and its depths.
    """
    here = {(c.entry.label, c.depth): c for c in found if c.width == size.width}
    enough = {at for at, cell in here.items() if cell.rate and len(cell.best) >= SEEDS}
    depths = [depth for depth in size.depths if any(d == depth for _, d in enough)]
    least = {d: min(_middle(here[at]) for at in enough if at[1] == d) for d in depths}

    def above(label: str) -> float:
        known = {d: cell for d in depths if (cell := here.get((label, d))) and cell.rate}
        return max(_middle(cell) / least[d] - 1 for d, cell in known.items())

    def order(label: str) -> tuple[bool, bool, float, str]:
        cells_of_it = [here.get((label, d)) for d in depths]
        died = any(cell is not None and cell.rate is None for cell in cells_of_it)
        return died, None in cells_of_it, above(label), label

    def few(label: str) -> str:
        return "" if all((label, depth) in enough for depth in depths) else " (**few seeds**)"

    names = sorted({label for label, _ in enough}, key=order)
    today = {cell.entry.label for cell in found if cell.entry.name == TODAY}
    rows = [
        [
            f"**{label}** (default)" if label in today else label,
            *(_words(here.get((label, depth))) for depth in depths),
            NOTHING if any(order(label)[:2]) else f"{above(label):.1%}{few(label)}",
        ]
        for label in names
    ]
    head = ("residual rule", *(f"{depth} layers" for depth in depths), "at most above the best")
    return table(head, rows), names, depths


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
    return f"{figure(cell.losses or [], mark=True)} at {cell.rate:g}{end}{smaller_words(cell)}"
