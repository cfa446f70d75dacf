"""Processes that hold the network whole each: what they exchange, update and save."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import pytest
import torch

from mvsplit.training import build_state, train
from mvsplit.training.checkpoint import save_checkpoint
from mvsplit.training.config import ParallelConfig
from mvsplit.training.distributed import group_of_saves, joined, rank, world
from mvsplit.training.replicas import Replicas, equal_parts
from mvsplit.training.step import train_step
from mvsplit.training.surgery import protect
from tests.training import ranks, runs


@pytest.mark.parametrize("sizes", [[5], [3, 3, 3, 3], [1, 9, 1, 1, 7, 2], [4, 0, 4, 16, 1]])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_are_as_equal_as_runs_of_whole_things_can_be(sizes: list[int], count: int) -> None:
    """Compared with every way to cut."""
    starts, room = equal_parts(sizes, count)
    inner = combinations_with_replacement(range(len(sizes) + 1), count - 1)
    ways = [[sum(sizes[a:b]) for a, b in pairwise((0, *c, len(sizes)))] for c in inner]
    assert room == min(max(parts) for parts in ways)
    places = [(s, s + size) for s, size in zip(starts, sizes, strict=True)]
    assert all(b <= c for (_, b), (c, _) in pairwise(places))
    assert all(a // room == max(a, b - 1) // room < count for a, b in places if b > a)


def average(dtype: torch.dtype) -> None:
    """Gradients of very different sizes; the reference is fp64."""
    from mvsplit.training import replicas

    replicas.STAGING = 1000  # so that there are several chunks, the last one shorter
    with joined(timeout=60):
        length = 4 * 331
        each = [drawn(number, length, dtype) for number in range(world())]
        grads = each[rank()].clone()
        Replicas().average_(grads)
        wanted = torch.stack(each).double().mean(0)
        if dtype == torch.bfloat16:  # sums in bf16 would be off by a rounding in a third of them
            assert float((grads == wanted.to(dtype)).float().mean()) > 0.999
        allowed = torch.stack(each).double().abs().sum(0) * torch.finfo(torch.float32).eps / 2
        allowed += wanted.abs() * torch.finfo(dtype).eps / 2
        assert bool(((grads.double() - wanted).abs() <= allowed).all())


def drawn(number: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    numbers = torch.randn(length, generator=generator)
    return (numbers * torch.logspace(-20, 20, length)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_is_rounded_once(dtype: torch.dtype) -> None:
    ranks.call(average, 4, dtype)


def protected(folder: Path) -> None:
    """Two steps of a plain network, surgery, two more steps; its checkpoint."""
    model = replace(runs.MODEL, rule=replace(runs.MODEL.rule, name="plain"))
    experiment = replace(runs.experiment(eps=1e-5), model=model)
    with joined(timeout=60):
        state = build_state(experiment)
        for number in range(4):
            if number == 2:
                protect(state, gain=0.25)
            train_step(state, experiment.train)
        group = group_of_saves()
        save_checkpoint(folder / "checkpoints", state.snapshot(), keep=1, group=group)


def test_surgery_is_that_of_one_process(tmp_path: Path) -> None:
    for name, count in (("one", 1), ("four", 4)):
        (tmp_path / name).mkdir()
        ranks.call(protected, count, tmp_path / name)
    ours, theirs = (runs.last(tmp_path / name) for name in ("four", "one"))
    assert ours.values["updates"] == {"decayed": 4, "rest": 4, "joined": 2}
    assert ours.values["rule"] == theirs.values["rule"]
    runs.assert_same_weights(ours, theirs)


def train_low(folder: Path, steps: int, layout: str, weights: str) -> None:
    parallel = ParallelConfig(layout=layout)  # type: ignore[arg-type]
    low = {"precision": "bf16", "weights": weights}
    experiment = runs.experiment(steps=steps, parallel=parallel, **low)
    model = replace(runs.MODEL, width=128, ffn_width=128, text_width=128)
    train(replace(experiment, model=model), folder)


@pytest.mark.parametrize(
    ("layout", "weights"), [("replicate", "bf16"), ("shard", "bf16"), ("replicate", "split")]
)
def test_bf16_weights_go_on_bit_for_bit_and_as_on_one_process(
    tmp_path: Path, layout: str, weights: str
) -> None:
    """On as many processes the bits of an undisturbed run; on one, another sequence of chances."""
    ranks.call(train_low, 2, tmp_path / "whole", 6, layout, weights)
    ranks.call(train_low, 2, tmp_path / "run", 4, layout, weights)
    ranks.call(train_low, 2, tmp_path / "run", 6, layout, weights)
    whole, run = (runs.last(tmp_path / name) for name in ("whole", "run"))
    for name in ("model", "ema", "optimizer"):
        assert whole.tensors[name].keys() == run.tensors[name].keys()
        for key, tensor in whole.tensors[name].items():
            assert torch.equal(tensor, run.tensors[name][key]), key
    train_low(tmp_path / "one", 6, layout, weights)
    alone, together = (runs.log_of(tmp_path / name) for name in ("one", "whole"))
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-3)
    assert together[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-2)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)
    other = "shard" if layout == "replicate" else "replicate"
    # What one layout has saved, in the other, and on one process.
    ranks.call(train_low, 2, tmp_path / "run", 7, other, weights)
    train_low(tmp_path / "run", 8, layout, weights)
    assert runs.log_of(tmp_path / "run")[-1]["step"] == 8
    last = runs.log_of(tmp_path / "run")[-1]["loss"]
    assert last < alone[0]["loss"]
