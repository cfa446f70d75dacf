"""The block as one autograd node against its parts one by one."""

import pytest
import torch

from mvsplit.models import Attention, Block, DiT, DiTConfig
from mvsplit.residuals import MVSplit, RuleConfig

RULES = ["plain", "mvsplit", "layerscale", "rezero", "deepnorm", "hard-center"]


def make_model(rule="mvsplit", **other):
    shape = {"depth": 3, "width": 24, "heads": 2, "ffn_width": 20, "channels": 3, "text_width": 7}
    options = RuleConfig(name=rule, beta=0.7, alpha=0.3, gamma=0.4, tied_leak=rule != "free")
    model = DiT(DiTConfig(**shape, rule=options, writers="standard", **other)).double()
    for name, parameter in model.named_parameters():  # gains that differ from channel to channel
        if "rule" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs():
    torch.manual_seed(3)
    return (
        torch.randn(2, 3, 2, 5, dtype=torch.double, requires_grad=True),
        torch.randn(2, 3, 7, dtype=torch.double, requires_grad=True),
    )


def outputs_and_gradients(model, text_valid=None):
    latents, text = inputs()
    velocity = model(latents, text, text_valid)
    wanted = [latents, text, *model.parameters()]
    return velocity, *torch.autograd.grad(velocity.pow(3).sum(), wanted)


def part_by_part(model):
    """A hook on one part is what makes the parts run."""
    handles = [b.ffn.w2.register_forward_hook(lambda *_: None) for b in model.blocks]
    result = outputs_and_gradients(model)
    for handle in handles:
        handle.remove()
    return result


def count_nodes(monkeypatch):
    calls = []
    whole = Block._as_one_node
    monkeypatch.setattr(Block, "_as_one_node", lambda *a: calls.append(1) or whole(*a))
    return calls


@pytest.mark.parametrize("rule", RULES)
def test_equals_its_parts(rule, monkeypatch):
    model = make_model(rule)
    parts = part_by_part(model)
    calls = count_nodes(monkeypatch)
    whole = outputs_and_gradients(model)
    assert len(calls) == 3, "the node was not used, so nothing was compared"
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_equals_its_parts_with_a_free_leak(monkeypatch):
    model = make_model()
    for block in model.blocks:
        for rule in (block.rule_attention, block.rule_ffn):
            rule.leak = torch.nn.Parameter(torch.rand(24, dtype=torch.double))
    parts = part_by_part(model)
    calls = count_nodes(monkeypatch)
    whole = outputs_and_gradients(model)
    assert len(calls) == 3
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_parts_run_where_the_node_cannot(monkeypatch):
    calls = count_nodes(monkeypatch)
    for other in ({"rule": "keel"}, {"rule": "prenorm"}, {"ffn_bias": True}, {"kv_heads": 1}):
        outputs_and_gradients(make_model(**other))
    outputs_and_gradients(make_model(), torch.tensor([1, 3]))
    replaced = make_model()
    for block in replaced.blocks:
        block.ffn.w2 = torch.nn.Sequential(block.ffn.w2)
    outputs_and_gradients(replaced)
    assert not calls


class Doubled(Attention):
    def forward(self, *inputs):
        return 2 * super().forward(*inputs)


class DoubledMerge(MVSplit):
    def merge(self, x, f, segments):
        return super().merge(x, 2 * f, segments)


def double_the_writer(block):
    block.attention.proj.weight.data *= 2


@pytest.mark.parametrize(
    "replace",
    [
        lambda block: setattr(block.attention, "__class__", Doubled),
        lambda block: setattr(block.rule_attention, "__class__", DoubledMerge),
        lambda block: setattr(
            block.attention,
            "forward",
            lambda *inputs: 2 * Attention.forward(block.attention, *inputs),
        ),
    ],
    ids=["another attention", "another merge", "a forward of its own"],
)
def test_a_part_that_computes_something_else_is_not_passed_over(replace):
    """Each doubles the output of attention, as twice the weights of the writer would."""
    torch.manual_seed(5)
    replaced, wanted = make_model(), make_model()
    wanted.load_state_dict(replaced.state_dict())
    for block, other in zip(replaced.blocks, wanted.blocks, strict=True):
        replace(block)
        double_the_writer(other)
    torch.testing.assert_close(replaced(*inputs()), wanted(*inputs()), rtol=1e-10, atol=1e-12)


def test_a_part_without_our_matrices_runs():
    model = make_model()
    for block in model.blocks:
        block.attention = torch.nn.Identity()
        block.attention.forward = lambda x, *_: torch.zeros_like(x)
    assert model(*inputs()).isfinite().all()


def test_a_hook_on_all_modules_sees_the_parts():
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    make_model()(*inputs())
    hook.remove()
    assert seen.count(Attention) == 3


def test_frozen_weights_and_no_grad():
    model = make_model()
    expected = model(*inputs()).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs()), expected)
    for block in model.blocks:
        block.ffn.requires_grad_(False)
    outputs = model(*inputs())
    outputs.sum().backward()
    assert all(p.grad is None for b in model.blocks for p in b.ffn.parameters())
    assert all(p.grad.abs().sum() > 0 for b in model.blocks for p in b.attention.parameters())


@pytest.mark.parametrize("rule", ["mvsplit", "hard-center"])
def test_backward_inside_of_an_autocast_that_forward_was_not_in(rule):
    """Input and output projections are in bf16 then, an eighth of a percent at each step; what is
    between them is as it was."""
    model = make_model(rule).float()
    weights = [p for n, p in model.named_parameters() if n.startswith("blocks")]

    def gradient(low):
        latents, text = (each.detach().float() for each in inputs())
        loss = model(latents, text).pow(3).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    exact = gradient(low=False)
    assert (gradient(low=True) - exact).norm() < 0.01 * exact.norm()
