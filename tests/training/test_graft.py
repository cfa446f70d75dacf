"""Networks of other libraries get MV-Split rules in flight: tiny randomly initialised models of
those very libraries. timm needs torchvision, which installs beside CUDA builds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvsplit.diagnostics.structure import find_taps
from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.models.joins import Join
from mvsplit.training.graft import Grafted, graft
from tests.diagnostics.test_structure import (
    Built,
    diffusers_dit,
    flux,
    open_gates,
    pixart,
    sd3,
    timm_vit,
)
from tests.training import runs


def timm_layer_scale() -> Built:
    timm = pytest.importorskip("timm", reason="timm is not installed, or torchvision is missing")
    model = timm.models.VisionTransformer(
        img_size=8,
        patch_size=2,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=4,
        init_values=0.5,
        reg_tokens=2,
    )
    return model, {"x": torch.randn(2, 3, 8, 8)}


BUILDS = [diffusers_dit, pixart, timm_vit, timm_layer_scale]


@pytest.fixture(params=BUILDS, ids=lambda build: build.__name__, name="built")
def _built(request: pytest.FixtureRequest) -> Built:
    return made(request.param)


def made(build: Callable[[], Built]) -> Built:
    torch.manual_seed(0)
    model, arguments = build()
    open_gates(model)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.normal_(parameter, 0.5, 0.2)
    return model.eval(), arguments


def output(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    found = model(**arguments)
    return found if isinstance(found, Tensor) else found[0]


def gradients(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, arguments).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def joins(model: nn.Module) -> list[Join]:
    return [module for module in model.modules() if isinstance(module, Join)]


@pytest.mark.parametrize("gain", [1.0, 2.0**-6])
def test_the_function_stays_bit_for_bit(built: Built, gain: float) -> None:
    """γ stays in its branch here: as a gain its product is rounded with the sum."""
    model, arguments = built
    before, state = output(model, arguments), copy.deepcopy(model.state_dict())
    grafted = graft(model, arguments, gain=gain, absorb=False)
    assert torch.equal(output(model, arguments), before)
    assert state.keys() | set(grafted.new) == model.state_dict().keys()
    assert grafted.gone == []
    for rule in grafted.rules:
        assert (rule.beta == gain).all()
        assert (rule.alpha == gain).all()
        assert rule.leak is not None
        assert not rule.leak.any()


def test_each_branch_has_a_rule(built: Built) -> None:
    """PixArt's blocks have a cross-attention between the two."""
    model, arguments = built
    branches = 3 if type(model).__name__.startswith("PixArt") else 2
    taps = find_taps(model)
    writers = [branch.writer for tap in taps for branch in tap.branches]
    grafted = graft(model, arguments)
    assert len(grafted.rules) == branches * len(taps)
    again = [branch.writer for tap in find_taps(model) for branch in tap.branches]
    assert all(a is b for a, b in zip(again, writers, strict=True))


def test_another_gain_costs_a_rounding(built: Built) -> None:
    model, arguments = built
    model.double()
    arguments = {n: a.double() if _is_float(a) else a for n, a in arguments.items()}
    before = output(model, arguments)
    graft(model, arguments, gain=0.3)
    torch.testing.assert_close(output(model, arguments), before, rtol=1e-12, atol=1e-13)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_gradients_of_writers_are_in_the_new_units(built: Built) -> None:
    """F = gβ·(W/g)y, so ∂L/∂(W/g) = g·∂L/∂W; whatever else is still there has what it had."""
    model, arguments = built
    before = gradients(model, arguments)
    ends = ("to_out.0", "ff.net.2", "attn.proj", "mlp.fc2")  # of PixArt's two attentions too
    names = {n for n in before if n.rpartition(".")[0].endswith(ends)}
    grafted = graft(model, arguments, gain=0.25, absorb=False)
    after = gradients(model, arguments)
    assert len(names) == 2 * len(grafted.rules)  # weights and biases
    assert after.keys() == before.keys() | set(grafted.new)
    for name, gradient in before.items():
        scale = 0.25 if name in names else 1.0
        torch.testing.assert_close(after[name], gradient * scale, rtol=1e-4, atol=1e-7)


