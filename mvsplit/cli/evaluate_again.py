"""An evaluation that is there already: shown again if it is the same, never overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvsplit.errors import UserError
from mvsplit.evaluation.passport import (
    FREE,
    TOOLS,
    Evaluation,
    differing,
    in_short,
    is_within,
    read_evaluation,
)

_NETWORK = "weights.sha256"
_SAYS_NOTHING = tuple(field for field in FREE if field != _NETWORK)


def found_again(place: Path, passport: Mapping[str, Any]) -> Evaluation:
    """The evaluation at `place`, if it is of the same settings, network and data as `passport`;
    says that it is there, and with which other versions it was made.

    Raises:
        UserError: it is another, which is not overwritten.
    """
    there = read_evaluation(place)
    now = json.loads(json.dumps(passport))  # as it would be read back
    changed = {
        field: values
        for field, values in differing([there.passport, now]).items()
        if not is_within(field, _SAYS_NOTHING)
    }
    tools = {field: v for field, v in changed.items() if is_within(field, TOOLS)}
    others = {field: v for field, v in changed.items() if field not in tools}
    if others:
        raise UserError(
            f"{place} is there, {_of_what(others)}, and is not overwritten ({_listed(others)}); "
            f"choose another --name, or remove it"
        )
    print(
        f"the same settings, network and data were scored on {there.passport.get('date')}: these "
        "scores are shown again, and nothing is computed"
    )
    if tools:
        print(
            f"they were made with other versions ({_listed(tools)}); to score anew, choose another "
            "--name"
        )
    return Evaluation(
        name=place.stem, scores=there.scores, passport=there.passport, samples=there.samples
    )


def _of_what(fields: Mapping[str, Any]) -> str:
    if not all(field.endswith("sha256") for field in fields):
        return "with other settings"
    if _NETWORK not in fields:
        return "of other data"
    return "of another network" if len(fields) == 1 else "of another network and other data"


def _listed(fields: Mapping[str, list[Any]]) -> str:
    return ", ".join(
        f"{field}: {in_short(there)} there, {in_short(now)} now"
        for field, (there, now) in fields.items()
    )
