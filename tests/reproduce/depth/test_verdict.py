"""The rule of the verdict on losses made by hand."""

import pytest

from mvsplit.reproduce.depth.verdict import (
    against_rivals,
    best,
    compare,
    new_defaults,
    note_rule,
    rule_sha256,
)

GOOD, SAME, BAD = [0.200, 0.201, 0.199], [0.204, 0.203, 0.205], [0.250, 0.251, 0.249]
WIDE = [0.18, 0.25, 0.32]  # mean 0.25, standard deviation 0.07


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (GOOD, BAD, "ahead"),
        (BAD, GOOD, "behind"),
        (GOOD, SAME, "tie"),  # 2 % apart
        # 20 % apart, but the error of the difference is 0.07/√3 = 0.04.
        (GOOD, WIDE, "cannot tell"),
        (GOOD[:2], BAD, "cannot tell"),
        (GOOD, [], "ahead"),
        ([], GOOD, "behind"),
        ([], [], "cannot tell"),
        (GOOD[:2], [], "cannot tell"),
        (GOOD, None, "cannot tell"),
        (None, GOOD, "cannot tell"),
    ],
)
def test_two_entries(mine, theirs, expected):
    assert compare(mine, theirs) == expected


def test_two_standard_errors_are_the_bound():
    # Equal variances s² = 1e-4 of three: the error of the difference is √(2/3)·0.01 = 0.00816.
    mine, near, far = ([m - 0.01, m, m + 0.01] for m in (0.200, 0.216, 0.217))
    assert compare(mine, near) == "cannot tell"
    assert compare(mine, far) == "ahead"


def test_the_best_has_the_smallest_mean_and_enough_seeds():
    assert best({"a": BAD, "b": GOOD, "c": [0.1, 0.1], "d": [], "e": None}) == "b"
    assert best({"c": [0.1]}) is None


def test_mvsplit_is_as_good_only_with_one_setting_at_every_depth():
    rivals = {100: {"r": SAME}, 400: {"r": SAME}}
    one = {100: {"a": GOOD, "b": BAD}, 400: {"a": SAME, "b": GOOD}}
    verdict, standing = against_rivals(one, rivals)
    assert verdict == "at least as good as its rivals"
    assert standing == {100: {"a": "tie", "b": "behind"}, 400: {"a": "tie", "b": "tie"}}
    # Each depth has a good setting, but no setting is good at both.
    two = {100: {"a": GOOD, "b": BAD}, 400: {"a": BAD, "b": GOOD}}
    assert against_rivals(two, rivals)[0] == "cannot tell"
    none = {100: {"a": GOOD, "b": BAD}, 400: {"a": BAD, "b": BAD}}
    assert against_rivals(none, rivals)[0] == "not as good as its rivals"
    few = {100: {"a": GOOD}, 400: {"a": GOOD[:1]}}
    assert against_rivals(few, rivals)[0] == "cannot tell"


def test_it_is_compared_with_the_best_rival_of_each_depth():
    rivals = {100: {"weak": BAD, "strong": GOOD}}
    assert against_rivals({100: {"a": BAD}}, rivals)[0] == "not as good as its rivals"


def test_a_default_is_replaced_only_by_what_nothing_is_ahead_of():
    settings = {100: {"now": BAD, "new": GOOD}, 400: {"now": GOOD, "new": SAME}}
    assert new_defaults(settings, "now") == ["new"]
    # Two that are not told apart.
    both = {depth: {**losses, "other": losses["new"]} for depth, losses in settings.items()}
    assert new_defaults(both, "now") == ["new", "other"]
    # Ahead nowhere.
    assert new_defaults({100: {"now": SAME, "new": GOOD}}, "now") == []
    # Behind at one depth.
    worse = {**settings, 1000: {"now": GOOD, "new": BAD}}
    assert new_defaults(worse, "now") == []
    # Another is ahead of it.
    third = {100: {"now": [0.4] * 3, "new": BAD, "third": GOOD[:3]}, 400: settings[400]}
    assert new_defaults(third, "now") == []
    # Too few seeds at one depth.
    short = {**settings, 400: {"now": GOOD, "new": SAME[:2]}}
    assert new_defaults(short, "now") == []


def test_the_rule_is_noted_once(tmp_path):
    path = tmp_path / "out" / "rule.json"
    first = note_rule(path)
    assert first["sha256"] == rule_sha256()
    assert note_rule(path) == first
