"""The order of lines, and logs put together."""

from __future__ import annotations

import json

from mvsplit.diagnostics.order import Order
from mvsplit.diagnostics.replay import merged, open_logs


def places(steps, key="loss"):
    order = Order()
    return [order.place({"step": step, key: 1.0}) for step in steps]


def test_rising_and_repeated_newest_steps_follow():
    assert places([1, 2, 2, 7]) == ["next"] * 4


def test_a_straggler_is_late_and_does_not_disturb_those_after_it():
    assert places([1, 2, 4, 3, 5]) == ["next", "next", "next", "late", "next"]


def test_a_step_that_comes_again_is_a_rollback():
    assert places([1, 2, 3, 2, 3, 4]) == ["next", "next", "next", "back", "next", "next"]


def test_a_rollback_between_the_logged_steps_is_known_at_its_second_line():
    assert places([10, 20, 30, 40, 15, 25, 35]) == [*["next"] * 4, "late", "back", "next"]


def test_a_rollback_past_all_that_is_remembered():
    assert places([*range(1000), 3, 4])[-2:] == ["back", "next"]


def test_metrics_and_layers_go_back_together_and_only_once():
    order = Order()
    lines = [
        *({"step": s, "loss": 1.0} for s in (1, 2, 3, 4)),
        {"step": 4, "tcs": [0.1]},
        {"step": 3, "loss": 1.0},
        {"step": 4, "loss": 1.0},
        {"step": 4, "tcs": [0.1]},
    ]
    assert [order.place(line) for line in lines] == [*["next"] * 5, "back", "next", "next"]


def test_logs_are_joined_by_step_and_rollbacks_stand_together(tmp_path):
    metrics = [1, 2, 3, 4, 2, 3, 4, 5]
    layers = [2, 4, 2, 4]
    for name, steps, field in (("a", metrics, "loss"), ("b", layers, "tcs")):
        lines = (json.dumps({"step": step, field: 1}) + "\n" for step in steps)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    logs = open_logs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    found = [(line["step"], "layers" if "tcs" in line else "") for line in merged(logs)]
    first = [(1, ""), (2, ""), (2, "layers"), (3, ""), (4, ""), (4, "layers")]
    second = [(2, ""), (2, "layers"), (3, ""), (4, ""), (4, "layers"), (5, "")]
    assert found == first + second
