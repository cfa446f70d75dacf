"""The rule: what a verdict is made of, on figures of both outcomes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from mvsplit.errors import UserError
from mvsplit.reproduce.rule import (
    FAILS,
    HOLDS,
    OPEN,
    Bound,
    Condition,
    Figure,
    at_least,
    below,
    fingerprint,
    judge,
)


def figure(name: str, *values: float | None) -> Figure:
    return Figure(name=name, words="", values=dict(enumerate(values)))


RISE = at_least("rise", 10, 2, "why")
FALL = below("fall", 0.1, 0.5, "why")
SEEN = at_least("seen", 1, 1, "why", needed=True)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((10.0, 11.0, 99.0), HOLDS),
        ((10.0, 9.99, 99.0), OPEN),  # one seed below is enough to leave it open
        ((1.0, 1.9, 99.0), FAILS),  # two of three
        ((1.0, 99.0), OPEN),  # a half is not more than half
        ((2.0, 2.0, 2.0), OPEN),  # the bound itself does not refute
        ((), OPEN),
        ((None, 99.0), OPEN),
        ((math.nan, math.nan), OPEN),
        ((math.inf, 99.0), OPEN),  # what JSON cannot hold is no value
    ],
)
def test_a_condition_wants_all_seeds_and_is_refuted_by_most(values, verdict):
    assert judge([RISE], [figure("rise", *values)]).verdict == verdict


def test_below_faces_the_other_way():
    for value, verdict in ((0.09, HOLDS), (0.1, OPEN), (0.49, OPEN), (0.5, FAILS)):
        assert judge([FALL], [figure("fall", value)]).verdict == verdict


def brute_force(found: tuple[str, str, str]) -> str:
    """The verdict by the words of the module, from what needed, first and second came to."""
    needed, *others = found
    if needed != HOLDS:
        return OPEN
    if FAILS in others:
        return FAILS
    return OPEN if OPEN in others else HOLDS


def test_conditions_together():
    seen = {HOLDS: 1.0, FAILS: 0.0, OPEN: None}
    rise = {HOLDS: 20.0, FAILS: 1.0, OPEN: 5.0}
    fall = {HOLDS: 0.0, FAILS: 1.0, OPEN: 0.3}
    met = set()
    for found in itertools.product((HOLDS, FAILS, OPEN), repeat=3):
        figures = [figure("seen", seen[found[0]]), figure("rise", rise[found[1]])]
        figures.append(figure("fall", fall[found[2]]))
        got = judge([SEEN, RISE, FALL], figures)
        assert got.verdict == brute_force(found)
        assert [reason.split(":")[0].split(" ")[0] for reason in got.reasons] == [
            {HOLDS: "met", FAILS: "refuted", OPEN: "open"}[word] for word in found
        ]
        met.add(got.verdict)
    assert met == {HOLDS, FAILS, OPEN}


def test_a_rule_that_could_say_both_is_refused():
    with pytest.raises(UserError, match="face away"):
        at_least("rise", 2, 10, "why")
    with pytest.raises(UserError, match="face away"):
        below("fall", 0.5, 0.1, "why")
    with pytest.raises(UserError, match="face away"):
        Condition(figure="x", holds=Bound("<", 1), fails=Bound("<", 2), why="")


def test_a_condition_without_its_figure_is_an_error():
    with pytest.raises(UserError, match="no figure 'rise'"):
        judge([RISE], [figure("fall", 0.0)])


def test_what_is_stored_is_what_was_judged():
    given = figure("rise", 9.9996, 123456.0, math.inf)
    again = Figure.from_dict("rise", given.as_dict())
    assert again == given
    assert dict(again.values) == {0: 10.0, 1: 123500.0, 2: None}


def test_a_fingerprint_knows_every_part_of_a_rule():
    rule = [RISE, FALL]
    changed = [
        [dataclasses.replace(RISE, why="another reason"), FALL],
        [dataclasses.replace(RISE, needed=True), FALL],
        [at_least("rise", 11, 2, "why"), FALL],
        [RISE],
    ]
    prints = {fingerprint(other) for other in (rule, *changed)}
    assert len(prints) == 5
    assert fingerprint([RISE, FALL]) == fingerprint(rule)
