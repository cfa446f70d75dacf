"""The block as one node on a GPU (through Triton's interpreter on a CPU) against fp64."""

import pytest
import torch

from mvsplit.kernels import Segments, forced_backend
from mvsplit.kernels import masked_attention as masked
from mvsplit.kernels.block_parts import RECOMPUTE, BlockSettings, BlockWeights
from mvsplit.kernels.masked_attention import with_unit_heads
from mvsplit.models import Block, DiTConfig
from mvsplit.models.rope import rope_tables
from mvsplit.residuals import RuleConfig

pytest.importorskip("triton")

WIDTH, HEADS, TOKENS, BATCH = 32, 2, 7, 3
LENGTHS = (4, 3)
RULES = {
    "plain": RuleConfig(name="plain"),
    "mvsplit": RuleConfig(name="mvsplit", beta=0.7, alpha=0.3),
    "free leak": RuleConfig(name="mvsplit", beta=0.7, alpha=0.3, leak=0.2, tied_leak=False),
    "layerscale": RuleConfig(name="layerscale", gamma=0.4),
    "rezero": RuleConfig(name="rezero"),
    "deepnorm": RuleConfig(name="deepnorm"),
}


def make_block(rule):
    torch.manual_seed(1)
    config = DiTConfig(
        depth=1, width=WIDTH, heads=HEADS, ffn_width=48, channels=1, text_width=4, rule=rule
    )
    block = Block(config)
    for name, parameter in block.named_parameters():
        scale = 0.3 if "rule" in name else WIDTH**-0.5
        parameter.data = parameter.data * ("rule" in name) + scale * torch.randn_like(parameter)
    return block


def tables():
    return rope_tables(2, 2, 3, WIDTH // HEADS, 10000.0, torch.device("cpu"))


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    shape = (BATCH, TOKENS, WIDTH)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), grad.to(dtype)


def segments(valid):
    counts = None if valid is None else torch.tensor([[4, n] for n in valid])
    return Segments(LENGTHS, counts)


def truth(block, valid):
    """Output and gradients by the parts in fp64, and the gradients' names."""
    block = block.double()
    x, grad = draw()
    x.requires_grad_()
    with forced_backend("reference"):
        out = block._by_parts(x, *(t.double() for t in tables()), segments(valid))
    wanted = dict(block.named_parameters())
    found = torch.autograd.grad((out * grad).sum(), [x, *wanted.values()])
    return out.detach(), found[0], dict(zip(wanted, found[1:], strict=True))


def by_node(block, valid, device, *, recompute, adds=False, dtype=torch.float32):
    from mvsplit.kernels.fused.block import block as run

    block = block.float().to(device)
    x, grad = (t.to(device) for t in draw(dtype))
    x.requires_grad_()
    counts = segments(valid).valid
    places = Segments(LENGTHS, None if counts is None else counts.to(device))
    rules = block.rule_attention, block.rule_ffn
    cos, sin = (t.to(device) for t in tables())
    eps = (rules[0].eps, rules[1].eps)
    settings = BlockSettings(cos, sin, places, HEADS, block.attention.eps, eps, recompute, adds)
    weights = BlockWeights(*(m.weight for m in block._matrices()))
    if adds:
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
    out = run(x, weights, rules[0].gains(), rules[1].gains(), settings)
    (out * grad).sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters()}
    if adds:
        for name, p in block.named_parameters():
            grads[name] = p.grad - 1
    return out.detach(), x.grad, grads


def cos_sin(dtype):
    return tuple(t.to(dtype) for t in tables())


def call(block, x, places=None):
    """The node on a block of fp32 with `adds`, as a trainer calls it."""
    from mvsplit.kernels.fused.block import block as run

    rules = block.rule_attention, block.rule_ffn
    cos, sin = (t.to(x.device) for t in tables())
    eps = (rules[0].eps, rules[1].eps)
    places = places or Segments(LENGTHS)
    settings = BlockSettings(cos, sin, places, HEADS, block.attention.eps, eps, adds=True)
    weights = BlockWeights(*(m.weight for m in block._matrices()))
    return run(x, weights, rules[0].gains(), rules[1].gains(), settings)


