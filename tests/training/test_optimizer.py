from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.training import TrainConfig
from mvsplit.training.ema import EMA, decay_at
from mvsplit.training.optimizer import (
    AdamW,
    clip_gradients_,
    flatten_parameters,
    global_norm,
    peak_learning_rate,
    warmup_then_constant,
)


class Net(nn.Module):
    """Sizes that are no multiple of the alignment; a gain, a bias, a 3-D weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.gain = nn.Parameter(torch.empty(7))
        self.second = nn.Linear(7, 3, bias=False)
        self.cube = nn.Parameter(torch.empty(2, 3, 5))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.gain) + self.cube.sum((0, 2))


CONFIG = TrainConfig(steps=1, batch_size=1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def test_gradients_that_somebody_has_dropped_are_tied_again() -> None:
    """`model.zero_grad()` sets every gradient to None; the next one must reach the update."""
    model = Net()
    optimizer = AdamW(flatten_parameters(model), CONFIG)
    model.zero_grad()
    optimizer.zero_grad()
    backward(model, 0)
    expected = copy.deepcopy(model)
    expected.zero_grad()
    backward(expected, 0)
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(global_norm(optimizer.groups), norm)


def test_flattening_keeps_names_values_and_shapes_and_gradients_accumulate() -> None:
    plain = Net()
    flat = copy.deepcopy(plain)
    groups = flatten_parameters(flat)
    assert [group.decays for group in groups] == [True, False]
    assert list(flat.state_dict()) == list(plain.state_dict())
    for step in range(2):
        backward(plain, step)
        backward(flat, step)
    for (name, a), (_, b) in zip(plain.named_parameters(), flat.named_parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
        (group,) = [g for g in groups if name in g.places]
        assert group.decays == (name in ("first.weight", "second.weight"))
        assert torch.equal(group.cut(group.grads)[name], a.grad)
        assert b.data_ptr() == group.cut(group.values)[name].data_ptr()
        assert b.data_ptr() % 64 == group.values.data_ptr() % 64


def test_flat_update_is_the_update_tensor_by_tensor() -> None:
    """Bit for bit against torch's AdamW on the separate tensors."""
    plain = Net()
    flat = copy.deepcopy(plain)
    two_d = [p for p in plain.parameters() if p.ndim == 2]
    rest = [p for p in plain.parameters() if p.ndim != 2]
    reference = torch.optim.AdamW(
        [{"params": two_d, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}],
        betas=CONFIG.betas,
        eps=CONFIG.eps,
        lr=0.1,
        fused=True,
    )
    ours = AdamW(flatten_parameters(flat), CONFIG)
    for step in range(5):
        reference.zero_grad()
        ours.zero_grad()
        backward(plain, step)
        backward(flat, step)
        reference.step()
        ours.step(0.1)
    for a, b in zip(plain.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # vector lanes may round apart


def test_adamw_against_its_formula() -> None:
    """θ ← θ − lr·wd·θ − lr·m̂/(√v̂ + ε) in fp64, the learning rate changing every step."""
    model = Net()
    optimizer = AdamW(flatten_parameters(model), CONFIG)
    wanted = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in wanted.items()}
    v = {n: torch.zeros_like(p) for n, p in wanted.items()}
    for step in range(1, 7):
        optimizer.zero_grad()
        backward(model, step)
        lr = 0.05 * step
        for name, parameter in model.named_parameters():
            g = parameter.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            update = m[name] / (1 - 0.8**step) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-6)
            decay = 0.3 if parameter.ndim == 2 else 0.0
            wanted[name] -= lr * decay * wanted[name] + lr * update
        optimizer.step(lr)
    moments = optimizer.moments()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), wanted[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            moments[f"exp_avg.{name}"].double(), m[name], rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            moments[f"exp_avg_sq.{name}"].double(), v[name], rtol=1e-4, atol=1e-6
        )


def test_moments_saved_by_name_continue_the_run() -> None:
    first = Net()
    optimizer = AdamW(flatten_parameters(first), CONFIG)
    for step in range(3):
        optimizer.zero_grad()
        backward(first, step)
        optimizer.step(0.1)
    second = copy.deepcopy(first)
    resumed = AdamW(flatten_parameters(second), CONFIG)
    for name, moment in resumed.moments().items():
        moment.copy_(optimizer.moments()[name])
    resumed.set_updates(optimizer.updates())
    for model, o in ((first, optimizer), (second, resumed)):
        o.zero_grad()
        backward(model, 3)
        o.step(0.1)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_global_norm_and_clip_against_torch() -> None:
    plain = Net()
    flat = copy.deepcopy(plain)
    groups = flatten_parameters(flat)
    backward(plain, 0)
    backward(flat, 0)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    norm = global_norm(groups).item()
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    clip_gradients_(groups, norm, 2 * norm)
    assert global_norm(groups).item() == norm
    clip_gradients_(groups, norm, 0.01)
    for a, b in zip(plain.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-9)