def reference(x: Tensor, f: Tensor, gains: list[Tensor], prefix: int) -> Tensor:
    """Z token by token: x + β(f − f̄) + αf̄ − λx̄, with the means of the token's own segment."""
    beta, alpha, leak = gains
    rows = []
    for t in range(x.shape[1]):
        own = slice(0, prefix) if t < prefix else slice(prefix, x.shape[1])
        f_mean, x_mean = f[:, own].mean(1), x[:, own].mean(1)
        rows.append(x[:, t] + beta * (f[:, t] - f_mean) + alpha * f_mean - leak * x_mean)
    return torch.stack(rows, 1)


def test_each_join_is_the_formula(built: Built) -> None:
    """Output and all gradients of every join at gains of any kind, in fp64; the class token and
    the registers of a ViT have a mean of their own."""
    model, arguments = built
    model.double()
    arguments = {n: a.double() if _is_float(a) else a for n, a in arguments.items()}
    own = [getattr(model, name, None) for name in ("cls_token", "reg_token")]
    prefix = sum(tokens.shape[1] for tokens in own if tokens is not None)
    graft(model, arguments)
    seen: list[tuple[Join, Tensor, Tensor, Tensor]] = []
    for join in joins(model):
        for gain in join.parameters():
            nn.init.normal_(gain, 0.6, 0.3)
        join.register_forward_hook(lambda join, args, z: seen.append((join, *args, z)))
    output(model, arguments)
    assert [entry[0] for entry in seen] == joins(model)
    for join, x, f, z in list(seen):  # which calling a join makes longer
        assert join.prefix == prefix
        x, f = x.detach().requires_grad_(), f.detach().requires_grad_()
        gains = [join.rule.beta, join.rule.alpha, join.rule.leak]
        expected = reference(x, f, gains, prefix)
        torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad(join(x, f), [x, f, *gains], upstream)
        theirs = torch.autograd.grad(expected, [x, f, *gains], upstream)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_gains_take_over_gamma() -> None:
    """The vector of a LayerScale goes, and β and α start there; with it as a power of two the
    product is exact, and so is the function."""
    model, arguments = made(timm_layer_scale)
    gammas = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("gamma")}
    before = output(model.double(), {"x": arguments["x"].double()}).float()
    grafted = graft(model.float(), arguments, gain=0.5)
    assert grafted.gone == list(gammas)
    assert not any(name.endswith("gamma") for name, _ in model.named_parameters())
    for rule, gamma in zip(grafted.rules, gammas.values(), strict=True):
        assert torch.equal(rule.beta, gamma / 2)
        assert torch.equal(rule.alpha, rule.beta)
    torch.testing.assert_close(output(model, arguments), before, rtol=1e-5, atol=1e-6)
    exact, arguments = made(timm_layer_scale)
    for name, parameter in exact.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.25)
    before = output(exact, arguments)
    graft(exact, arguments, gain=2.0**-6)
    assert torch.equal(output(exact, arguments), before)


def optimised(model: nn.Module, arguments: dict[str, Any], steps: int, optimizer: Any) -> None:
    for _ in range(steps):
        gradients(model, arguments)
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_optimiser_goes_on(kind: type) -> None:
    """With gains that stand still and g = 1, three steps after the surgery are those that would
    have been taken without it, bit for bit: nothing was forgotten."""
    model, arguments = made(diffusers_dit)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=1e-2, **options)
    optimised(model, arguments, 3, optimizer)
    twin = copy.deepcopy(model)
    twins = kind(twin.parameters(), lr=1e-2, **options)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    graft(model, arguments, optimizer=optimizer)
    optimizer.param_groups[-1]["lr"] = 0.0
    for each, of in ((model, optimizer), (twin, twins)):
        optimised(each, arguments, 3, of)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in twin.named_parameters())


def test_moments_speak_of_the_writers_in_their_new_units() -> None:
    """The first update of W/g after the surgery is that of W, for Adam does not mind the unit."""
    model, arguments = made(diffusers_dit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-12)
    optimised(model, arguments, 3, optimizer)
    writer = model.transformer_blocks[1].ff.net[2].weight
    twin = copy.deepcopy(model)
    twins = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-12)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    old = writer.detach().clone()
    grafted = graft(model, arguments, gain=2.0**-4, optimizer=optimizer)
    assert torch.equal(writer, old * 16)
    new = optimizer.param_groups[-1]
    assert new["weight_decay"] == 0.0
    assert len(new["params"]) == 3 * len(grafted.rules)
    optimised(model, arguments, 1, optimizer)
    optimised(twin, arguments, 1, twins)
    theirs = twin.transformer_blocks[1].ff.net[2].weight
    torch.testing.assert_close(writer - old * 16, theirs - old, rtol=1e-3, atol=1e-6)


def test_the_optimiser_forgets_gamma() -> None:
    model, arguments = made(timm_layer_scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimised(model, arguments, 2, optimizer)
    gammas = [p for n, p in model.named_parameters() if n.endswith("gamma")]
    graft(model, arguments, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not any(gamma in optimizer.state for gamma in gammas)
    optimised(model, arguments, 1, optimizer)


def test_annealing_is_a_straight_line_that_arrives() -> None:
    model, arguments = made(diffusers_dit)
    grafted: Grafted = graft(model, arguments, gain=0.5)
    seen = []
    for left in (4, 3, 2, 1, 0, -1, -2):
        grafted.anneal(left, alpha=0.1, leak=0.2)
        gains = (grafted.rules[3].alpha, grafted.rules[3].leak)
        seen.append([float(gain.detach()[5]) for gain in gains])
    expected = [[0.5 - 0.08 * n, 0.04 * n] for n in (1, 2, 3, 4, 5, 5, 5)]
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=0)
    assert torch.equal(grafted.rules[3].leak, torch.full((16,), 0.2))  # to the bit
    assert (grafted.rules[3].beta == 0.5).all()


def test_what_was_absent_in_the_example_has_to_stay_so() -> None:
    model, arguments = made(diffusers_dit)
    graft(model, arguments)
    with pytest.raises(AssertionError, match="attention_mask has been specialized"):
        model.transformer_blocks[0](torch.randn(1, 4, 16), attention_mask=torch.ones(1, 4))


class PostNorm(nn.Module):
    """x + N(attention(x)), as Swin V2 has it: the norm undoes what a gain does to a writer."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return x + self.norm(self.proj(mixed))


class Stack(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_refusals_leave_all_as_it_was() -> None:
    torch.manual_seed(0)
    arguments = {"x": torch.randn(2, 5, 8)}
    cases: list[tuple[Built, str, dict[str, Any]]] = [
        ((Stack(PostNorm(True)), arguments), "block 0: with gain=0.25 it would compute", {}),
        (made(sd3), "JointTransformerBlock: what it returns is not the trunk", {}),
        (made(flux), "FluxTransformerBlock: its forward cannot be traced", {}),
        ((nn.Sequential(), {}), "no transformer blocks were found", {}),
        ((DiT(runs.MODEL), {}), "use mvsplit.models.surgery.into_mvsplit", {}),
        ((nn.DataParallel(Stack(PostNorm(False))), arguments), "the model is wrapped", {}),
        ((Stack(PostNorm(False)), arguments), "prefix=9: the trunk has 5 tokens", {"prefix": 9}),
    ]
    for (model, given), message, options in cases:
        before = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        with pytest.raises(UserError, match=message):
            graft(model, given, **{"gain": 0.25, **options})
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(UserError, match=r"gain=0: must be in \(0, 1\]"):
        graft(Stack(PostNorm(False)), arguments, gain=0)


def test_an_optimiser_that_keeps_other_things_is_refused() -> None:
    model, arguments = made(diffusers_dit)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    with pytest.raises(UserError, match="Adagrad keeps 'sum' of a writer"):
        graft(model, arguments, gain=0.5, optimizer=optimizer)
    assert graft(model, arguments, optimizer=optimizer).rules


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_function_stays(built: Built) -> None:
    """By the fused merge: β = 1 is exact there too; γ in the gains costs a rounding."""
    model, arguments = built
    model.cuda()
    arguments = {n: a.cuda() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    before = output(model, arguments)
    grafted = graft(model, arguments, gain=2.0**-6)
    after = output(model, arguments)
    if grafted.gone:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(after, before)
    assert all(torch.isfinite(g).all() for g in gradients(model, arguments).values())
