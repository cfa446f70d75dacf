"""Small runs for the tests of training, and what two runs must have in common to be equal."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import Experiment, TrainConfig, train
from mvsplit.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    load_latest,
    read_checkpoint,
)

# A server that has imported everything once; its children start in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["mvsplit.cli.train", "sklearn.datasets", "torch._dynamo", "tests.training.runs"]
)

MODEL = DiTConfig(
    depth=2,
    width=16,
    heads=2,
    ffn_width=24,
    channels=1,
    patch=4,
    text_width=16,
    rule=RuleConfig(name="mvsplit"),
)
TRAIN = TrainConfig(
    steps=8, batch_size=8, lr=1e-2, warmup=3, ema_decay=0.9, save_every=3, keep=2, probe_every=2
)
TIMES = ("seconds", "tokens_per_second")


def experiment(**changes: Any) -> Experiment:
    """Two layers on the digits; `changes` are fields of the training."""
    return Experiment(model=MODEL, train=replace(TRAIN, **changes))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in m.items() if k not in TIMES} for m in lines(run / "metrics.jsonl")]


def assert_same_run(left: Path, right: Path) -> None:
    """Bit for bit: the newest checkpoint (weights, average, moments, data position, every random
    state), the metrics and the layers."""
    a, b = (read_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (left, right))
    assert a.step == b.step
    assert a.values == b.values
    assert a.tensors.keys() == b.tensors.keys() >= {"model", "ema", "optimizer", "random"}
    for name in a.tensors:
        assert a.tensors[name].keys() == b.tensors[name].keys()
        for key, tensor in a.tensors[name].items():
            assert torch.equal(tensor, b.tensors[name][key]), (name, key)
    assert log_of(left) == log_of(right)
    assert lines(left / "layers.jsonl") == lines(right / "layers.jsonl")


def last(run: Path) -> Snapshot:
    """The newest checkpoint of a run, none of which may be damaged."""
    snapshot, damaged = load_latest(run / "checkpoints")
    assert snapshot is not None
    assert not damaged
    return snapshot


def assert_same_weights(ours: Snapshot, theirs: Snapshot) -> None:
    """Weights, average, both moments: as close as another order of summation leaves them."""
    assert ours.step == theirs.step
    for name in ("model", "ema", "optimizer"):
        a, b = ours.tensors[name], theirs.tensors[name]
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=2e-4, atol=2e-6)
    assert ours.values["data"] == theirs.values["data"]
    assert ours.values["updates"] == theirs.values["updates"]


def run_until(run: Path, crash_at: int | None) -> None:
    """Trains in this process; before its `crash_at`-th change of the disk it dies by kill −9."""
    torch.set_num_threads(1)
    if crash_at is not None:
        _crash_before_change(crash_at)
    train(experiment(), run)


def _crash_before_change(number: int) -> None:
    left = number

    def counted(change: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "rename"), (shutil, "rmtree")):
        setattr(owner, name, counted(getattr(owner, name)))


def run_command(arguments: list[str]) -> None:
    """`mvsplit ARGUMENTS` in this process, which ends with the command's exit status."""
    from mvsplit.cli import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))
