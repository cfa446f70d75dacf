"""Depth × step maps from probe lines of every kind."""

from __future__ import annotations

import numpy as np

from mvsplit.diagnostics.report_layers import LayerMapsBuilder

NAN, INF = np.nan, np.inf


def built(*records, most=1000):
    builder = LayerMapsBuilder(most)
    for record in records:
        builder.add(record)
    return builder, builder.build()


def test_layers_are_counted_from_zero_where_a_line_names_none():
    _, maps = built({"step": 5, "tcs": [0.5, 0.25]}, {"step": 0, "tcs": [0.125, 1]})
    np.testing.assert_array_equal(maps["tcs"].steps, [0, 5])
    np.testing.assert_array_equal(maps["tcs"].values, [[0.125, 0.5], [1.0, 0.25]])


def test_named_layers_leave_the_others_unmeasured():
    _, maps = built({"step": 0, "layer": [3, 1], "rho": [3.0, 1.0]})
    np.testing.assert_array_equal(maps["rho"].values, [[NAN], [1.0], [NAN], [3.0]])


def test_not_measured_is_not_the_same_as_not_finite():
    _, maps = built({"step": 0, "rho": [None, NAN, -INF, 1e300, 2.0]})
    np.testing.assert_array_equal(maps["rho"].values[:, 0], [NAN, INF, INF, INF, 2.0])
    _, maps = built({"step": 0, "rho": [NAN, INF, 1e300, 2.0]})  # all of them floats
    np.testing.assert_array_equal(maps["rho"].values[:, 0], [INF, INF, INF, 2.0])


def test_a_field_that_was_measured_nowhere_is_no_map():
    _, maps = built({"step": 0, "rho": [None, None], "tcs": [0.5, None]})
    assert set(maps) == {"tcs"}


def test_fields_keep_their_own_cadence():
    lines = [{"step": s, "tcs": [0.5]} | ({"rho": [1.0]} if s % 4 == 0 else {}) for s in range(8)]
    _, maps = built(*lines)
    np.testing.assert_array_equal(maps["tcs"].steps, np.arange(8))
    np.testing.assert_array_equal(maps["rho"].steps, [0, 4])


def test_the_later_probe_of_a_step_wins():
    _, maps = built({"step": 2, "tcs": [0.5]}, {"step": 3, "tcs": [0.5]}, {"step": 2, "tcs": [1.0]})
    np.testing.assert_array_equal(maps["tcs"].values, [[1.0, 0.5]])


def test_arrays_that_do_not_fit_are_left_out_and_counted():
    builder, maps = built(
        {"step": 0, "layer": [0, 1], "tcs": [0.5], "rho": [1.0, 2.0]},
        {"step": 1, "layer": [0, -1], "rho": [1.0, 2.0]},
        {"step": 2, "layer": "all", "rho": [1.0]},
        {"step": 3, "layer": [0], "rho": 4.0, "note": "x", "tcs": []},
    )
    assert builder.unfit == 3
    assert set(maps) == {"rho"}
    np.testing.assert_array_equal(maps["rho"].steps, [0])


def test_a_depth_that_changes_makes_the_deepest_map():
    _, maps = built({"step": 0, "tcs": [0.5]}, {"step": 1, "tcs": [0.25, 1.0]})
    np.testing.assert_array_equal(maps["tcs"].values, [[0.5, 0.25], [NAN, 1.0]])


def test_many_probes_are_thinned_evenly_to_the_last_of_each_stretch():
    builder, maps = built(*({"step": s, "tcs": [float(s)]} for s in range(1000)), most=100)
    assert builder.thinned
    steps = maps["tcs"].steps
    assert 50 < len(steps) <= 100
    assert steps[-1] == 999
    assert set(np.diff(steps[:-1])) == {16}
    np.testing.assert_array_equal(maps["tcs"].values[0], steps)
