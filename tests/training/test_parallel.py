"""The same run on 1, 2 and 4 processes: the same losses and weights, to the order of summation."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from mvsplit.hub import load_weights, write_weights
from mvsplit.models import DiT
from mvsplit.training import load_run
from mvsplit.training.checkpoint import list_checkpoints
from mvsplit.training.config import ParallelConfig
from mvsplit.training.flight import read_flight
from mvsplit.training.memory_plan import exchange_bytes
from tests.training import ranks, runs

# Sizes that the ranks do not divide: 3 layers in units of 2, a patch of 4·4 values in a head of 10…
# The ε lies above the rounding of the gradients, which AdamW would else make steps of.
SIZES = "--model.depth 3 --model.width 24 --model.ffn-width 20 --model.text-width 10 --batch-size 8"
COURSE = "--lr 1e-2 --eps 1e-5 --warmup 3 --ema-decay 0.9 --probe-every 2 --device cpu"
OPTIONS = f"{SIZES} {COURSE} --parallel.unit 2 --keep 9".split()
STEPS = 6
EVERYWHERE = ["--steps", str(STEPS), "--save-every", "2", *OPTIONS]
SHARD = ["--parallel.layout", "shard"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "two": (2, []),
    "two-in-pieces": (2, ["--accumulate", "3"]),  # of 2, 1 and 1 samples
    "four": (4, []),
    "two-sharded": (2, SHARD),
    "two-sharded-in-pieces": (2, [*SHARD, "--accumulate", "2"]),
    "four-sharded": (4, SHARD),
    "four-kept": (4, [*SHARD, "--parallel.no-reshard", "--parallel.prefetch", "2"]),
    "four-in-two-replicas": (4, ["--parallel.replicas", "2"]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each layout, made once for all workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "layouts"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            for name, (world, options) in LAYOUTS.items():
                place = ["--run-dir", str(folder.with_name("making") / name)]
                assert ranks.train([*EVERYWHERE, *options, *place], world) == [0] * world
            folder.with_name("making").rename(folder)
    return folder


def assert_same_numbers(ours: Path, theirs: Path) -> None:
    left, right = runs.log_of(ours), runs.log_of(theirs)
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for a, b in zip(left, right, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_losses_norms_and_weights_are_those_of_one_process(finished: Path, name: str) -> None:
    assert_same_numbers(finished / name, finished / "one")
    runs.assert_same_weights(runs.last(finished / name), runs.last(finished / "one"))


@pytest.mark.parametrize("name", ["two", "four-sharded", "four-in-two-replicas"])
def test_only_the_first_rank_writes(finished: Path, name: str) -> None:
    events = [event["event"] for event in runs.lines(finished / name / "events.jsonl")]
    assert sorted(events) == sorted(["started", "layout", "watching", *["saved"] * 3, "finished"])
    assert len(runs.lines(finished / name / "layers.jsonl")) == STEPS // 2


@pytest.mark.parametrize("name", ["two", "four-sharded"])
def test_looks_are_means_over_the_ranks(finished: Path, name: str) -> None:
    ours, alone = (runs.lines(finished / n / "layers.jsonl") for n in (name, "one"))
    for a, b in zip(ours, alone, strict=True):
        assert (a["step"], a["layer"]) == (b["step"], b["layer"])
        assert a["tcs"] == pytest.approx(b["tcs"], rel=1e-3, abs=1e-5)


def test_a_run_goes_on_on_any_number_of_processes(finished: Path, tmp_path: Path) -> None:
    """Two steps on one, on two, on four, and again on one, with no difference but rounding."""
    run = tmp_path / "run"
    for steps, world in ((2, 1), (4, 2), (5, 4), (STEPS, 1)):
        options = ["--steps", str(steps), "--save-every", "2", *OPTIONS, "--run-dir", str(run)]
        assert ranks.train(options, world) == [0] * world
    assert_same_numbers(run, finished / "one")
    ours, theirs = runs.last(run), runs.last(finished / "one")
    runs.assert_same_weights(ours, theirs)
    for key, state in ours.tensors["random"].items():
        assert torch.equal(state, theirs.tensors["random"][key])
    assert ours.values["random"] == theirs.values["random"]
    messages = [e["message"] for e in runs.lines(run / "events.jsonl") if e["event"] == "resumed"]
    assert [m.rsplit(" ", 1)[1] for m in messages] == ["2", "4", "5"]


def test_one_file_of_a_sharded_checkpoint(finished: Path, tmp_path: Path) -> None:
    stored = runs.last(finished / "four").tensors
    for name, ema in (("ema", True), ("model", False)):
        loaded = load_run(finished / "four", ema=ema).model.state_dict()
        file = tmp_path / f"{name}.safetensors"
        path = write_weights(load_weights(finished / "four", ema=ema), file)
        written = load_weights(path, num_heads=2).state_dict()
        for key, tensor in stored[name].items():
            assert torch.equal(loaded[key], tensor)
            assert torch.equal(written[key], tensor)


def test_a_truncated_shard_is_passed_over_and_named(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "two", run)
    newest = list_checkpoints(run / "checkpoints")[-1]
    os.truncate(newest / "optimizer" / "00001.safetensors", 200)
    assert ranks.train([*EVERYWHERE, "--run-dir", str(run)], 2) == [0, 0]
    events = {event["event"]: event["message"] for event in runs.lines(run / "events.jsonl")}
    assert "optimizer/00001.safetensors is truncated (200 of" in events["damaged"]
    assert "going back to step 4" in events["damaged"]
    runs.assert_same_weights(runs.last(run), runs.last(finished / "two"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "9"], "train.batch_size=9 is not divisible by the 2 processes"),
        (["--accumulate", "5"], "train.accumulate=5: each of the 2 processes of torchrun has 4"),
        (["--parallel.replicas", "3"], "train.parallel.replicas=3 does not divide the 2 processes"),
        ([*SHARD, "--on-alarm", "protect"], "train.on_alarm='protect' changes the network while"),
        (
            [*SHARD, "--precision", "bf16", "--weights", "bf16"],
            "train.weights='bf16' cannot be sharded over 2 processes: "
            "blocks.0.attention.qkv.weight has 72 rows of 24, which have to be multiples of 2 and",
        ),
        (
            ["--parallel.layout", "replicate", "--parallel.replicas", "2"],
            "train.parallel.replicas=2: only layout=shard divides the processes",
        ),
    ],
)
def test_what_cannot_be_divided_is_said_once(
    tmp_path: Path, options: list[str], message: str
) -> None:
    log = tmp_path / "log"
    place = ["--run-dir", str(tmp_path / "run")]
    assert ranks.train([*EVERYWHERE, *options, *place], 2, log=log) == [2, 2]
    assert log.read_text().count(message) == 1
    assert "Traceback" not in log.read_text()


def test_what_sharding_needs_beside_the_state() -> None:
    """Counted over the tensors of the blocks, for 10 blocks in units of 4 on 4 GPUs."""
    config = replace(runs.MODEL, depth=10)
    with torch.device("meta"):
        blocks = DiT(config).blocks
    matrices = sum(p.numel() for p in blocks[0].parameters() if p.ndim == 2)
    layout = ParallelConfig(layout="shard", unit=4, prefetch=1)
    train = replace(runs.TRAIN, parallel=layout)
    in_bf16, in_fp32 = 2 * matrices, 4 * matrices
    once = 3 * 4 * in_bf16 + 2 * 4 * (in_bf16 + in_fp32) + 10 * in_fp32 // 4
    assert exchange_bytes(config, train, 1) == 0
    assert exchange_bytes(config, train, 4) == once
    assert exchange_bytes(config, replace(train, accumulate=2), 4) == once + 10 * in_fp32
    kept = replace(train, parallel=replace(layout, reshard=False))
    assert exchange_bytes(config, kept, 4) >= once + (10 - 3 * 4) * in_bf16
    halves = replace(train, parallel=replace(layout, replicas=2))
    assert exchange_bytes(config, halves, 4) == once + 10 * in_fp32 // 4


def test_an_alarm_takes_every_rank_back(tmp_path: Path) -> None:
    """A rate that breaks the network: every rank goes back to the same checkpoint, once, and stops
    at the next alarm; the flight holds the whole batch."""
    run = tmp_path / "run"
    options = ["--run-dir", str(run), "--on-alarm", "rollback", "--reaction.limit", "1"]
    options += ["--lr", "1e9", "--warmup", "0", "--steps", "60", "--reaction.margin", "0"]
    assert ranks.train([*EVERYWHERE, *options], 2) == [3, 3]
    events = [event["event"] for event in runs.lines(run / "events.jsonl")]
    assert events.count("rolled-back") == events.count("stopped") == 1
    flight = read_flight(next((run / "flights").iterdir()))
    assert flight.world == 2
    assert flight.batch is not None
    assert flight.batch.indices.tolist() == flight.records[-1]["indices"]
    assert len(flight.records[-1]["sample_losses"]) == 8
