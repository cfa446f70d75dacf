"""The DiT against a network of a few lines in fp64: separate projections, explicit softmax."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.patching import patchify, unpatchify
from mvsplit.models.rope import rope_tables
from mvsplit.residuals import RULES, RuleConfig
from tests.oracles import averaging_matrix, complex_rotation, normalise

BASE = DiTConfig(
    depth=2, width=24, heads=3, ffn_width=20, channels=3, patch=2, text_width=7, writers="standard"
)
VARIANTS = {
    "as released, but projected text": BASE,
    "text as wide as the trunk": dataclasses.replace(BASE, text_width=24),
    "one patch a latent": dataclasses.replace(BASE, patch=1),
    "one key head": dataclasses.replace(BASE, kv_heads=1),
    "two key heads of four": dataclasses.replace(BASE, width=32, heads=4, kv_heads=2),
    "biases": dataclasses.replace(BASE, attention_bias=True, ffn_bias=True, kv_heads=1),
    "pre-norm": dataclasses.replace(BASE, rule=RuleConfig(name="prenorm")),
    "another base and other epsilons": dataclasses.replace(
        BASE, rope_theta=50.0, qk_eps=1e-2, norm_eps=1e-2, rule=RuleConfig(eps=1e-2)
    ),
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(config, dtype=torch.float64):
    """A DiT whose biases and gains have left their start values."""
    dit = DiT(config, torch.Generator().manual_seed(1)).to(dtype)
    for i, parameter in enumerate(dit.parameters()):
        if parameter.ndim == 1:
            parameter.data += draw(*parameter.shape, seed=i, dtype=dtype)
    return dit


def angles_by_hand(rows, columns, text_tokens, head_width, theta):
    """Angles of each token: row number times each frequency, then column number. [T, K/2]."""
    axis = head_width // 2
    frequencies = [theta ** (-2 * i / axis) for i in range(axis // 2)]
    image = [
        [r * w for w in frequencies] + [c * w for w in frequencies]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.tensor(image + [[0.0] * axis] * text_tokens, dtype=torch.float64)


def attention_by_hand(layer, x, angles, config):
    """One sample, [T, D] → [T, D], with Q, K and V apart and the key heads repeated."""
    k = config.head_width
    groups = config.heads if config.kv_heads is None else config.kv_heads
    sizes = [config.heads * k, groups * k, groups * k]
    weights = layer.qkv.weight.split(sizes)
    biases = [None] * 3 if layer.qkv.bias is None else layer.qkv.bias.split(sizes)
    q, key, v = (
        functional.linear(x, w, b).unflatten(-1, (-1, k)).transpose(0, 1)
        for w, b in zip(weights, biases, strict=True)
    )
    q, key = (normalise(complex_rotation(t, angles), config.qk_eps) for t in (q, key))
    key, v = (t.repeat_interleave(config.heads // groups, dim=0) for t in (key, v))
    a = torch.softmax(q @ key.transpose(1, 2) / k**0.5, dim=-1)
    return (a @ v).transpose(0, 1).flatten(1) @ layer.proj.weight.T


def ffn_by_hand(layer, x):
    gate, value = layer.w13(x).chunk(2, dim=-1)
    return layer.w2(gate * torch.sigmoid(gate) * value)


def merge_by_hand(rule, x, f, j):
    if rule.config.name == "prenorm":
        return x + f
    z = x + rule.beta * (f - j @ f) + rule.alpha * (j @ (f - x))
    return normalise(z, rule.config.eps)


def dit_by_hand(dit, latents, text):
    """One sample, [C, H, W] and its real text tokens [T, Dc] → velocity [C, H, W]."""
    c, p = dit.config, dit.config.patch
    kernel = dit.patch_in.weight.reshape(c.width, c.channels, p, p)
    grid = functional.conv2d(latents[None], kernel, dit.patch_in.bias, stride=p)[0]
    rows, columns = grid.shape[1:]
    image = normalise(grid.flatten(1).T, c.norm_eps)
    x = torch.cat((image, normalise(dit.text_in(text), c.norm_eps)))
    angles = angles_by_hand(rows, columns, len(text), c.head_width, c.rope_theta)
    j = averaging_matrix((rows * columns, len(text)))
    pre = c.rule.name == "prenorm"
    for block in dit.blocks:
        entered = normalise(x, c.rule.eps) if pre else x
        f = attention_by_hand(block.attention, entered, angles, c)
        x = merge_by_hand(block.rule_attention, x, f, j)
        f = ffn_by_hand(block.ffn, normalise(x, c.rule.eps) if pre else x)
        x = merge_by_hand(block.rule_ffn, x, f, j)
    image = x[: rows * columns]
    values = dit.head(normalise(image, c.norm_eps) if pre else image)
    values = values.reshape(rows, columns, p, p, c.channels)  # released order (p1, p2, c)
    return torch.einsum("hwpqc->chpwq", values).reshape(c.channels, rows * p, columns * p)


@pytest.mark.parametrize("size", [(4, 4), (2, 6), (6, 2)])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_velocity_and_every_gradient_by_hand(config, size):
    """Only the rotary tables are fp32: an angle below 6 is off by at most 2⁻²², 3e-7."""
    dit = trained(config)
    latents = draw(2, 3, *size, seed=50).requires_grad_()
    text = draw(2, 5, config.text_width, seed=51).requires_grad_()
    lengths, upstream = (5, 2), draw(2, 3, *size, seed=52)
    velocity = dit(latents, text, torch.tensor(lengths))
    expected = torch.stack([dit_by_hand(dit, latents[b], text[b, : lengths[b]]) for b in (0, 1)])
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
    leaves = (latents, text, *dit.parameters())
    ours = torch.autograd.grad(velocity, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for value, wanted in zip(ours, theirs, strict=True):
        assert (value - wanted).norm() <= 1e-5 * wanted.norm()


def test_rotary_angles_in_fp64():
    cos, sin = rope_tables(3, 5, 2, 16, 10_000.0, torch.device("cpu"))
    angles = angles_by_hand(3, 5, 2, 16, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-6)
    assert torch.all(cos[15:] == 1)
    assert torch.all(sin[15:] == 0)


def test_rotation_makes_attention_depend_on_relative_position():
    cos, sin = rope_tables(7, 7, 0, 8, 100.0, torch.device("cpu"))
    turn = torch.complex(cos, -sin).unflatten(0, (7, 7))  # [7, 7, 4]
    q, k = (torch.complex(draw(4, seed=i), draw(4, seed=i + 2)) for i in (0, 1))

    def score(at, other):
        return ((q * turn[at]) * (k * turn[other]).conj()).sum().real

    torch.testing.assert_close(score((1, 2), (3, 0)), score((4, 6), (6, 4)), rtol=0, atol=1e-5)
    assert (score((1, 2), (3, 0)) - score((1, 2), (0, 3))).abs() > 1e-2


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patchify_is_a_convolution_and_unpatchify_undoes_it(patch):
    latents = draw(2, 5, 4 * patch, 2 * patch)
    tokens = patchify(latents, patch)
    weight = draw(7, 5, patch, patch, seed=1)
    convolved = functional.conv2d(latents, weight, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens @ weight.flatten(1).T, convolved)
    head_order = tokens.unflatten(-1, (5, patch, patch)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(unpatchify(head_order, patch, latents.shape[2:]), latents)


def test_grouped_heads_are_repeated_heads():
    grouped = trained(dataclasses.replace(BASE, width=32, heads=4, kv_heads=2))
    full = trained(dataclasses.replace(BASE, width=32, heads=4))
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        q, k, v = state[name].split([32, 16, 16])
        k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
        state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    latents, text = draw(2, 3, 4, 6, seed=50), draw(2, 5, 7, seed=51)
    torch.testing.assert_close(grouped(latents, text), full(latents, text))


@pytest.mark.parametrize("name", RULES)
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    dit = trained(dataclasses.replace(BASE, rule=RuleConfig(name=name)))
    lengths = (1, 7, 130, 0)
    latents, text = draw(4, 3, 4, 2, seed=50), draw(4, 130, 7, seed=51)
    upstream = draw(4, 3, 4, 2, seed=52)
    for b, length in enumerate(lengths):
        text[b, length:] = float("nan")
    text.requires_grad_()
    together = dit(latents, text, torch.tensor(lengths))
    gradients = torch.autograd.grad(together, (text, *dit.parameters()), upstream)
    summed = [torch.zeros_like(p) for p in dit.parameters()]
    for b, length in enumerate(lengths):
        alone = dit(latents[b : b + 1], text[b : b + 1, :length])
        torch.testing.assert_close(together[b], alone[0], rtol=1e-9, atol=1e-10)
        per_text, *per_weight = torch.autograd.grad(
            alone, (text, *dit.parameters()), upstream[b : b + 1], materialize_grads=True
        )
        torch.testing.assert_close(gradients[0][b], per_text[b], rtol=1e-8, atol=1e-10)
        assert torch.all(gradients[0][b, length:] == 0)
        for total, gradient in zip(summed, per_weight, strict=True):
            total += gradient
    for value, wanted in zip(gradients[1:], summed, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-9)


def test_padding_has_exactly_zero_influence():
    dit = trained(BASE, torch.float32)
    latents = draw(2, 3, 4, 2, seed=50, dtype=torch.float32)
    valid = torch.tensor([4, 2])

    def run(padding):
        text = draw(2, 4, 7, seed=51, dtype=torch.float32)
        text[1, 2:] = padding
        velocity = dit(latents, text.requires_grad_(), valid)
        return (velocity, *torch.autograd.grad(velocity.sum(), (text, *dit.parameters())))

    for filler in (1e4, float("nan"), float("inf")):
        for clean, dirty in zip(run(0.0), run(filler), strict=True):
            assert torch.equal(clean, dirty)


def test_without_text_valid_padding_counts_as_text():
    dit = trained(BASE)
    latents, text = draw(2, 3, 4, 2, seed=50), draw(2, 4, 7, seed=51)
    every_token = dit(latents, text)
    torch.testing.assert_close(every_token, dit(latents, text, torch.tensor([4, 4])))
    text[1, 2:] = 0
    padded = dit(latents, text)
    assert torch.equal(padded[0], every_token[0])
    assert (padded[1] - every_token[1]).abs().max() > 1e-3
    assert (padded[1] - dit(latents, text, torch.tensor([4, 2]))[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_an_empty_batch_has_zero_gradients(name):
    dit = DiT(dataclasses.replace(BASE, rule=RuleConfig(name=name)))
    velocity = dit(torch.zeros(0, 3, 4, 2), torch.zeros(0, 4, 7))
    assert velocity.shape == (0, 3, 4, 2)
    velocity.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in dit.parameters())


@pytest.mark.parametrize("name", RULES)
def test_every_parameter_gets_a_finite_gradient_and_once_trained_not_zero(name):
    config = dataclasses.replace(
        BASE,
        rule=RuleConfig(name=name),
        writers="rule",
        attention_bias=True,
        ffn_bias=True,
    )
    latents, text = draw(2, 3, 4, 2, seed=50), draw(2, 4, 7, seed=51)
    target, valid = draw(2, 3, 4, 2, seed=52), torch.tensor([4, 2])

    def gradients(dit):
        (dit(latents, text, valid) - target).square().mean().backward()
        return {key: p.grad for key, p in dit.named_parameters()}

    start = DiT(config, torch.Generator().manual_seed(1)).double()
    at_start = gradients(start)
    assert all(g is not None and g.isfinite().all() for g in at_start.values())
    if start.blocks[0].rule_attention.zero_writers:
        writers = [g for key, g in at_start.items() if key.endswith(("proj.weight", "w2.weight"))]
        assert all(g.abs().max() > 0 for g in writers), "or training could never begin"
    trained_dit = trained(dataclasses.replace(config, writers="standard"))
    for key, gradient in gradients(trained_dit).items():
        assert gradient.isfinite().all()
        centered_away = name == "hard-center" and key.endswith("w2.bias")  # P removes a constant
        assert bool(gradient.norm() > 1e-9) is not centered_away, key


@pytest.mark.parametrize("name", sorted(set(RULES) - {"hard-center"}))
def test_zero_writers_pass_the_trunk_unchanged_at_the_start(name):
    """Merges only renormalise: unit RMS stays within ε = 1e-5 of itself, at any depth. With α = 0
    as the paper starts; another α leaks the trunk's mean."""
    rule = RuleConfig(name=name, alpha=0.0)
    config = dataclasses.replace(BASE, depth=50, writers="zero", rule=rule)
    dit = DiT(config, torch.Generator().manual_seed(1)).double()
    latents, text = draw(2, 3, 4, 2, seed=50), draw(2, 4, 7, seed=51)
    stream, segments = dit.embed(latents, text, None)
    expected = unpatchify(dit.head(stream[:, segments.slices[0]]), 2, (4, 2))
    torch.testing.assert_close(dit(latents, text), expected, rtol=1e-4, atol=1e-4)


