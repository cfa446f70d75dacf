"""`mvsplit evaluate compare A B …`: scores side by side, if they may be compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mvsplit.errors import UserError
from mvsplit.evaluation.meanings import explain_scores
from mvsplit.evaluation.passport import Evaluation, differences, read_evaluation
from mvsplit.evaluation.scores import STDERR

REFUSED = 1  # the exit status
_NO_SPREAD = "no spread"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Shows scores side by side where the passports agree in everything but the weights; else says
    what differs, and ends with status 1.

    Attributes:
        evaluations: files that mvsplit evaluate has written, or runs with one evaluation.
        allow: fields of the passport that may differ, for example sampling.steps or versions; give
            it last.
    """

    evaluations: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="A B …", help_behavior_hint=""),
    ]
    allow: tuple[str, ...] = ()


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: fewer than two evaluations, a file that holds none, an unknown field.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit evaluate compare")
    if len(args.evaluations) < 2:
        raise UserError("compare: name two evaluations or more")
    found = [read_evaluation(path) for path in args.evaluations]
    wrong = differences(found, args.allow)
    if not wrong:
        show(found)
        return 0
    print("These scores cannot be compared: they differ in more than the weights.", file=sys.stderr)
    for field, values in wrong.items():
        shown = ", ".join(f"{v!r} in {e.name}" for v, e in zip(values, found, strict=True))
        print(f"  {field}: {shown}", file=sys.stderr)
    print(f"To compare all the same: --allow {' '.join(wrong)}", file=sys.stderr)
    return REFUSED


def show(evaluations: Sequence[Evaluation]) -> None:
    """Prints a row for each score, a column for each evaluation, with standard errors; then what
    each score says."""
    table = Table("score", *(evaluation.name for evaluation in evaluations))
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.scores)
    for name in names:
        if not name.endswith(STDERR):
            table.add_row(name, *(_value(evaluation, name) for evaluation in evaluations))
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in explain_scores(names):
        console.print(line, soft_wrap=True)


def _value(evaluation: Evaluation, name: str) -> str:
    if name not in evaluation.scores:
        return "–"
    error = evaluation.scores.get(name + STDERR)
    spread = f"({_NO_SPREAD})" if error is None else f"± {error:.2g}"
    return f"{evaluation.scores[name]:.4g} {spread}"
