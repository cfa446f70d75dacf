"""In any order of events no role of the merge in clusters waits in vain or reads too soon."""

import random
import re
from pathlib import Path

import pytest

from tests.kernels import cluster_protocol
from tests.kernels.cluster_protocol import Broken, Cluster, Cut

CUTS = [  # smaller than the kernels' own, of the same kinds
    Cut(slots=5, rows=4, appliers=4),
    Cut(slots=5, rows=2, appliers=4),
    Cut(slots=4, rows=4, appliers=8),
    Cut(slots=8, rows=2, appliers=8),
    Cut(slots=4, rows=4, appliers=8, backward=True),
    Cut(slots=6, rows=2, appliers=8, backward=True, f_slots=4),
    Cut(slots=5, rows=4, appliers=4, backward=True),
]


def rows_of_units(cut: Cut, seed: int) -> list[int]:
    """None, few, as many as fit, and several times as many."""
    choose = random.Random(seed)
    fit = cut.rows * cut.slots
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
        play_all(Cut(slots=5, rows=2, appliers=4, in_order=True))


def test_arrivals_are_those_of_the_kernels():
    folder = Path(__file__).parents[2] / "mvsplit" / "kernels" / "hopper"
    text = (folder / "merge_common.cu").read_text(encoding="utf-8")
    for name in ("ARRIVALS", "FROM_SUM", "FROM_APPLY"):
        (value,) = re.findall(rf"#define {name} (\d+) ", text)
        assert int(value) == getattr(cluster_protocol, name)
