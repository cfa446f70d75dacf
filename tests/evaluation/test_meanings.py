"""Every score has a meaning that says its unit and which way is better."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mvsplit.evaluation
from mvsplit.data.motions import MOTIONS
from mvsplit.evaluation.geneval import GENEVAL
from mvsplit.evaluation.meanings import MEANINGS, SPREAD, explain_scores, list_scores, meaning_of

HELPERS = ("share", "_share_of", "_mean")  # take the name of a score first


def written(path: Path) -> set[str]:
    """Names of scores that a module writes out in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        first = None
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            first = node.value.elts[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in HELPERS:
            first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            found.add(first.value)
    return found


def names() -> list[str]:
    scores = set().union(*map(written, Path(mvsplit.evaluation.__file__).parent.glob("*.py")))
    scores |= {f"geneval_{task}" for task in GENEVAL} | {f"clip_{motion}" for motion in MOTIONS}
    scores |= {f"clip_{part}" for part in ("objects", "direction", "speed", "bounce", "occlusion")}
    scores |= {f"validation_loss_t{b / 10:g}-{(b + 1) / 10:g}" for b in range(10)}
    return sorted(scores)


def test_the_names_are_found():
    assert {"fid", "digit_frechet", "caption_exact", "validation_loss"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_score_has_a_meaning_with_a_unit_and_a_direction(name):
    meaning = meaning_of(name)
    assert meaning is not None
    assert "is better" in meaning.measure
    lower = any(word in name for word in ("loss", "frechet", "fid", "unnamed"))
    if name != "inception_score_std":
        assert ("lower is better" in meaning.measure) is lower
        assert ("higher is better" in meaning.measure) is not lower


def test_no_meaning_is_of_a_score_that_nobody_gives():
    assert {meaning_of(name) for name in names()} == set(MEANINGS)


def test_lines_name_the_scores_in_their_order_and_once():
    scores = ["digit_frechet", "validation_loss", "validation_loss_stderr"]
    scores += [f"validation_loss_t0.{b}-0.{b + 1}" for b in range(9)]
    lines = list(explain_scores([*scores, "beauty"]))
    assert [line.partition(": ")[0] for line in lines[:-1]] == [
        "digit_frechet",
        "validation_loss",
        "validation_loss_t0.0-0.1, …, validation_loss_t0.8-0.9",
        "beauty",
    ]
    assert "not known to this one" in lines[-2]
    assert lines[-1] == SPREAD
    assert list_scores([*scores, "beauty"]) == ", ".join(
        line.partition(": ")[0] for line in lines[:-1]
    )