def error(value, wanted):
    value = value.double().cpu()
    return float(((value - wanted).norm() / wanted.norm().clamp(min=1)).nan_to_num(nan=1e9))


def compare(found, wanted, tolerance):
    assert error(found[0], wanted[0]) < tolerance
    assert error(found[1], wanted[1]) < tolerance
    for name, grad in wanted[2].items():
        assert error(found[2][name], grad) < tolerance, name


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("rule", RULES)
def test_output_and_every_gradient(rule, recompute, device, poisoned_memory):
    wanted = truth(make_block(RULES[rule]), None)
    found = by_node(make_block(RULES[rule]), None, device, recompute=recompute)
    compare(found, wanted, 2e-5)  # fp32 through some ten operations


class FlashBackward:
    """cuDNN's backward: from the output and the log-sum-exp, padding being keys of zero."""

    def _scaled_dot_product_cudnn_attention_backward(self, grad, q, k, v, out, lse, *_):
        scale = q.shape[-1] ** -0.5
        p = torch.exp(scale * q @ k.mT - lse)
        ds = scale * p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
        return ds @ k, ds.mT @ q, p.mT @ grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
@pytest.mark.parametrize("rule", ["mvsplit", "free leak", "layerscale"])
def test_what_unit_heads_leave_on_padding_reaches_no_weight(rule, monkeypatch):
    """Gradients of padded rows have no meaning and are large: e^−lse instead of 0, times a 1/RMS of
    1/√ε. The merge before stops them, so that they do not grow from block to block."""
    monkeypatch.setattr(masked, "_aten", FlashBackward())
    monkeypatch.setattr(masked, "_require_half", lambda q: None)
    monkeypatch.setattr(masked, "_require_narrow", lambda q: None)
    monkeypatch.setattr(
        "mvsplit.kernels.fused.block.attend", lambda *given, zero_padding: with_unit_heads(*given)
    )
    places = segments([3, 0, 1])
    between, found = [], {}
    for node in (True, False):
        dtype = torch.float32 if node else torch.float64
        blocks = [make_block(RULES[rule]).to(dtype) for _ in range(5)]
        x, grad = (t * places.mask[..., None] for t in draw(dtype))
        with forced_backend("reference"):
            for block in blocks:
                x = call(block, x, places) if node else block._by_parts(x, *cos_sin(dtype), places)
                x.retain_grad()
                between += [x] if node else []
        (x * grad).sum().backward()
        found[node] = [p.grad for block in blocks for p in block.parameters()]
    for value, wanted in zip(found[True], found[False], strict=True):
        assert error(value, wanted) < 1e-4
    garbage = [float(x.grad[~places.mask].abs().max()) for x in between[:-1]]
    assert 10 < max(garbage) < 1e4


@pytest.mark.parametrize("recompute", ["nothing", "attention", "all"])
def test_padding_is_masked(recompute, device, poisoned_memory):
    valid = [3, 0, 1]
    wanted = truth(make_block(RULES["mvsplit"]), valid)
    found = by_node(make_block(RULES["mvsplit"]), valid, device, recompute=recompute)
    compare(found, wanted, 2e-5)
    assert found[0][1, 4:].abs().max() == 0


def test_gradients_are_added_in_place(device):
    wanted = truth(make_block(RULES["mvsplit"]), None)
    found = by_node(make_block(RULES["mvsplit"]), None, device, recompute="packed", adds=True)
    compare(found, wanted, 2e-5)


def test_added_gradients_do_not_pass_through_autograd(device):
    block = make_block(RULES["mvsplit"]).to(device)
    weights = [matrix.weight for matrix in block._matrices()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    x, grad = (t.to(device) for t in draw(torch.float32))
    gains = [p for p in block.parameters() if p.ndim < 2]
    gains[0].grad = torch.ones_like(gains[0])
    found = torch.autograd.grad(call(block, x), [*weights, *gains], grad, allow_unused=True)
    assert found[:5] == (None,) * 5
    assert all(g is not None for g in found[5:])  # they have no buffer to be added to
    wanted = truth(make_block(RULES["mvsplit"]), None)[2]
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            assert error(parameter.grad - 1, wanted[name]) < 2e-5, name


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_recomputing_changes_no_bit(recompute, device):
    kept = by_node(make_block(RULES["mvsplit"]), None, device, recompute="nothing")
    again = by_node(make_block(RULES["mvsplit"]), None, device, recompute=recompute)
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])
    for name, grad in kept[2].items():
        assert torch.equal(grad, again[2][name]), name


