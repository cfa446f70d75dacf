from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvsplit.flow import flow_loss, interpolate
from mvsplit.models import DiT
from mvsplit.training import (
    Experiment,
    NonFiniteError,
    Observer,
    TrainState,
    build_state,
    train,
    train_step,
)
from mvsplit.training.step import accumulate_gradients, pieces
from tests.training import runs


def gradients(experiment: Experiment) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    state = build_state(experiment)
    with torch.no_grad():
        for block in state.model.blocks:  # zero writers would hide most of the network
            block.attention.proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
            block.ffn.w2.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    batch = state.loader.next_batch()
    parts = list(pieces(batch, 1, experiment.train, state.device))
    loss = accumulate_gradients(state, experiment.train, parts).mean()
    return loss, {name: p.grad.clone() for name, p in state.model.named_parameters()}


@pytest.mark.parametrize("count", [2, 3])  # of 8, or of 6, 5 and 5 samples
def test_pieces_are_one_times_sixteen(count: int) -> None:
    whole_loss, whole = gradients(runs.experiment(batch_size=16))
    loss, cut = gradients(runs.experiment(batch_size=16, accumulate=count))
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.norm() > 0, name


@pytest.mark.parametrize(("count", "sizes"), [(4, [2, 2, 2, 2]), (3, [3, 3, 2])])
def test_pieces_are_the_batch_cut(count: int, sizes: list[int]) -> None:
    """The same data, noise, times and text, whatever the cut; other steps, other chance."""
    state = build_state(runs.experiment())
    batch = state.loader.next_batch()
    (whole,) = pieces(batch, 5, runs.TRAIN, state.device)
    parts = list(pieces(batch, 5, replace(runs.TRAIN, accumulate=count), state.device))
    assert [len(part.data) for part in parts] == sizes
    (later,) = pieces(batch, 6, runs.TRAIN, state.device)
    (other,) = pieces(batch, 5, replace(runs.TRAIN, seed=1), state.device)
    for field in ("data", "noise", "times", "text"):
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(whole, field))
    for field in ("noise", "times"):
        for another in (later, other):
            assert not torch.equal(getattr(another, field), getattr(whole, field))
    assert torch.equal(whole.data, batch.latents)


def test_one_step_against_autograd_written_out() -> None:
    """Loss, clip and update by plain PyTorch on an ordinary copy of the network."""
    experiment = runs.experiment(clip=0.05, warmup=0)
    state = build_state(experiment)
    plain = DiT(experiment.model)
    plain.load_state_dict(state.model.state_dict())
    batch = state.loader.batch_at(0)
    (piece,) = pieces(batch, 1, experiment.train, state.device)
    z = interpolate(piece.data, piece.noise, piece.times)
    loss = flow_loss(plain(z, piece.text, piece.text_valid), piece.data, piece.noise)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2).step()
    metrics = train_step(state, experiment.train)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert metrics["grad_norm"] > 0.05
    for a, b in zip(state.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bf16_differs_little_and_keeps_fp32_weights(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        train(runs.experiment(steps=4, precision=precision), tmp_path / precision)
        losses[precision] = [m["loss"] for m in runs.log_of(tmp_path / precision)]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    state = build_state(runs.experiment(precision="bf16"))
    seen = []
    state.model.blocks[1].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    train_step(state, runs.experiment(precision="bf16").train)
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in state.model.parameters())


class Break(Observer):
    """After step 4, does something to the state; the fifth step will notice."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if state.step == 4:
            with torch.no_grad():
                self.action(state.model)


def poison(parameter: torch.Tensor) -> None:
    parameter.view(-1)[0] = torch.nan


def poison_gradient(parameter: torch.Tensor) -> None:
    parameter.register_hook(lambda gradient: gradient * torch.inf)


PLACES = {
    "Embed": lambda m: poison(m.patch_in.weight),
    "Q of layer 1": lambda m: poison(m.blocks[1].attention.qkv.weight[:16]),
    "K of layer 1": lambda m: poison(m.blocks[1].attention.qkv.weight[16:32]),
    "V of layer 0": lambda m: poison(m.blocks[0].attention.qkv.weight[32:]),
    "Attn_WO of layer 0": lambda m: poison(m.blocks[0].attention.proj.weight),
    "FFN_W13 of layer 1": lambda m: poison(m.blocks[1].ffn.w13.weight),
    "FFN_W2 of layer 1": lambda m: poison(m.blocks[1].ffn.w2.weight),
    "gains of layer 0": lambda m: poison(m.blocks[0].rule_ffn.alpha),
    "Final": lambda m: poison(m.head.bias),
    "output of FFN_W13 of layer 1": lambda m: m.blocks[1].ffn.w13.weight.fill_(3e38),
    "gradient of FFN_W2 of layer 0": lambda m: poison_gradient(m.blocks[0].ffn.w2.weight),
    "gradient of Attn_WO of layer 1": lambda m: [
        poison_gradient(m.blocks[1].attention.proj.weight),
        poison_gradient(m.blocks[0].ffn.w2.weight),
    ],
}


@pytest.mark.parametrize("place", PLACES)
def test_non_finite_value_stops_the_run_before_the_update(tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError) as caught:
        train(runs.experiment(), run, observers=[Break(PLACES[place])])
    message = str(caught.value)
    assert message.startswith("step 5: ")
    assert place in message
    assert f"the last good checkpoint is {run}/checkpoints/step_00000003" in message
    assert "\n" not in message
    event = runs.lines(run / "events.jsonl")[-1]
    assert (event["event"], event["step"], event["message"]) == ("nonfinite", 4, message)
    assert [m["step"] for m in runs.log_of(run)] == [1, 2, 3, 4]


def test_non_finite_step_changes_nothing() -> None:
    state = build_state(runs.experiment())
    train_step(state, runs.TRAIN)
    poison_gradient(state.model.head.bias)
    before = {n: t.clone() for n, t in state.model.state_dict().items()}
    moments = {n: t.clone() for n, t in state.optimizer.moments().items()}
    with pytest.raises(NonFiniteError):
        train_step(state, runs.TRAIN)
    assert state.step == 1
    assert all(torch.equal(before[n], t) for n, t in state.model.state_dict().items())
    assert all(torch.equal(moments[n], t) for n, t in state.optimizer.moments().items())
