"""Runs on two GPUs, by NCCL: those of one, to the order of summation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvsplit.models import DiTConfig
from mvsplit.training import Experiment, train
from mvsplit.training.config import ParallelConfig
from tests.training import ranks, runs

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# As wide as the kernels of the one-node block need, and deep enough that losses depend on them.
MODEL: DiTConfig = replace(runs.MODEL, depth=4, width=128, heads=2, ffn_width=256)


def run(folder: Path, steps: int, layout: str, changes: dict[str, str]) -> None:
    parallel = ParallelConfig(layout=layout, unit=2, timeout=60)  # type: ignore[arg-type]
    common = {"device": "cuda", "eps": 1e-5, "batch_size": 32, "lr": 1e-3, "keep": 9}
    settings = replace(runs.TRAIN, steps=steps, parallel=parallel, **common, **changes)
    train(Experiment(model=MODEL, train=settings), folder)


@pytest.mark.parametrize(
    ("layout", "changes", "close"),
    [
        ("replicate", {}, 1e-4),
        ("shard", {}, 1e-4),
        ("replicate", {"precision": "bf16"}, 0.02),
        ("shard", {"precision": "bf16"}, 0.02),
        ("replicate", {"precision": "bf16", "weights": "bf16"}, 0.03),
    ],
)
def test_two_gpus_are_as_one_and_go_on_alone(
    tmp_path: Path, layout: str, changes: dict[str, str], close: float
) -> None:
    ranks.call(run, 1, tmp_path / "one", 8, layout, changes)
    ranks.call(run, 2, tmp_path / "two", 6, layout, changes)
    ranks.call(run, 1, tmp_path / "two", 8, layout, changes)
    ours, theirs = (runs.log_of(tmp_path / name) for name in ("two", "one"))
    assert [line["step"] for line in ours] == list(range(1, 9))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=close)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * close)
