"""Which run comes next, on rows made by hand."""

import pytest

from mvsplit.errors import UserError
from mvsplit.reproduce.depth.order import best_rate, beyond, in_order
from mvsplit.reproduce.depth.plan import ENTRIES, GPU, grid_rate, neighbour, share
from mvsplit.residuals import RULES
from tests.reproduce.depth.tiny import TINY, entry, row

RATES = TINY.rates


def names(rows, entries=("mvsplit-root",)):
    return [run.name for run in in_order(TINY, [entry(n) for n in entries], rows)]


def swept(depth, losses, **fields):
    """A sweep with one seed; a loss of None is dead."""
    pairs = zip(RATES, losses, strict=True)
    return [row(rate, loss, depth=depth, **fields) for rate, loss in pairs]


def test_every_rule_of_the_registry_is_compared():
    assert {e.rule(400).name for e in ENTRIES} == set(RULES)


def test_shapes_of_the_depth_against_width_table_have_equally_many_parameters():
    assert len({depth * width**2 for depth, width in GPU.shapes}) == 1


def test_the_sweep_comes_first_the_middle_rate_and_the_shallowest_before_others():
    first = names([])
    assert first == [
        f"mvsplit-root-{depth}x16-lr{rate:.1e}-seed0"
        for rates in ([3.2e-3], [1e-3, 1e-2])
        for depth in (2, 3)
        for rate in rates
    ]


def test_what_has_a_row_is_not_wanted_again():
    rows = [row(3.2e-3, 0.5, depth=3)]
    assert rows[0]["run"] not in names(rows)
    assert len(names(rows)) == len(names([])) - 1


def test_seeds_follow_at_the_best_rate_and_then_the_last_depth_around_it():
    rows = swept(2, [0.6, 0.5, 0.7]) + swept(3, [0.6, 0.5, None])
    wanted = names(rows)
    assert wanted[:4] == [
        f"mvsplit-root-{depth}x16-lr3.2e-03-seed{seed}" for seed in (1, 2) for depth in (2, 3)
    ]
    last = [name for name in wanted if "-4x16-" in name]
    assert sorted(last) == [
        f"mvsplit-root-4x16-lr{rate:.1e}-seed0" for rate in (1e-2, 1e-3, 3.2e-3)
    ]
    assert wanted.index(last[0]) == 4  # at once after the seeds
    neighbours = [name for name in wanted if "-2x16-" in name and "3.2e-03" not in name]
    assert {wanted.index(name) for name in neighbours} <= set(range(7, len(wanted)))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.4, 0.5, 0.6], [3.2e-4]),
        ([0.6, 0.5, 0.4], [3.2e-2]),
        ([0.6, 0.4, 0.5], []),
        ([None, None, None], [3.2e-4]),
        ([None, None, 0.5], [3.2e-2]),
    ],
)
def test_a_sweep_goes_on_where_its_best_rate_lies_at_an_end(losses, expected):
    assert beyond(RATES, swept(2, losses)) == expected


def test_a_sweep_ends_two_rates_beyond_its_end():
    rows = [*swept(2, [0.6, 0.5, 0.4]), row(3.2e-2, 0.3)]
    assert beyond(RATES, rows) == [1e-1]
    assert beyond(RATES, [*rows, row(1e-1, 0.2)]) == []


def test_nothing_is_carried_on_before_the_whole_sweep_is_there():
    assert beyond(RATES, swept(2, [0.4, 0.5, 0.6])[:2]) == []


def test_the_best_rate_is_a_mean_over_seeds_of_which_each_lives():
    one = [row(1e-3, 0.50), row(3.2e-3, 0.40)]
    assert best_rate(one) == 3.2e-3
    # More seeds of the worse one: it is what is known best.
    more = [*one, row(1e-3, 0.52, seed=1)]
    assert best_rate(more) == 1e-3
    # A dead seed excludes a rate.
    assert best_rate([*one, row(3.2e-3, None, seed=1)]) == 1e-3
    assert best_rate([row(1e-3, None)]) is None
    assert best_rate([]) is None


def test_rates_lie_on_a_grid_of_half_decades():
    assert [grid_rate(k) for k in (-8, -7, -6, -5, -4)] == [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2]
    assert neighbour(3.2e-3, 1) == 1e-2
    assert neighbour(3.2e-3, -2) == 3.2e-4


def test_parts_share_the_entries_whole_and_each_once():
    parts = [share([*ENTRIES], k, 3) for k in range(3)]
    assert sorted(e.name for part in parts for e in part) == sorted(e.name for e in ENTRIES)
    assert {len(part) for part in parts} == {4}
    # The same for the same names, in whatever order they are given.
    backwards = [e.name for e in share([*reversed(ENTRIES)], 1, 3)]
    assert sorted(backwards) == sorted(e.name for e in parts[1])
    with pytest.raises(UserError, match="part=3/3"):
        share([*ENTRIES], 3, 3)
