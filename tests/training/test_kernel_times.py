"""The kernel times of `mvsplit plan` are those of the results, and of the kernels that serve."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.gpus import GPUS
from mvsplit.training.kernel_times import KERNELS
from mvsplit.training.step_time import Shape, step_time

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LOW = TrainConfig(steps=1, batch_size=1, precision="bf16", weights="bf16", ema_decay=0.0)


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def elements(width: int, tokens: int, gpu: str = "h200", config: TrainConfig = LOW) -> float:
    """Seconds of a block's element-wise kernels."""
    model = DiTConfig(
        depth=1, width=width, heads=8, ffn_width=3 * width, channels=32, text_width=1024,
        rule=RuleConfig(name="mvsplit"),
    )  # fmt: skip
    shape = Shape(samples=1, length=tokens, pieces=1)
    return step_time(model, config, shape, ["nothing"], GPUS[gpu]).parts["element-wise kernels"]


def test_constants_of_today_are_those_of_the_results() -> None:
    """Merges by `fused_ops`; two launches, and what is small together, by profiles of a block."""
    late = result("fused_ops_h200_2026-11-29_late_merge.json")["rows"]
    left_out = [16, 1024, 256], [16, 256, 32]  # of long segments; in clusters
    bench = {
        row["shape"][0] * sum(row["shape"][1:]): row["ms"]["ours"]
        for row in late
        if row["shape"] not in left_out
    }
    rows = result("step_classes_h200_2026-11-29_late.json")["rows"]
    for n, name in ((4608, "16 × (256+32 masked), packed"),
                    (8191, "26 × (256+64), nothing, merge without clusters")):  # fmt: skip
        each = rows[name]["by_kernel_us"]
        bench[n] = [
            sum(us for kernel, us in each.items() if f"split_merge_{way}" in kernel) / 2e3
            for way in ("fwd", "bwd")
        ]
    assert {n for n, *_ in KERNELS.merge} == set(bench)
    for n, *seconds in KERNELS.merge:
        assert seconds == pytest.approx([1e-3 * ms for ms in bench[n]], rel=0.01)
    row = rows["26 × (256+64), nothing"]
    kinds = row["by_kind_us"]
    waits = sum(us for kernel, us in row["by_kernel_us"].items() if "split_merge_gains" in kernel)
    small = sum(kinds.values()) - kinds["matrix products"] - kinds["attention"] - waits
    assert elements(1024, 8320) == pytest.approx(1e-6 * small, rel=0.03)


def test_clusters_are_planned_where_they_serve() -> None:
    """As many numbers in another width, in fp32 or on another GPU are merged by other kernels."""
    gain = 2 * sum(b - a for a, b in ((21.6e-6, 32.7e-6), (31.2e-6, 49.7e-6)))
    assert elements(512, 2 * 8320) - elements(1024, 8320) == pytest.approx(gain, rel=0.03)
    a100 = elements(1024, 8320, "a100") * GPUS["a100"].copy / GPUS["h200"].copy
    assert a100 == pytest.approx(elements(512, 2 * 8320))
    fp32 = elements(1024, 8320, config=replace(LOW, precision="fp32", weights="fp32"))
    assert fp32 == pytest.approx(2 * elements(512, 2 * 8320))
