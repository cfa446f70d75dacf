"""What claims say of their runs at the GPU size, against the kept results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvsplit.reproduce import get_claim
from mvsplit.reproduce.claims_runs import SETTLED
from mvsplit.reproduce.page import summary
from mvsplit.reproduce.reruns import OTHERS
from mvsplit.reproduce.understood import joined

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "experiments"
LOOKS = json.loads(
    (ROOT / "benchmarks" / "results" / "jump_looks_h200_2026-11-30.json").read_text("utf-8")
)["runs"].values()
BEFORE, WINDOW = 40, 40  # steps before the rise, and after it, of the rule of `modes`
Array = np.ndarray[Any, np.dtype[np.float64]]


def stored(claim: str, size: str = "gpu") -> dict[str, Any]:
    path = PAGES / "results" / f"{claim}-{size}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def by_seed(claim: str, figure: str, size: str = "gpu") -> list[float]:
    return [*stored(claim, size)["figures"][figure]["values"].values()]


def words_of(claim: str) -> str:
    return joined(get_claim(claim).passages)


def span(values: list[float], form: str = ".3g") -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def lines(claim: str, panel: int, label: str, size: str = "gpu") -> list[tuple[Array, Array]]:
    """Steps and values of each seed in a plot."""
    found = stored(claim, size)["panels"][panel]["lines"]
    return [
        (np.array(line["x"], float), np.array(line["y"], float))
        for line in found
        if line["label"] == label
    ]


def medians_before(claim: str, panel: int, label: str, size: str) -> list[float]:
    jump = stored(claim, size)["runs"][0]["jump"]
    found = lines(claim, panel, label, size)
    return [float(np.median(y[(x > jump - BEFORE) & (x <= jump)])) for x, y in found]


def ratios(above: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, under, strict=True)]


def of_writer(name: str, field: str) -> list[list[Any]]:
    """By seed, the steps and values of the looks after the rise."""
    return [
        [(look["step"], look[name][field]) for look in run["looks"] if look["step"] > run["jump"]]
        for run in LOOKS
    ]


def test_how_often_the_runs_were_taken_and_where_tokens_became_alike():
    words = words_of("modes")
    jump = stored("delayed")["runs"][0]["jump"]
    first = stored("delayed")[OTHERS][0]["values"][SETTLED].values()
    now = [jump + steps for steps in by_seed("delayed", SETTLED)]
    assert now == [run["settled"] for run in LOOKS]
    places = [[jump + s for s in first], [run["beside"]["settled"] for run in LOOKS], now]
    first, second, third = ("{:.0f}, {:.0f} and {:.0f}".format(*steps) for steps in places)
    assert (
        f"step {first} on in the first, by seed, from {second} in the second, from {third} in"
        in (words)
    )
    assert [run["beside"]["same_losses"] for run in LOOKS] == [240, 240, 5]
    assert {run["beside"]["steps"] for run in LOOKS} == {240}
    index = " ".join((PAGES / "README.md").read_text(encoding="utf-8").split())
    assert "on two machines of one kind some are the same to the bit and some are not" in index
    assert (
        "same loss to the bit in all 240 steps that they share, seed 2 in the first five" in words
    )
    # With the same losses the same figures, as the record before has them.
    before = stored("modes")[OTHERS][-1]["values"]["W_O: rise of G_ctr"]
    same = [
        a == b for a, b in zip(before.values(), by_seed("modes", "W_O: rise of G_ctr"), strict=True)
    ]
    assert same == [True, True, False]


def test_of_the_two_seeds_that_go_in_late():
    words = words_of("modes")
    jump = stored("modes")["runs"][0]["jump"]
    floor, settled = (by_seed("delayed", name) for name in ("plain: steps to the floor", SETTLED))
    assert f"at 0.9 of its floor {floor[0]:.0f} and {floor[1]:.0f} steps after the rise" in words
    assert f"until {settled[0]:.0f} and {settled[1]:.0f} steps after it" in words
    peaks = [
        max((look for look in run["looks"] if look["step"] > jump), key=lambda k: k["W_O"]["g_ctr"])
        for run in LOOKS
    ][:2]
    rises = by_seed("modes", "W_O: rise of G_ctr")
    share, apart = (
        [peak["W_O"]["ctr_by_quarter"][0] for peak in peaks],
        [peak["similarity_by_quarter"][0] for peak in peaks],
    )
    assert {f"{each:.2f}" for each in share} == {"0.91"}
    assert f"{rises[0]:.0f} and {rises[1]:.0f} times its median in W_O, 0.91 of its square" in words
    assert f"at a similarity of {apart[0]:.2f} and {apart[1]:.2f}" in words
    for part, fall in (("mean", (5, 50)), ("centered", (2e3, 1e5))):
        for (x, y), steps in list(zip(lines("modes", 0, part), settled, strict=True))[:2]:
            entry = jump + steps
            assert fall[0] < y[x < entry][-1] / y[x == entry][0] < fall[1]
            # Nothing larger after the steps in which the rule looks for a peak.
            window = (x > jump) & (x <= jump + WINDOW)
            assert y[x > jump].max() == y[window].max()


def test_of_the_seed_with_the_spike_of_the_paper():
    words = words_of("modes")
    jump = stored("modes")["runs"][0]["jump"]
    run = [*LOOKS][2]
    spike = max(run["looks"], key=lambda look: look["W_O"]["g_mean"])
    assert (run["settled"] - jump, spike["step"] - run["settled"]) == (6, 5)
    assert f"and {spike['alike']} of the 400 layers have their tokens alike" in words
    rises = [by_seed("modes", f"{writer}: rise of G_mean")[2] for writer in ("W_O", "W_2")]
    assert f"G_mean is {rises[0]:.0f} and {rises[1]:.0f} times its median in W_O and W_2" in words
    for panel in (0, 1):
        (x, y), base = (
            lines("modes", panel, "centered")[2],
            medians_before("modes", panel, "centered", "gpu")[2],
        )
        assert y[x == spike["step"]][0] < base / 3
        (x, y), base = (
            lines("modes", panel, "mean")[2],
            medians_before("modes", panel, "mean", "gpu")[2],
        )
        beside = np.flatnonzero(x == spike["step"])[0] + np.array([-1, 1])
        assert (y[beside] < 5 * base).all()  # a single step
    excess, envelope = (spike["W_O"][f"{name}_alike"] for name in ("excess", "envelope"))
    assert f"{excess:.1f}" == f"{envelope:.1f}" == "66.4"
    assert "A − 1 is 66.4 in the layers with tokens alike, and so is the envelope" in (
        words_of("alignment")
    )
    assert "At the spike of seed 2 both are 66" in words_of("alignment-entry")


def test_the_mean_part_is_large_before_the_rise_at_the_gpu_size_alone():
    for size, form, said in (("gpu", ".1f", "7.3 to 9.3"), ("small", ".1f", "0.8 to 0.9")):
        mean, centered = (medians_before("modes", 0, part, size) for part in ("mean", "centered"))
        assert span(ratios(mean, centered), form) == said
        for claim in ("modes", "alignment-entry"):
            assert f"{said} times" in words_of(claim)
    before = [[look["W_O"] for look in run["looks"] if look["step"] <= 160] for run in LOOKS]
    excess, envelope = (
        [float(np.median([look[name] for look in looks])) for looks in before]
        for name in ("excess", "envelope")
    )
    words = f"A − 1 is {span(excess, '.2g')}, of an envelope of {span(envelope, '.2g')}"
    assert words in words_of("alignment-entry")


def test_of_the_envelope_at_the_entry():
    words = words_of("alignment-entry")
    peak, before = "A − 1 over the envelope at the peak", "|A − 1| over the envelope before"
    assert f"at {span(by_seed('alignment-entry', f'W_O: {peak}'), '.2f')} of the envelope" in words
    there = span(by_seed("alignment-entry", f"W_O: {before}"), ".2f")
    small = span(by_seed("alignment-entry", f"W_O: {before}", "small"), ".2f")
    assert f"it is at {there}, where the small size has {small}" in words


def test_of_the_envelope_long_after():
    words = words_of("alignment")
    late = [
        [(look["W_O"]["excess_alike"], look["W_O"]["envelope_alike"]) for look in run["looks"]
         if look["step"] > 0.8 * 320]
        for run in LOOKS
    ]  # fmt: skip
    assert {len(looks) for looks in late} == {4}
    excess, envelope = ([[pair[i] for pair in looks] for looks in late] for i in (0, 1))
    minus = span(excess[0], ".2g").replace("-", "−").replace("−1 ", "−1.0 ")
    assert f"seed 0 has {minus} there" in words
    assert (
        f"seed 1 has {span(excess[1], '.2g')}, of envelopes of {span(envelope[1], '.2g')}" in words
    )
    assert f"seed 2 has {span(excess[2], '.2g')}, of {span(envelope[2], '.2g')}" in words


def test_of_the_fall_of_queries_and_keys():
    words = words_of("extinction")
    result = stored("extinction")
    names = ("fall of queries", "fall of keys")
    before = [v for each in result[OTHERS] for name in names for v in each["values"][name].values()]
    now = [value for name in names for value in by_seed("extinction", name)]
    assert len(result[OTHERS]) == 2
    assert f"fall {span(before, '.0f')} times within 240 steps" in words
    assert f"and {span(now, '.0f')} times within 320" in words
    for label in ("W_Q", "W_K", "W_O"):
        for x, y in lines("extinction", 0, label):
            early, late = ((x > end - 20) & (x <= end) for end in (220, 320))
            assert np.median(y[late]) < np.median(y[early])


def test_of_protecting_attention_alone():
    words = words_of("attention-only")
    plain = by_seed("attention-only", "plain: rise of G_mean in W_O")
    assert f"whose W_O rises {plain[0]:.1f} times" in words
    assert plain[0] < 10 <= min(plain[1:])
    alone, both = (
        by_seed(claim, f"{label}: end loss")
        for claim, label in (("attention-only", "attention only"), ("delayed", "MV-Split"))
    )
    assert f"at {span(alone, '.3f')} of the floor in the end" in words
    assert f"MV-Split on both has {span(both, '.3f')} (`delayed`)" in words
    rise = by_seed("attention-only", "attention only: rise of G_mean in W_2")
    assert f"G_mean of W_2 rises {span(rise, '.1f')} times" in words
    peak = "attention only: peak of W_2 over W_O"
    assert f"it is {span(by_seed('attention-only', peak), '.0f')} times that of W_O" in words
    shift = by_seed("attention-only", "attention only over plain: peak of W_2 over W_O")
    assert f"plain network ({span(shift, '.0f')})" in words
    small = by_seed("attention-only", peak, "small")
    assert f"and {span(small, '.2g')} at the peak" in words
    for size in ("gpu", "small"):
        w_o, w_2 = (
            medians_before("attention-only", panel, "attention only, mean", size)
            for panel in (0, 1)
        )
        assert f"{span(ratios(w_2, w_o), '.0f')} times" in words


def test_of_the_time_in_the_states():
    words = words_of("timestep")
    layers = [y for _, y in lines("timestep", 0, "token mean")]
    assert f"R² is {span([r for y in layers for r in y], '.3f')}" in words
    assert f"{span([y[0] for y in layers], '.2f')} in the first" in words
    worst = [int(y.argmin()) + 1 for y in layers]
    assert "{}th, {}th and {}rd, by seed".format(*worst) in words
    assert {f"{v:.2f}" for v in by_seed("timestep", "MV-Split: end loss")} == {"0.17"}
    for size, said in (("gpu", "0.94"), ("small", "0.72")):
        found = {f"{v:.2f}" for v in by_seed("timestep", "input statistics", size)}
        assert found == {said}
    shuffled = by_seed("timestep", "shuffled times")
    assert f"−{-max(shuffled):.2f} to −{-min(shuffled):.2f} where" in words
    assert {f"{v:.2f}" for v in by_seed("timestep", "shuffled times", "small")} == {"-0.02"}
    worst_r2 = by_seed("timestep", "worst layer")
    # By what shuffled times, of which nothing can be known, lose: 1 − R² grows by as much.
    lost = [(1 - r) * -s / (1 - s) for r, s in zip(worst_r2, shuffled, strict=True)]
    assert "some 0.03 more" in words
    assert all(abs(each - 0.03) < 0.006 for each in lost)


def test_of_a_thousand_layers():
    words = words_of("thousand")
    assert by_seed("thousand", "MV-Split: collapsed") == [1, 1, 1]
    losses = [y for _, y in lines("thousand", 0, "MV-Split")]
    # Of the 200 steps the plot has 160, so that eight of its points are ten of them.
    means = [np.convolve(y, np.ones(8) / 8, "valid") for y in losses]
    assert 1.045 < min(each.min() for each in means) < 1.06
    (x, jumps), (first, *_) = lines("thousand", 0, "MV-Split")[1], lines("thousand", 1, "MV-Split")
    before, after = ((x > a) & (x <= a + 10) for a in (150, 160))
    assert f"from {jumps[before].mean():.2f} to {jumps[after].mean():.2f} within twenty" in words
    alike = [y for _, y in lines("thousand", 1, "MV-Split")]
    assert first[0][0] == 100
    assert f"{span([y[0] for y in alike], '.2f')} in the first look, at step 100" in words
    assert f"{alike[1][-1]:.2f}" == "1.00"
    rows = json.loads((PAGES / "results/depth-bench/gpu.json").read_text("utf-8"))["rows"]
    lives = {
        name: [row for row in rows if row["run"].startswith(f"{name}-1000x64-lr")]
        for name in ("mvsplit-root", "standard", "alpha", "alpha-standard")
    }
    learns = {
        name: {row["rate"]: row["lives"] for row in found if row["rate"] <= 1e-3}
        for name, found in lives.items()
    }
    assert learns["mvsplit-root"] == {1e-4: False, 3.2e-4: False, 1e-3: False}
    assert learns["standard"] == {3.2e-4: True, 1e-3: False}
    calm = [r for n in ("alpha", "alpha-standard") for r in lives[n] if r["rate"] <= 3.2e-3]
    assert {(row["rate"], row["lives"]) for row in calm} == {(1e-3, True), (3.2e-3, True)}
    ours, zeros = (
        row for n in ("alpha-standard", "alpha") for row in lives[n] if row["rate"] == 1e-3
    )
    both = f"{ours['validation_loss']:.2f} and {zeros['validation_loss']:.2f}"
    assert f"at this rate to losses of {both}, of a floor of {zeros['floor']:.2f}" in words


def test_the_index_says_what_starts_do_not_learn_at_1000_layers():
    text = summary([stored("thousand", size) for size in ("small", "gpu")])
    loss = "1.11 ± 0.074 (1.07, 1.2, 1.07)"
    assert f"does not learn at `gpu`, at a rate of 0.001: end loss {loss} of the floor" in text
    assert text.count("1000 layers") == 1
    assert "not run" in text  # eleven of the claims are not among these


@pytest.mark.parametrize("size", ["small", "gpu"])
def test_all_claims_have_run(size):
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in index.splitlines() if line.startswith(f"- `{size}`, of 12 claims")]
    assert "not run" not in line
