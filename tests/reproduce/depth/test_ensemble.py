"""An ensemble against its members one by one: velocities, every gradient, every rule."""

import dataclasses

import pytest
import torch

from mvsplit.diagnostics.metrics import token_cosine_similarity
from mvsplit.errors import UserError
from mvsplit.flow import flow_losses
from mvsplit.kernels import Segments
from mvsplit.models import DiT, DiTConfig
from mvsplit.reproduce.depth.ensemble import Ensemble, _compiled, merge
from mvsplit.reproduce.depth.together import member_bytes
from mvsplit.residuals import RuleConfig

SHAPE = DiTConfig(depth=3, width=12, heads=3, ffn_width=20, channels=2, patch=2, text_width=5)
FAMILIES = {
    "post-norm": [
        RuleConfig(name="plain"),
        RuleConfig(name="mvsplit", beta=0.7, alpha=0.2),
        RuleConfig(name="mvsplit", beta=0.7, alpha=0.2, tied_leak=False, leak=0.1, eps=1e-2),
        RuleConfig(name="layerscale", gamma=0.3),
        RuleConfig(name="rezero"),
        RuleConfig(name="deepnorm"),
        RuleConfig(name="mvsplit-attention-only", beta=0.5, alpha=0.1),
        RuleConfig(name="hard-center"),
    ],
    "keel": [RuleConfig(name="keel"), RuleConfig(name="keel")],
    "prenorm": [RuleConfig(name="prenorm")],
    "sandwich": [RuleConfig(name="sandwich"), RuleConfig(name="sandwich")],
}
SAMPLES, WORDS = 3, 4


def networks(rules, **changes) -> list[DiT]:
    """In fp64, every parameter moved from its start, no two alike."""
    torch.manual_seed(0)
    found = []
    for rule in rules:
        model = DiT(dataclasses.replace(SHAPE, rule=rule, **changes)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        found.append(model)
    return found


def asked(members: int):
    """Latents, targets, text whose padding is NaN, and counts: none, some and all of its tokens."""
    torch.manual_seed(1)
    latents, target = torch.randn(2, members, SAMPLES, 2, 4, 6, dtype=torch.float64)
    text = torch.randn(members, SAMPLES, WORDS, 5, dtype=torch.float64)
    valid = torch.tensor([0, 2, WORDS]).expand(members, -1)
    text[torch.arange(WORDS) >= valid[..., None]] = torch.nan
    return latents, target, text, valid


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_member_is_the_network_that_it_was_made_of(family, recompute):
    models = networks(FAMILIES[family])
    latents, target, text, valid = asked(len(models))
    ensemble = Ensemble(models, torch.float64)
    similarity: list[torch.Tensor] = []
    velocity = ensemble.forward(latents, text, valid, recompute=recompute, similarity=similarity)
    ensemble.backward((velocity - target).square().flatten(1).mean(1).sum())
    for e, model in enumerate(models):
        trunk: list[torch.Tensor] = []
        model.blocks[-1].register_forward_hook(lambda *args, kept=trunk: kept.append(args[2]))
        alone = model(latents[e], text[e], valid[e])
        torch.testing.assert_close(velocity[e], alone)
        flow_losses(alone, target[e], torch.zeros_like(target[e])).mean().backward()
        for name, parameter in model.named_parameters():
            if ".rule_" not in name:
                found = ensemble._cut(ensemble.grads, name)[e]
                torch.testing.assert_close(found, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
        rules = [r for b in model.blocks for r in (b.rule_attention, b.rule_ffn)]
        for place, rule in enumerate(rules):
            for slot, parameter in enumerate(rule.parameters()):
                found = ensemble.gain_grads[e, slot, place, : parameter.numel()]
                torch.testing.assert_close(found, parameter.grad)
        tokens = Segments.image_and_text(6, WORDS, valid[e])
        expected = token_cosine_similarity(trunk[0], tokens, "global").mean()
        assert len(similarity) == SHAPE.depth
        torch.testing.assert_close(similarity[-1][e], expected)


def test_a_member_that_is_not_finite_leaves_the_others_as_they_are():
    models = networks(FAMILIES["post-norm"])
    latents, target, text, valid = asked(len(models))
    found = []
    for broken in (False, True):
        ensemble = Ensemble(models, torch.float64)
        if broken:
            ensemble.values[1] = torch.nan
        velocity = ensemble.forward(latents, text, valid)
        ensemble.backward((velocity - target).square().flatten(1).mean(1).sum())
        found.append((velocity.detach(), ensemble.grads, ensemble.gain_grads))
    others = [i for i in range(len(models)) if i != 1]
    for whole, beside in zip(*found, strict=True):
        assert beside[1].isnan().any()
        torch.testing.assert_close(beside[others], whole[others], rtol=0, atol=0)


def test_weights_that_decay_are_the_matrices():
    (model,) = networks([RuleConfig(name="rezero")])
    ensemble = Ensemble([model], torch.float64)
    for name, (start, shape) in ensemble.places.items():
        decays = ensemble.decays[start : start + shape.numel()]
        assert bool((decays == float(len(shape) == 2)).all()), name


def test_networks_that_differ_in_more_than_their_rule_are_refused():
    plain, keel = networks([RuleConfig(name="plain"), RuleConfig(name="keel")])
    with pytest.raises(UserError, match="'keel' does not join its branches as 'plain' does"):
        Ensemble([plain, keel])
    (wider,) = networks([RuleConfig(name="plain")], width=24)
    with pytest.raises(UserError, match="several shapes"):
        Ensemble([plain, wider])
    (biased,) = networks([RuleConfig(name="plain")], ffn_bias=True)
    with pytest.raises(UserError, match="no biases"):
        Ensemble([biased, biased])


def test_a_member_takes_less_memory_where_it_computes_again():
    whole, again = (member_bytes(SHAPE, 100, recompute=r) for r in (False, True))
    weights = SHAPE.depth * 18 * (4 * 12**2 + 3 * 12 * 20)
    assert weights < again < whole


def test_compiled_the_merge_is_the_same_for_any_number_of_members():
    """Marked sizes must not change what is computed; compiling itself is PyTorch's."""
    seen = []
    call = _compiled(merge)
    torch.manual_seed(0)
    for members in (2, 3):
        x, f = torch.randn(2, members, 2, 7, 4, dtype=torch.float64)
        gains = torch.rand(3, members, 4, dtype=torch.float64)
        words = torch.full((members, 2, 1, 1), 3)
        mask = torch.ones(members, 2, 7, 1, dtype=torch.bool)
        eps = torch.full((members, 1, 1, 1), 1e-3, dtype=torch.float64)
        arguments = (x, f, *gains, mask, words, 4, eps)
        seen.append((call, arguments))
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(call(*arguments), merge(*arguments))


def test_padding_of_the_trunk_has_no_gradient():
    """The norm of a layer multiplies it by 1/√ε: sixteen layers make 1e38 of anything."""
    torch.manual_seed(0)
    x, f = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).view(1, 2, 5, 1).bool()
    x = torch.where(mask, x, 0).requires_grad_()
    gains = (torch.full((1, 4), value, dtype=torch.float64) for value in (0.5, 0.3, 0.3))
    words = mask[:, :, 2:].sum(2, keepdim=True)
    merge(x, f, *gains, mask, words, 2, None).square().sum().backward()
    assert x.grad[~mask.expand_as(x)].eq(0).all()
    assert x.grad[mask.expand_as(x)].ne(0).all()