def test_learning_rate() -> None:
    config = TrainConfig(steps=1, batch_size=1)
    assert peak_learning_rate(config, 1024) == pytest.approx(1.5625e-4)  # paper §4
    assert peak_learning_rate(config, 256) == pytest.approx(3.125e-4)
    halved = TrainConfig(steps=1, batch_size=1, lr_factor=0.5)
    assert peak_learning_rate(halved, 1024) == pytest.approx(1.5625e-4 / 2)
    assert peak_learning_rate(TrainConfig(steps=1, batch_size=1, lr=0.3), 1024) == 0.3
    schedule = warmup_then_constant(2.0, 4)
    assert [schedule(step) for step in (1, 2, 3, 4, 5, 1000)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert warmup_then_constant(2.0, 0)(1) == 2.0


def test_ema_against_its_formula() -> None:
    model = Net()
    groups = flatten_parameters(model)
    ema = EMA(groups, 0.6)
    wanted = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for step in range(1, 9):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(math.sin(step))
                d = min(0.6, (1 + step) / (10 + step))
                wanted[name] = d * wanted[name] + (1 - d) * parameter.double()
        ema.update(step)
    for name, average in ema.parameters().items():
        torch.testing.assert_close(average.double(), wanted[name], rtol=1e-5, atol=1e-5)
    assert (decay_at(1, 0.999), decay_at(10**6, 0.999)) == (2 / 11, 0.999)


def test_gains_may_learn_at_a_rate_of_their_own() -> None:
    """Against torch's AdamW with a group for the gains of the rules, on a real network; and the
    moments of a run that is continued belong to the same parameters."""
    config = TrainConfig(steps=1, batch_size=1, gain_lr=8.0, weight_decay=0.3)
    plain, flat = tiny_dit(), tiny_dit()
    named = dict(plain.named_parameters())
    gains = [n for n in named if n.endswith(("alpha", "beta"))]
    assert len(gains) == 8
    kinds = {
        "gains": (gains, 0.8, 0.0),
        "decayed": ([n for n, p in named.items() if p.ndim == 2], 0.1, 0.3),
        "rest": ([n for n, p in named.items() if p.ndim == 1 and n not in gains], 0.1, 0.0),
    }
    reference = torch.optim.AdamW(
        [
            {"params": [named[n] for n in names], "lr": lr, "weight_decay": decay}
            for names, lr, decay in kinds.values()
        ],
        betas=config.betas,
        eps=config.eps,
    )
    ours = AdamW(flatten_parameters(flat, gains_apart=True), config)
    assert {g.kind: sorted(g.places) for g in ours.groups} == {
        kind: sorted(names) for kind, (names, _, _) in kinds.items()
    }
    for step in range(3):
        for model, optimizer in ((plain, reference), (flat, ours)):
            optimizer.zero_grad()
            gradients(model, step)
        reference.step()
        ours.step(0.1)
    for a, b in zip(plain.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours.updates() == {"decayed": 3, "rest": 3, "gains": 3}


def tiny_dit() -> DiT:
    size = {"depth": 2, "width": 8, "heads": 1, "ffn_width": 12, "channels": 2, "text_width": 8}
    return DiT(DiTConfig(**size), torch.Generator().manual_seed(0))


def gradients(model: nn.Module, step: int) -> None:
    """Set by hand: a network whose writers are zero gives its gains none at first."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.grad is None:
            parameter.grad = values
        else:
            parameter.grad.copy_(values)


def test_layers_that_come_later_cannot_have_a_rate_of_their_own() -> None:
    model = tiny_dit()
    with pytest.raises(UserError, match=r"train\.gain_lr"):
        flatten_parameters(model, ["blocks.0.ffn.w2.weight"], gains_apart=True)
    groups = flatten_parameters(model, ["blocks.0.rule_ffn.beta"], gains_apart=True)
    kinds = {name: group.kind for group in groups for name in group.places}
    assert kinds["blocks.0.rule_ffn.beta"] == "joined"
    assert kinds["blocks.0.rule_attention.beta"] == "gains"
