"""bf16 weights with moments of three bytes, and what a block may keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvsplit.cli.start import starter
from mvsplit.errors import UserError
from mvsplit.kernels.block_parts import RECOMPUTE
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import Origin, build_state, train
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint
from mvsplit.training.memory_plan import kept_bytes, make_plan, working_bytes
from mvsplit.training.objective import piece_losses
from mvsplit.training.parallelize import raised_weights
from mvsplit.training.step import pieces, train_step
from mvsplit.training.surgery import protect
from tests.training import runs

LOW = {"precision": "bf16", "weights": "bf16"}
SPLIT = {"precision": "bf16", "weights": "split"}


def test_half_and_half_is_the_whole(tmp_path: Path) -> None:
    train(runs.experiment(**LOW), tmp_path / "whole")
    train(runs.experiment(steps=4, **LOW), tmp_path / "run")
    train(runs.experiment(**LOW), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_split_weights_come_back_with_their_other_half(tmp_path: Path) -> None:
    train(runs.experiment(**SPLIT), tmp_path / "whole")
    train(runs.experiment(steps=4, **SPLIT), tmp_path / "run")
    train(runs.experiment(**SPLIT), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_split_weights_follow_fp32_closely(tmp_path: Path) -> None:
    """Only gradients differ, by their rounding to bf16, and starts, by that of the weights."""
    train(runs.experiment(steps=30, precision="bf16"), tmp_path / "full")
    train(runs.experiment(steps=30, **SPLIT), tmp_path / "split")
    full, split = (runs.log_of(tmp_path / name) for name in ("full", "split"))
    for ours, theirs in zip(split, full, strict=True):
        assert abs(ours["loss"] / theirs["loss"] - 1) < 0.01


@pytest.mark.parametrize("weights", ["bf16", "split"])
@pytest.mark.parametrize("ema", [False, True])
def test_a_run_may_begin_with_what_another_has_kept(
    tmp_path: Path, weights: str, ema: bool
) -> None:
    """All that the optimiser knows, but for what was left out of other weights than these."""
    low = {"precision": "bf16", "weights": weights}
    train(runs.experiment(**low), tmp_path / "source")
    origin = Origin(source=str(tmp_path / "source"), ema=ema, optimizer="kept")
    wanted = replace(runs.experiment(steps=1, keep=9, **low), origin=origin)
    train(wanted, tmp_path / "run", start=starter(wanted))
    source = runs.last(tmp_path / "source")
    first = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert first.values["updates"] == source.values["updates"]
    for name, moment in source.tensors["optimizer"].items():
        foreign = ema and name.startswith("low_bits.")
        expected = torch.zeros_like(moment) if foreign else moment
        assert torch.equal(first.tensors["optimizer"][name], expected), name


def test_fresh_moments_leave_the_other_half_of_the_weights() -> None:
    experiment = runs.experiment(**SPLIT)
    state = build_state(experiment)
    for _ in range(2):
        train_step(state, experiment.train)
    moments = state.optimizer.moments()
    halves = {n: t.clone() for n, t in moments.items() if n.startswith("low_bits.")}
    assert any((t != 0).any() for t in halves.values())
    state.optimizer.forget()
    for name, moment in moments.items():
        assert torch.equal(moment, halves.get(name, torch.zeros_like(moment)))


def test_follows_full_precision(tmp_path: Path) -> None:
    """The loss falls as it does with fp32 weights."""
    train(runs.experiment(steps=30, precision="bf16"), tmp_path / "full")
    train(runs.experiment(steps=30, **LOW), tmp_path / "low")
    full, low = (runs.log_of(tmp_path / name) for name in ("full", "low"))
    mean_full, mean_low = (sum(line["loss"] for line in log[-5:]) / 5 for log in (full, low))
    assert low[-1]["loss"] < 0.8 * low[0]["loss"]
    assert abs(mean_low / mean_full - 1) < 0.05


def test_only_the_matrices_of_blocks_are_low() -> None:
    state = build_state(runs.experiment(**LOW))
    low = {n for n, p in state.model.named_parameters() if p.dtype == torch.bfloat16}
    matrices = ("attention.qkv", "attention.proj", "ffn.w13", "ffn.w2")
    assert low == {f"blocks.{i}.{m}.weight" for i in range(2) for m in matrices}
    kinds = {g.kind: g for g in state.optimizer.groups}
    assert set(kinds["low"].places) == low
    assert state.ema is not None
    assert all(t.dtype == torch.float32 for t in state.ema.parameters().values())


def test_surgery_on_low_weights_gives_gains_that_move() -> None:
    """They are fp32: an update, or a step towards α = 0, is far below the precision of bf16."""
    plain = replace(runs.MODEL, rule=RuleConfig(name="plain"))
    experiment = replace(runs.experiment(**LOW, lr=1e-4, warmup=0), model=plain)
    state = build_state(experiment)
    batch = state.loader.next_batch()
    (piece,) = pieces(batch, 1, experiment.train, state.device)
    before = piece_losses(state.model, piece, experiment.train)
    protect(state, gain=0.0625)
    assert torch.equal(piece_losses(state.model, piece, experiment.train), before)
    gains = {n: p.detach().clone() for n, p in state.model.named_parameters() if ".rule_" in n}
    assert all(gain.dtype == torch.float32 for gain in gains.values())
    with torch.no_grad():
        for parameter in state.model.parameters():  # a gradient for the gains: no writer is zero
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    for _ in range(2):
        train_step(state, experiment.train)
    for name, gain in gains.items():
        moved = state.model.get_parameter(name) - gain
        assert (moved != 0).any(), name


def test_raised_weights_are_fp32_for_a_while() -> None:
    state = build_state(runs.experiment(**LOW))
    weight = state.model.get_parameter("blocks.1.ffn.w13.weight")
    (group,) = [g for g in state.optimizer.groups if g.kind == "low"]
    with raised_weights(state.model):
        assert weight.dtype == torch.float32
        (weight * 3).sum().backward()
    part = group.cut(group.grads)["blocks.1.ffn.w13.weight"]
    assert torch.equal(part, torch.full_like(part, 3))
    group.values.fill_(0.5)
    assert weight.dtype == torch.bfloat16
    assert (weight == 0.5).all()


def test_low_weights_need_low_precision() -> None:
    with pytest.raises(UserError, match=r"train\.weights=bf16: needs train\.precision=bf16"):
        runs.experiment(weights="bf16")


def wide(depth: int = 40) -> DiTConfig:
    return DiTConfig(depth=depth, width=1024, heads=8, ffn_width=3072, channels=16, text_width=1024)


def test_the_plan_recomputes_no_more_than_it_must() -> None:
    config, tokens = wide(), 1000
    each = {level: tokens * kept_bytes(config, level) for level in RECOMPUTE}
    plan = make_plan(config, tokens, 10**12)
    assert plan.levels == ("nothing",) * 40
    assert plan.kept == 40 * each["nothing"]
    one_less = make_plan(config, tokens, plan.kept + plan.working - 1)
    assert sorted(one_less.levels) == ["nothing"] * 39 + ["packed"]
    none = make_plan(config, tokens, 40 * each["all"] + plan.working)
    assert none.levels == ("all",) * 40
    assert none.fits
    assert not make_plan(config, tokens, 40 * each["all"] + plan.working - 1).fits


def test_the_plan_fits_into_what_is_allowed() -> None:
    config, tokens = wide(400), 8320
    for gigabytes in range(12, 130, 7):
        plan = make_plan(config, tokens, gigabytes * 10**9)
        assert plan.fits
        assert plan.kept + plan.working <= gigabytes * 10**9
        assert len(set(plan.levels)) <= 2
        assert list(plan.levels) == sorted(plan.levels, key=RECOMPUTE[::-1].index)


def test_bytes_of_a_token() -> None:
    """The table of `kernels/fused/block.py` in KiB at D = 1024, and statistics."""
    config = wide()
    for level, kibibytes in zip(RECOMPUTE, (28, 16, 6, 4, 2), strict=True):
        extra = kept_bytes(config, level) - kibibytes * 1024
        assert 0 <= extra <= 128
    assert working_bytes(config) > kept_bytes(config, "nothing")


def test_what_the_node_keeps_is_what_the_plan_says() -> None:
    """The tensors of a real block, counted (through Triton's interpreter)."""
    pytest.importorskip("triton")
    from mvsplit.kernels import Gains, Segments
    from mvsplit.kernels.block_parts import BlockSettings, BlockWeights
    from mvsplit.kernels.fused.block import _forward, _merges, _thinned

    config = DiTConfig(depth=1, width=32, heads=2, ffn_width=96, channels=1, text_width=4)
    block = DiT(config).blocks[0]
    x = torch.randn(2, 8, 32)
    tables = torch.ones(8, 8), torch.zeros(8, 8)
    settings = BlockSettings(*tables, Segments((8,)), 2, 1e-6, (1e-5, 1e-5))
    weights = BlockWeights(*(m.weight for m in block._matrices()))  # type: ignore[union-attr]
    gains = Gains(torch.ones(32, requires_grad=True), torch.ones(32), None)
    with torch.no_grad():
        _, kept = _forward(x, weights, _merges((*gains, *gains), settings), settings)
    for level in RECOMPUTE:
        thin = _thinned(kept, level)
        halves = [t.numel() for t in _big(thin) if t.shape[-1] > 2]
        per_token = 2 * (sum(halves) // 16 + 32)  # and x
        assert abs(per_token - kept_bytes(config, level)) <= 64


def _big(tree: object) -> list[torch.Tensor]:
    """The tensors with a value for every token and column."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.dim() >= 3 and tree.shape[1:3].numel() >= 16 else []
    return [t for part in tree or () for t in _big(part)] if isinstance(tree, tuple) else []
