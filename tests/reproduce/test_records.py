"""The kept results against themselves: figures that came later, and what the claims say of them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mvsplit.reproduce import CLAIMS, get_claim
from mvsplit.reproduce.claim import POINTS
from mvsplit.reproduce.claims_gradients import ENTRY_GAP
from mvsplit.reproduce.claims_runs import FINELY, SETTLED

RESULTS = Path(__file__).parents[2] / "docs" / "experiments" / "results"


def stored(claim: str, size: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{claim}-{size}.json").read_text(encoding="utf-8"))


def similarities(size: str) -> dict[str, list[tuple[float, float]]]:
    """Looks at the plain networks of `delayed`, by seed: all of them, and not thinned out."""
    result = stored("delayed", size)
    (panel,) = (p for p in result["panels"] if "similarity" in p["title"])
    lines = [line for line in panel["lines"] if line["label"] == "plain"]
    seeds = [str(row["seed"]) for row in result["runs"] if row["label"] == "plain"]
    assert max(len(line["x"]) for line in lines) < POINTS
    pairs = zip(seeds, lines, strict=True)
    return {seed: [*zip(line["x"], line["y"], strict=True)] for seed, line in pairs}


@pytest.mark.parametrize("size", ["small", "gpu"])
def test_figures_of_looks_are_those_of_the_plots(size):
    """Counted here by another way than the measure's."""
    delayed, modes = stored("delayed", size), stored("modes", size)
    jump = delayed["runs"][0]["jump"]
    for seed, looks in similarities(size).items():
        apart = [step for step, similarity in looks if similarity < 0.95]
        settled = min(step for step, _ in looks if step > apart[-1])
        found = {name: figure["values"][seed] for name, figure in delayed["figures"].items()}
        assert found[SETTLED] == settled - jump
        assert found[FINELY] == settled - apart[-1]
        seen = [jump, *(step for step, _ in looks if jump < step <= settled)]
        widest = max(later - step for step, later in pairwise(seen))
        assert modes["figures"][ENTRY_GAP]["values"][seed] == widest
        panel = modes["panels"][0]["lines"]
        assert [step for step, _ in looks] == panel[int(seed)]["x"]


SLOWER = 2.5  # times that a machine, or one shared with others, may be
COST = re.compile(r"(\d+) runs of (?:([\d.]+) to )?([\d.]+) minutes?")


@pytest.mark.parametrize("name", CLAIMS)
def test_a_stated_cost_is_that_of_the_kept_runs_or_says_that_there_is_none(name):
    claim = get_claim(name)
    for size, words in claim.cost.items():
        if not (RESULTS / f"{name}-{size}.json").exists():
            assert "not measured" in words
            continue
        minutes = [row["seconds"] / 60 for row in stored(name, size)["runs"]]
        count, low, high = COST.match(words).groups()
        assert int(count) == len(minutes)
        for found, said in ((min(minutes), float(low or high)), (max(minutes), float(high))):
            assert 1 / SLOWER < found / said < SLOWER


def test_what_is_said_of_the_front_is_in_its_plot():
    """All tokens are alike from some layer on before the first update."""
    result = stored("front", "small")
    words = get_claim("front").afterwards
    lines = result["panels"][0]["lines"]
    first = [line["y"][0] for line in lines if line["label"] == "standard writers"]
    assert f"from layer {first[0]:.0f} of 128 on in seed 0, from layer {first[1]:.0f} in" in words
    assert lines[0]["x"][0] == 1
