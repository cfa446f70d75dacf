"""`mvsplit evaluate compare A B …`: scores side by side, if they may be compared."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mvsplit.cli.evaluate_table import legend, letters_of, show
from mvsplit.errors import UserError
from mvsplit.evaluation.passport import (
    ABSENT,
    Evaluation,
    differences,
    in_short,
    is_within,
    read_evaluation,
)

REFUSED = 1  # the exit status


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
    _require_allow_last(args)
    if len(args.evaluations) < 2:
        raise UserError("compare: name two evaluations or more")
    found = [read_evaluation(path) for path in args.evaluations]
    wrong = differences(found, args.allow)
    if wrong:
        _refuse(found, wrong)
        return REFUSED
    show(found, differences(found))
    return 0


def _require_allow_last(args: Arguments) -> None:
    """--allow takes all words after it, those that were meant as evaluations too."""
    files = [word for word in args.allow if _is_evaluation(Path(word))]
    if files or (args.allow and len(args.evaluations) < 2):
        fields = [word for word in args.allow if word not in files] or ["FIELD"]
        places = [*map(str, args.evaluations), *files]
        places += ["A", "B"][len(places) :]
        raise UserError(
            f"allow={' '.join(args.allow)}: --allow comes last, for it takes all words after it: "
            f"mvsplit evaluate compare {shlex.join([*places, '--allow', *fields])}"
        )


def _is_evaluation(path: Path) -> bool:
    return path.is_file() or (path / "evaluations").is_dir()


def _refuse(evaluations: Sequence[Evaluation], wrong: Mapping[str, Sequence[Any]]) -> None:
    """Says which fields differ: a line for each value, with those that have it."""
    print("These scores cannot be compared: they differ in more than the weights.", file=sys.stderr)
    for line in legend(evaluations):
        print(f"  {line}", file=sys.stderr)
    for field, values in wrong.items():
        have: dict[str, list[str]] = {}
        for letter, value in zip(letters_of(evaluations), values, strict=True):
            have.setdefault(in_short(value), []).append(letter)
        if field.partition(".")[0] in (g for g in wrong if g != field):
            have.pop(ABSENT, None)  # which the line of the group says
        for value, letters in have.items():
            print(f"  {field}: {value} in {', '.join(letters)}", file=sys.stderr)
    most = [field for field in wrong if not is_within(field, wrong.keys() - {field})]
    print(f"To compare all the same: --allow {' '.join(most)}", file=sys.stderr)
