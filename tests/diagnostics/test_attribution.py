from __future__ import annotations

import math
from typing import Any

import pytest

from mvsplit.diagnostics.attribution import (
    Conclusion,
    ModeSplit,
    Sample,
    Trial,
    calm_norm,
    conclude,
    removed_share,
)

NAN, INF = math.nan, math.inf
SPLIT = ModeSplit(writer="W_O", layer=7, g_mean=12.0, g_ctr=0.5)


def conclusion(
    norms: dict[str, float], *, calm: float | None = 1.0, unusual: float = 1.0, **changes: Any
) -> Conclusion:
    trials = [
        Trial(name=n, label=n, loss=1.0, grad_norm=norm, writer_attn=0.0, writer_ffn=0.0)
        for n, norm in norms.items()
    ]
    dropped = [Sample(row=2, index=91, loss=8.0, unusual=unusual)]
    given = {"reproduced": True, "dropped": dropped, "split": SPLIT, **changes}
    return conclude(trials, calm=calm, **given)


@pytest.mark.parametrize(
    ("trial", "share"),
    [(100.0, 0.0), (10.0, 0.5), (1.0, 1.0), (0.1, 1.0), (1000.0, 0.0), (NAN, 0.0), (INF, 0.0)],
)
def test_the_share_of_a_spike_is_logarithmic(trial: float, share: float) -> None:
    assert removed_share(100.0, trial, calm=1.0) == pytest.approx(share)


def test_any_finite_norm_removes_one_that_is_not() -> None:
    assert removed_share(NAN, 1e9, calm=None) == 1
    assert removed_share(INF, NAN, calm=1.0) == 0


def test_no_spike_has_no_share() -> None:
    assert removed_share(1.9, 1.0, calm=1.0) is None
    assert removed_share(1.9, 1.0, calm=None) is None


def test_the_calm_norm_is_the_median_of_what_is_finite() -> None:
    assert calm_norm([1.0, NAN, 3.0, INF, 100.0]) == 3.0
    assert calm_norm([NAN]) is None


@pytest.mark.parametrize(
    ("others", "unusual", "verdict", "removed_by"),
    [
        ({"centered-both": 1.0}, 1.0, "mean-mode", ("centered-both",)),
        ({"centered-attn": 1.0, "centered-both": 1.0}, 1.0, "mean-mode", None),
        ({"without-samples": 1.0, "fp32": 90.0}, 1.0, "data-outlier", ("without-samples",)),
        ({"without-samples": 1.0, "centered-attn": 1.0}, 50.0, "data-outlier", None),
        (
            {"without-samples": 1.0, "centered-attn": 1.0},
            2.0,
            "mean-mode",
            ("centered-attn", "without-samples"),
        ),
        ({"fp32": 1.0, "centered-attn": 1.0}, 1.0, "precision", ("fp32", "centered-attn")),
        ({"without-samples": 60.0, "fp32": 50.0, "centered-both": 40.0}, 9.0, "unexplained", ()),
    ],
)
def test_the_narrowest_cause_is_named(
    others: dict[str, float], unusual: float, verdict: str, removed_by: tuple[str, ...] | None
) -> None:
    found = conclusion({"as-it-was": 100.0, **others}, unusual=unusual)
    assert found.verdict == verdict
    assert found.removed_by == (tuple(others) if removed_by is None else removed_by)


def test_sentences_carry_the_numbers() -> None:
    found = conclusion({"as-it-was": 100.0, "centered-ffn": 1.5}, calm=2.0)
    assert found.sentences[0] == (
        "With MV-Split on the FFN (the mean adjoint shut off), the gradient norm 100 (50 times the "
        "2 of the steps before) falls to 1.5."
    )
    assert "W_O of layer 7" in found.sentences[1]
    assert "G_mean 12 against G_ctr 0.5: its mean part" in found.sentences[1]
    named = conclusion({"as-it-was": INF, "without-samples": 1.5}, calm=None, unusual=INF)
    assert "sample 91 (row 2 of the batch" in named.sentences[0]


def test_what_removes_a_part_of_the_spike_is_said_with_that_part() -> None:
    norms = {"as-it-was": 100.0, "centered-attn": 60.0, "centered-both": 100**0.43}
    found = conclusion(norms)
    assert (found.verdict, found.removed_by) == ("unexplained", ())
    assert found.sentences[0] == (
        "Nothing that was tried removes the spike. With MV-Split on attention and the FFN (the "
        "mean adjoint shut off), the gradient norm 100 (100 times the 1 of the steps before) falls "
        "to 7.24 at best: 57% of it on a logarithmic scale, where 75% would name a cause."
    )


@pytest.mark.parametrize("norm", [100.0, 120.0, NAN])
def test_where_nothing_is_removed_nothing_is_said_of_where_it_lies(norm: float) -> None:
    found = conclusion({"as-it-was": 100.0, "centered-both": norm})
    assert found.sentences[0] == (
        "Nothing that was tried removes any of the gradient norm 100 (100 times the 1 of the steps "
        "before)."
    )


def test_what_was_not_reproduced_is_not_explained() -> None:
    norms = {"as-it-was": 100.0, "centered-both": 1.0}
    assert conclusion(norms, reproduced=False).verdict == "not-reproduced"


@pytest.mark.parametrize("calm", [None, 0.0, 60.0])
def test_no_spike_is_said(calm: float | None) -> None:
    found = conclusion({"as-it-was": 100.0, "centered-both": 1.0}, calm=calm)
    assert (found.verdict, found.removed_by) == ("no-spike", ())
    assert "Nothing to explain" in found.sentences[0]


def test_of_gradients_that_stay_not_finite_nothing_is_said_to_dominate() -> None:
    nothing = ModeSplit(writer="W_2", layer=3, g_mean=0.0, g_ctr=0.0)
    found = conclusion({"as-it-was": NAN, "centered-both": NAN}, split=nothing)
    assert found.verdict == "unexplained"
    assert found.sentences == ("Nothing that was tried makes the gradient norm finite.",)
