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
from mvsplit.evaluation.passport import Evaluation, differences, paired, read_evaluation
from mvsplit.evaluation.scores import STDERR

REFUSED = 1  # the exit status
_NO_SPREAD = "no spread"
_PAIRED = (
    "paired: both were asked the same samples with the same noise, so this is the mean of the "
    "differences, and ± its standard error; what is more than two of them is hardly chance. It is "
    "of these two networks: another training seed may differ by more"
)
_NONE = (
    "± 0: of a share, all trials went the same way; of few trials that says little, for of n that "
    "all failed the true share may be as high as about 3/n"
)


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
    """Prints a row for each score, a column for each evaluation, with standard errors, and one for
    the difference of pairs to the first; then what each score says."""
    first, *others = evaluations
    paired_with = [each for each in others if any(paired(first, each, n) for n in first.samples)]
    apart = [f"{each.name} − {first.name}, paired" for each in paired_with]
    table = Table("score", *(evaluation.name for evaluation in evaluations), *apart)
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.scores)
    for name in names:
        if not name.endswith(STDERR):
            values = [_value(evaluation, name) for evaluation in evaluations]
            table.add_row(name, *values, *(_apart(first, each, name) for each in paired_with))
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in explain_scores(names):
        console.print(line, soft_wrap=True)
    if apart:
        console.print(_PAIRED, soft_wrap=True)
    if any(each.scores[n] == 0 for each in evaluations for n in each.scores if n.endswith(STDERR)):
        console.print(_NONE, soft_wrap=True)


def _apart(first: Evaluation, second: Evaluation, name: str) -> str:
    found = paired(first, second, name)
    return "–" if found is None else f"{found[0]:+.2g} ± {found[1]:.2g} ({found[2]} pairs)"


def _value(evaluation: Evaluation, name: str) -> str:
    if name not in evaluation.scores:
        return "–"
    error = evaluation.scores.get(name + STDERR)
    spread = f"({_NO_SPREAD})" if error is None else f"± {error:.2g}"
    return f"{evaluation.scores[name]:.4g} {spread}"
