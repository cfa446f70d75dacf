"""Scores as a table: a row for each, a column for each evaluation, and what the columns say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mvsplit.cli.tables import table_console
from mvsplit.evaluation.meanings import explain_scores, list_scores
from mvsplit.evaluation.passport import Evaluation, in_short, paired, unpaired
from mvsplit.evaluation.scores import STDERR

_BETWEEN = 3  # columns of the screen between two of a table
_MISSING = "–"
_PAIRED = (
    "both were asked the same samples with the same noise, so this is the mean of the differences, "
    "and ± its standard error; what is more than two of them is hardly chance"
)
_OF_NETWORKS = "It is of these two networks: another training seed may differ by more"
_NOT_ALONE = (
    "between those that differ so, no difference of what was drawn is one of the networks alone"
)
_NONE = (
    "± 0: of a share, all trials went the same way; of few trials that says little, for of n that "
    "all failed the true share may be as high as about 3/n"
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A header, and a cell for each score."""

    header: str
    cells: list[str]


def show(
    evaluations: Sequence[Evaluation], allowed: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Prints scores with standard errors side by side, and the difference of pairs to the first;
    then what each score says, and why a cell is empty.

    Args:
        allowed: fields of the passports that differ besides those of the weights, with the value
            of each.
    """
    console = table_console(highlight=False, markup=False)
    names = [name for name in _all_scores(evaluations) if not name.endswith(STDERR)]
    for line in _head(evaluations, allowed or {}):
        console.print(line, soft_wrap=True)
    columns = [*_values(evaluations, names), *_differences(evaluations, names)]
    scores = Column(header="score", cells=names)
    for group in _side_by_side(scores, columns, console.width):
        console.print(_table([scores, *group]))
    lines = [*explain_scores(names), *_notes(evaluations, names, bool(allowed))]
    for line in lines:
        console.print(line, soft_wrap=True)


def legend(evaluations: Sequence[Evaluation]) -> list[str]:
    """The letter of each evaluation, and which it is."""
    letters = letters_of(evaluations)
    return [f"{letter}  {each.name}" for letter, each in zip(letters, evaluations, strict=True)]


def letters_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """A, B, …; numbers where there are more than letters."""
    count = len(evaluations)
    return [chr(ord("A") + k) if count <= 26 else str(k + 1) for k in range(count)]


def _head(evaluations: Sequence[Evaluation], allowed: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    if len(evaluations) == 1:
        yield evaluations[0].name
        return
    yield from legend(evaluations)
    for field, values in allowed.items():
        yield f"differs, and allowed: {field} {' | '.join(map(in_short, values))}"
    if allowed:
        yield _NOT_ALONE


def _all_scores(evaluations: Sequence[Evaluation]) -> dict[str, None]:
    return dict.fromkeys(name for evaluation in evaluations for name in evaluation.scores)


def _values(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Iterator[Column]:
    headers = letters_of(evaluations) if len(evaluations) > 1 else ["value"]
    for header, evaluation in zip(headers, evaluations, strict=True):
        yield Column(header=header, cells=[_value(evaluation, name) for name in names])


def _value(evaluation: Evaluation, name: str) -> str:
    if name not in evaluation.scores:
        return _MISSING
    error = evaluation.scores.get(name + STDERR)
    return f"{evaluation.scores[name]:.4g} ± {'?' if error is None else f'{error:.2g}'}"


def _differences(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Iterator[Column]:
    """A column for each evaluation that has pairs with the first."""
    for header, other in _others(evaluations):
        found = [paired(evaluations[0], other, name) for name in names]
        if any(found):
            cells = [_MISSING if f is None else f"{f[0]:+.2g} ± {f[1]:.2g}" for f in found]
            yield Column(header=header, cells=cells)


def _side_by_side(scores: Column, columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """The columns in groups that fit on the screen beside that of the scores."""
    group: list[Column] = []
    for column in columns:
        needed = _width(scores) + sum(_width(each) + _BETWEEN for each in (*group, column))
        if group and needed > width:
            yield group
            group = []
        group.append(column)
    yield group


def _width(column: Column) -> int:
    return max(map(cell_len, (column.header, *column.cells)))


def _table(columns: Sequence[Column]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.header), overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _notes(evaluations: Sequence[Evaluation], names: Sequence[str], differ: bool) -> Iterator[str]:
    """What the differences are, why cells are empty, and what an error of 0 says."""
    end = "" if differ else f". {_OF_NETWORKS}"
    for pairs, columns in _of_columns(_pairs(evaluations, names)):
        yield f"{columns}, paired ({pairs}): {_PAIRED}{end}"
    for reason, columns in _of_columns(_reasons(evaluations, names)):
        yield f"{_MISSING} in {columns}: {reason}"
    if any(each.scores[n] == 0 for each in evaluations for n in each.scores if n.endswith(STDERR)):
        yield _NONE


def _of_columns(said: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Of (column, what is said of it), what is said and all the columns that it is said of."""
    columns: dict[str, list[str]] = {}
    for column, text in said:
        columns.setdefault(text, []).append(column)
    for text, those in columns.items():
        yield text, ", ".join(those)


def _pairs(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """By column, how many pairs of which scores."""
    for column, other in _others(evaluations):
        found = {name: paired(evaluations[0], other, name) for name in names}
        counts = [f"{pair[2]} of {name}" for name, pair in found.items() if pair is not None]
        if counts:
            yield column, ", ".join(counts)


def _reasons(evaluations: Sequence[Evaluation], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """By column, scores that have no cell and why; for each reason once."""
    first, empty = evaluations[0], defaultdict[tuple[str, str], list[str]](list)
    for letter, each in zip(letters_of(evaluations), evaluations, strict=True):
        for name in names:
            if name not in each.scores:
                empty[letter, "not scored there"].append(name)
    for column, other in _others(evaluations):
        for name in names:
            if name in first.scores and name in other.scores:
                why = unpaired(first, other, name)
            else:
                why = "not scored in both"
            if why is not None:
                empty[column, why].append(name)
    for (column, why), missing in empty.items():
        yield column, f"{list_scores(missing)}: {why}"


def _others(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, Evaluation]]:
    """Each but the first, with the header of its difference to the first."""
    letters = letters_of(evaluations)
    for letter, other in zip(letters[1:], evaluations[1:], strict=True):
        yield f"{letter} − {letters[0]}", other
