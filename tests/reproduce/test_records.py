"""The kept results against themselves: figures that came later, and what the claims say of them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvsplit.reproduce import CLAIMS, get_claim
from mvsplit.reproduce.claim import POINTS
from mvsplit.reproduce.claims_gradients import ENTRY_GAP
from mvsplit.reproduce.claims_runs import FINELY, SETTLED
from mvsplit.reproduce.understood import joined

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
    of_modes = {row["run"]: row["seconds"] for row in modes["runs"]}
    same = of_modes.items() <= {(row["run"], row["seconds"]) for row in delayed["runs"]}
    assert same or size == "small", "nothing below would be checked"
    jump = delayed["runs"][0]["jump"]
    for seed, looks in similarities(size).items():
        apart = [step for step, similarity in looks if similarity < 0.95]
        settled = min(step for step, _ in looks if step > apart[-1])
        found = {name: figure["values"][seed] for name, figure in delayed["figures"].items()}
        assert found[SETTLED] == settled - jump
        assert found[FINELY] == settled - apart[-1]
        if not same:  # one of them has been run again, and may have gone another way
            continue
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
    words = joined(get_claim("front").passages)
    lines = result["panels"][0]["lines"]
    first = [line["y"][0] for line in lines if line["label"] == "standard writers"]
    assert f"from layer {first[0]:.0f} of 128 on in seed 0, from layer {first[1]:.0f} in" in words
    assert lines[0]["x"][0] == 1


def by_seed(claim: str, size: str, figure: str) -> list[float]:
    return [*stored(claim, size)["figures"][figure]["values"].values()]


def span(above: list[float], under: list[float] | None = None) -> str:
    """The least and the most of ratios by seed, as words have them."""
    ratios = [a / b for a, b in zip(above, under or [1.0] * len(above), strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f} times"


def test_what_is_said_of_beta_at_the_gpu_size_is_in_the_results():
    one, low = (
        by_seed("collapse", "gpu", f"{n}: end loss") for n in ("MV-Split", "plain, low rate")
    )
    deep = by_seed("collapse", "gpu", "MV-Split, small beta: end loss")
    assert f"{span(one, deep)} the loss of β = 1/√L" in joined(get_claim("collapse").passages)
    words = joined(get_claim("order").passages)
    best = by_seed("order", "gpu", "best LayerScale over MV-Split")
    assert f"{span(best)[:-6]} of its loss, and half way" in words
    half = by_seed("order", "gpu", "plain at the low rate over MV-Split, half way")
    assert f"has {span(half)} its loss" in words
    rivals = [a * b for a, b in zip(best, one, strict=True)]
    assert f"at {span(deep, rivals)[:-6]} of its loss: again" in words
    words = joined(get_claim("controls").passages)
    for size in ("small", "gpu"):
        alone = by_seed("controls", size, "attention only: end loss")
        with_both = by_seed("collapse", size, "MV-Split: end loss")
        assert span(alone, with_both) in words
    assert max(low) < 0.8


def test_what_is_said_of_the_plain_network_that_survives_is_in_its_plot():
    result = stored("collapse", "gpu")
    assert by_seed("collapse", "gpu", "plain: lives") == [0, 0, 1]
    lines = [line for line in result["panels"][0]["lines"] if line["label"] == "plain"]
    steps, loss = (np.array(lines[2][axis], float) for axis in "xy")
    found = [loss[(steps > end - 20) & (steps <= end)].mean() for end in (60, 200, 300)]
    words = joined(get_claim("collapse").passages)
    assert "below 0.8 of the floor by step 60, hardly better 140 steps later" in words
    assert found[0] < 0.8
    assert found[1] == pytest.approx(found[0], rel=0.05)
    (last,) = re.findall(r"near ([\d.]+) in the last twenty", words)
    assert found[2] == pytest.approx(float(last), abs=0.01)


def test_what_is_said_of_the_front_at_the_gpu_size_is_in_its_plot():
    words = joined(get_claim("front").passages)
    lines = stored("front", "gpu")["panels"][0]["lines"]
    ends = [
        [line["y"][i] for line in lines if line["label"] == "standard writers"] for i in (0, -1)
    ]
    first, last = ("{:.0f}, {:.0f} and {:.0f}".format(*layers) for layers in ends)
    assert f"from layer {first} on, by seed, and in the last look from {last} on" in words
    assert lines[0]["x"][0] == 5