def test_frozen_matrices_get_no_gradient(device):
    block = make_block(RULES["mvsplit"])
    block.ffn.requires_grad_(False)
    _, dx, grads = by_node(block, None, device, recompute="nothing")
    wanted = truth(make_block(RULES["mvsplit"]), None)
    assert grads["ffn.w2.weight"] is None
    assert error(dx, wanted[1]) < 2e-5


def test_hooks_on_a_matrix_see_its_gradient(device):
    """Though the gradient of the others is added around autograd."""
    block = make_block(RULES["mvsplit"]).to(device)
    seen = []
    for matrix in block._matrices():
        matrix.weight.grad = torch.ones_like(matrix.weight)
    block.ffn.w2.weight.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    block.attention.qkv.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    x, grad = (t.to(device) for t in draw(torch.float32))
    call(block, x).backward(grad)
    wanted = truth(make_block(RULES["mvsplit"]), None)[2]
    assert len(seen) == 2
    assert error(block.ffn.w2.weight.grad - 1, 2 * wanted["ffn.w2.weight"]) < 2e-5
    for name in ("attention.qkv", "attention.proj", "ffn.w13"):
        weight = block.get_submodule(name).weight
        assert error(weight.grad - 1, wanted[f"{name}.weight"]) < 2e-5, name


def test_inference_mode_asks_attention_for_no_gradient(device, monkeypatch):
    """Nothing can be differentiated there, so no candidate could be tried with its backward."""
    from mvsplit.kernels.fused import block as fused

    asked = []

    def attend(q, k, v, segments, *, zero_padding):
        asked.append(q.requires_grad)
        return found(q, k, v, segments, zero_padding=zero_padding)

    found = fused.attend
    monkeypatch.setattr(fused, "attend", attend)
    block = make_block(RULES["mvsplit"]).to(device)
    x = draw(torch.float32)[0].to(device)
    with torch.inference_mode():
        out = call(block, x)
    assert asked == [False]
    assert error(out, truth(make_block(RULES["mvsplit"]), None)[0]) < 2e-5


def test_a_second_backward_is_refused(device):
    block = make_block(RULES["mvsplit"]).to(device)
    x = draw(torch.float32)[0].to(device).requires_grad_()
    loss = call(block, x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_on_the_gpu_as_good_as_its_parts(weight_dtype):
    """In bf16 the node is no further from fp64 than the parts run one by one are."""
    wanted = truth(make_block(RULES["mvsplit"]), [3, 0, 1])
    node = by_node(
        make_block(RULES["mvsplit"]), [3, 0, 1], "cuda", recompute="packed", adds=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    block = make_block(RULES["mvsplit"]).to("cuda", weight_dtype)
    x, grad = (t.to("cuda") for t in draw(torch.bfloat16))
    x.requires_grad_()
    places = Segments(LENGTHS, segments([3, 0, 1]).valid.cuda())
    with torch.autocast("cuda", torch.bfloat16):
        out = block._by_parts(x, *(t.cuda() for t in tables()), places)
    (out * grad).sum().backward()
    parts = (out.detach(), x.grad, {n: p.grad for n, p in block.named_parameters()})
    assert error(node[0], wanted[0]) < max(8e-3, 1.3 * error(parts[0], wanted[0]))
    assert error(node[1], wanted[1]) < max(8e-3, 1.3 * error(parts[1], wanted[1]))
    for name, grad in wanted[2].items():
        limit = max(2e-2, 1.3 * error(parts[2][name], grad))
        assert error(node[2][name], grad) < limit, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_block_uses_the_node_on_the_gpu():
    block = make_block(RULES["mvsplit"]).cuda()
    x = draw(torch.bfloat16)[0].cuda()
    assert block.runs_as_one_node(x, segments(None))
    assert not block.runs_as_one_node(x.float(), segments(None))
