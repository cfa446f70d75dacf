"""In any order of events no role of the merge in clusters waits in vain or reads too soon."""

import random

import pytest

from tests.kernels.cluster_protocol import Broken, Cluster, Cut

CUTS = [  # smaller than the kernels' own, of the same kinds
    Cut(slots=5, kept=5, rows=4, appliers=4),
    Cut(slots=5, kept=4, rows=4, appliers=4, preload=False),
    Cut(slots=5, kept=5, rows=2, appliers=4),
    Cut(slots=4, kept=4, rows=4, appliers=8),
    Cut(slots=8, kept=7, rows=2, appliers=8),
    Cut(slots=4, kept=4, rows=4, appliers=8, backward=True),
    Cut(slots=6, kept=5, rows=2, appliers=8, backward=True, f_slots=4),
    Cut(slots=5, kept=4, rows=4, appliers=4, backward=True, preload=False),
]


def rows_of_units(cut: Cut, seed: int) -> list[int]:
    """None, few, as many as fit, and several times as many."""
    choose = random.Random(seed)
    fit = cut.rows * cut.kept
    kinds = (0, 1, cut.rows + 1, fit, fit + 3, cut.rows * (3 * cut.slots) + 1)
    return [choose.choice(kinds) for _ in range(choose.randrange(2, 8))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_order_of_events_ends(cut):
    play_all(cut)


def play_all(cut: Cut) -> None:
    for seed in range(25):
        Cluster(cut, rows_of_units(cut, seed), seed).play()


def test_a_wait_for_slots_that_others_free_is_found_out():
    """A slow warp then finds a slot filled anew, and waits for a phase that is past."""
    with pytest.raises(Broken):
        play_all(Cut(slots=5, kept=5, rows=2, appliers=4, in_order=True))