def test_the_same_generator_seed_gives_the_same_network():
    first, again = (DiT(BASE, torch.Generator().manual_seed(3)) for _ in range(2))
    other = DiT(BASE, torch.Generator().manual_seed(4))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.patch_in.weight, other.patch_in.weight)


def test_a_thousand_layers_of_full_width_on_the_meta_device():
    """A block holds 4D² (attention), 3DF (SwiGLU) and 4D gains: 13.6 M; the paper's 13.64 B."""
    config = DiTConfig(
        depth=1000, width=1024, heads=8, ffn_width=3072, channels=128, text_width=1024
    )
    with torch.device("meta"):
        dit = DiT(config)
    assert all(p.is_meta for p in dit.parameters())
    block = 4 * 1024**2 + 3 * 1024 * 3072 + 4 * 1024
    ends = (128 + 1) * 1024 + (1024 + 1) * 128
    assert sum(p.numel() for p in dit.parameters()) == 1000 * block + ends
    assert round((1000 * block + ends) / 1e9, 2) == 13.64


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"depth": 0}, ("model.depth=0", "at least 1")),
        ({"patch": -1}, ("model.patch=-1", "at least 1")),
        (
            {"width": 25},
            ("model.width=25", "model.heads=3", "choose a width that is a multiple of 4"),
        ),
        ({"width": 18}, ("= 6", "multiple of 4")),
        ({"kv_heads": 2}, ("model.kv_heads=2", "model.heads=3", "choose from 1, 3")),
        ({"kv_heads": 0}, ("model.kv_heads=0", "choose from 1, 3")),
        ({"rule": RuleConfig(name="plane")}, ("model.rule.name='plane'", "did you mean plain")),
        ({"rope_theta": -1.0}, ("model.rope_theta=-1.0", "greater than 0")),
        ({"qk_eps": float("nan")}, ("model.qk_eps=nan", "greater than 0")),
        ({"norm_eps": float("inf")}, ("model.norm_eps=inf", "greater than 0")),
        ({"writers": "none"}, ("model.writers='none'", "'zero'")),
        ({"depth": 2.5}, ("model.depth=2.5", "whole number, for example 2")),
        ({"depth": "4"}, ("model.depth='4'", "whole number, for example 4")),
        ({"heads": None}, ("model.heads=None", "whole number")),
        ({"width": float("nan")}, ("model.width=nan", "whole number")),
        ({"patch": True}, ("model.patch=True", "whole number")),
        ({"kv_heads": 1.0}, ("model.kv_heads=1.0", "whole number, for example 1")),
        ({"rope_theta": "1e4"}, ("model.rope_theta='1e4'", "must be a number")),
    ],
)
def test_an_impossible_shape_is_refused_with_its_remedy(field, words):
    with pytest.raises(UserError) as error:
        dataclasses.replace(BASE, **field)
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("latents", "text", "valid", "words"),
    [
        ((2, 4, 4, 4), (2, 5, 7), None, ("latents", "[2, 4, 4, 4]", "[batch, 3, H, W]")),
        ((2, 3, 5, 4), (2, 5, 7), None, ("5×4", "model.patch=2")),
        ((2, 3, 4, 4), (2, 5, 8), None, ("text", "[2, 5, 8]", "[2, tokens, 7]")),
        ((2, 3, 4, 4), (1, 5, 7), None, ("text", "[1, 5, 7]", "[2, tokens, 7]")),
        ((2, 3, 4, 4), (2, 5, 7), (3,), ("text_valid", "[3]", "expected [2]")),
    ],
)
def test_a_wrong_input_is_named(latents, text, valid, words):
    counts = None if valid is None else torch.ones(valid, dtype=torch.long)
    with pytest.raises(UserError) as error:
        DiT(BASE)(torch.zeros(latents), torch.zeros(text), counts)
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []
