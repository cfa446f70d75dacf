"""Curves of bounded length against buckets filled by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mvsplit.diagnostics.report_series import SeriesBuilder, SeriesTable


def built(steps, values, most):
    builder = SeriesBuilder(most)
    for step, value in zip(steps, values, strict=True):
        builder.add(int(step), float(value))
    return builder.build()


def test_a_short_curve_is_every_line_in_the_order_of_steps():
    series = built([30, 10, 20], [3.0, 1.0, 2.0], most=10)
    assert series.stride == 1
    np.testing.assert_array_equal(series.step, [10, 20, 30])
    for values in (series.low, series.mean, series.high):
        np.testing.assert_array_equal(values, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("spacing", [1, 7])
def test_a_long_curve_agrees_with_buckets_filled_by_hand(spacing):
    rng = np.random.default_rng(0)
    steps = rng.permutation(20_000) * spacing  # more than are merged at once
    values = rng.lognormal(size=len(steps))
    values[rng.integers(0, len(steps), 40)] = np.nan
    values[rng.integers(0, len(steps), 40)] = -np.inf
    series = built(steps, values, most=100)

    assert 50 < len(series.step) <= 100
    for i, bucket in enumerate(np.unique(steps // series.stride)):
        inside = values[steps // series.stride == bucket]
        finite = inside[np.isfinite(inside)]
        assert series.step[i] == steps[steps // series.stride == bucket].min()
        assert (series.low[i], series.high[i]) == (finite.min(), finite.max())
        assert series.mean[i] == pytest.approx(finite.mean(), rel=1e-12)
        assert series.broken[i] == len(inside) - len(finite)


def test_a_spike_of_one_step_in_many_is_kept():
    values = np.ones(50_000)
    values[31_234] = 77.0
    series = built(np.arange(len(values)), values, most=64)
    spike = int(np.argmax(series.high))
    assert series.high[spike] == 77.0
    assert series.step[spike] <= 31_234 < series.step[spike] + series.stride


def test_a_point_without_a_finite_value_is_unknown_and_counted():
    series = built([1, 2], [np.nan, 5.0], most=10)
    np.testing.assert_array_equal(series.mean, [np.nan, 5.0])
    np.testing.assert_array_equal(series.broken, [1, 0])


def test_every_numeric_field_at_its_own_cadence():
    table = SeriesTable()
    table.add({"step": 0, "loss": 1, "name": "a", "flag": True, "array": [1.0]})
    table.add({"step": 1, "loss": 2.0})
    table.add({"step": 2, "probe": 0.5})
    series = table.build()
    assert set(series) == {"loss", "probe"}
    np.testing.assert_array_equal(series["loss"].step, [0, 1])
    np.testing.assert_array_equal(series["probe"].step, [2])
