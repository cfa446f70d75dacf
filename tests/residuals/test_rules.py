"""Every residual rule against its formula, written here in fp64 with explicit J and P."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mvsplit.errors import UserError
from mvsplit.kernels import Segments
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import (
    RULES,
    MVSplit,
    Plain,
    RuleConfig,
    UnnormedMVSplit,
    build_rule,
)
from tests.oracles import averaging_matrix, normalise, real_tokens

D, L = 6, 5
EPS = 1e-5
LENGTHS = (3, 5)
LAYOUTS = {"all real": None, "padded": [(3, 5), (3, 2), (1, 0)]}


def n(x):
    return normalise(x, EPS)


# One sample: x, f [T, D]; j, p [T, T]; g the rule's parameters by name.
MERGES = {
    "plain": lambda x, f, j, p, g: n(x + f),
    "mvsplit": lambda x, f, j, p, g: n(x + g["beta"] * (p @ f) + g["alpha"] * (j @ (f - x))),
    "layerscale": lambda x, f, j, p, g: n(x + g["gamma"] * f),
    "rezero": lambda x, f, j, p, g: n(x + g["gain"] * f),
    "deepnorm": lambda x, f, j, p, g: n((2 * L) ** 0.25 * x + f),
    "keel": lambda x, f, j, p, g: n(2 * L * x + f),
    "prenorm": lambda x, f, j, p, g: x + f,
    "sandwich": lambda x, f, j, p, g: x + n(f),
    "mvsplit-attention-only": lambda x, f, j, p, g: (
        n(x + g["beta"] * (p @ f) + g["alpha"] * (j @ (f - x))) if g else n(x + f)
    ),
    "hard-center": lambda x, f, j, p, g: n(p @ (x + f)),
}
PRE_NORM = {"keel", "prenorm", "sandwich"}
ZERO_WRITERS = {"plain", "mvsplit", "mvsplit-attention-only", "hard-center"}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained_rule(config, branch="attention", dtype=torch.float64):
    """A rule whose gains have left their start values."""
    rule = build_rule(config, width=D, depth=L, branch=branch).to(dtype)
    for i, gain in enumerate(rule.parameters()):
        gain.data = draw(*gain.shape, seed=100 + i, dtype=dtype)
    return rule


def by_formula(rule, merge, x, f, layout):
    samples = []
    gains = dict(rule.named_parameters())
    for b in range(len(x)):
        counts = None if layout is None else layout[b]
        real, j = real_tokens(LENGTHS, counts), averaging_matrix(LENGTHS, counts)
        samples.append(real * merge(x[b], f[b], j, torch.diag(real[:, 0]) - j, gains))
    return torch.stack(samples)


def make_segments(layout):
    return Segments(LENGTHS, None if layout is None else torch.tensor(layout))


def test_the_registry_holds_the_rules_of_the_design():
    assert set(RULES) == set(MERGES)


@pytest.mark.parametrize("branch", ["attention", "ffn"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_formula_and_so_are_its_gradients(name, layout, branch):
    rule = trained_rule(name, branch)
    x, f = (draw(3, 8, D, seed=i).requires_grad_() for i in (1, 2))
    leaves, upstream = (x, f, *rule.parameters()), draw(3, 8, D, seed=3)
    y = rule.merge(x, f, make_segments(layout))
    expected = by_formula(rule, MERGES[name], x, f, layout)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    ours = torch.autograd.grad(y, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for value, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", RULES)
def test_what_the_branch_reads(name):
    x = 3 * draw(2, 8, D)
    expected = normalise(x, EPS) if name in PRE_NORM else x
    torch.testing.assert_close(trained_rule(name).enter(x), expected)


@pytest.mark.parametrize("name", RULES)
def test_padding_has_exactly_zero_influence_on_a_merge(name):
    layout = LAYOUTS["padded"]
    real = torch.stack([real_tokens(LENGTHS, counts) for counts in layout]) > 0
    rule = trained_rule(name)

    def run(padding):
        x, f, upstream = (torch.where(real, draw(3, 8, D, seed=i), padding) for i in (1, 2, 3))
        leaves = (x.requires_grad_(), f.requires_grad_(), *rule.parameters())
        y = rule.merge(x, f, make_segments(layout))
        return (y, *torch.autograd.grad(y, leaves, upstream))

    for filler in (7.0, float("nan"), float("inf")):
        for clean, dirty in zip(run(0.0), run(filler), strict=True):
            assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", RULES)
def test_which_rules_let_a_later_token_reach_an_earlier_one(name):
    """What the README says of causal models: rules with means do, unless each token that is
    predicted is a segment of its own."""
    rule = trained_rule(RuleConfig(name=name))
    x, f = draw(1, 8, D, seed=1), draw(1, 8, D, seed=2)
    later = torch.arange(8).eq(7)[:, None]

    def moves(lengths):
        segments = Segments(lengths)
        merged = (rule.merge(x + s * later, f + s * later, segments) for s in (0, 1))
        before, after = (each[:, :-1] for each in merged)
        return not torch.equal(before, after)

    means = name in ("mvsplit", "mvsplit-attention-only", "hard-center")
    assert moves((8,)) is means
    assert not moves((4, 1, 1, 1, 1))


@pytest.mark.parametrize(("depth", "beta"), [(400, 0.05), (100, 0.1), (1, 1.0)])
@pytest.mark.parametrize("branch", ["attention", "ffn"])
def test_gains_start_by_the_depth_where_beta_is_not_given(depth, beta, branch):
    def check(start_beta, start_alpha, **given):
        config = RuleConfig(name="mvsplit", **given)
        rule = build_rule(config, width=D, depth=depth, branch=branch)
        for gain, start in ((rule.beta, start_beta), (rule.alpha, start_alpha)):
            torch.testing.assert_close(gain, torch.full_like(gain, start))

    check(beta, beta)
    check(beta, 0.0, alpha=0.0)
    check(0.3, 0.0, beta=0.3)  # the paper's α
    check(0.3, 0.2, beta=0.3, alpha=0.2)


@pytest.mark.parametrize("name", RULES)
def test_start_values(name):
    config = RuleConfig(name=name, beta=0.03, gamma=1e-3)
    rule = build_rule(config, width=D, depth=L, branch="attention")
    start = {"beta": 0.03, "alpha": 0.0, "gamma": 1e-3, "gain": 0.0}
    for gain_name, gain in rule.named_parameters():
        assert torch.equal(gain, torch.full_like(gain, start[gain_name]))
    assert rule.zero_writers is (name in ZERO_WRITERS)
    assert rule.normalised is (name not in {"prenorm", "sandwich"})
    assert rule.weight_scale == pytest.approx((8 * L) ** -0.25 if name == "deepnorm" else 1.0)


def test_plain_is_mvsplit_with_both_gains_open_and_no_leak():
    config = RuleConfig(beta=1.0, alpha=1.0, tied_leak=False, leak=0.0)
    mvsplit = build_rule(config, width=D, depth=L, branch="ffn")
    plain = build_rule("plain", width=D, depth=L, branch="ffn")
    segments = make_segments(LAYOUTS["padded"])
    x, f = (draw(3, 8, D, seed=i, dtype=torch.float32).requires_grad_() for i in (1, 2))
    upstream = draw(3, 8, D, seed=3, dtype=torch.float32)

    def run(rule):
        y = rule.merge(x, f, segments)
        return (y, *torch.autograd.grad(y, (x, f), upstream))

    for a, b in zip(run(mvsplit), run(plain), strict=True):
        assert torch.equal(a, b), "1·F and 0·mean are exact, so nothing may differ"


def test_an_untied_leak_is_a_gain_of_its_own():
    rule = trained_rule(RuleConfig(tied_leak=False))
    assert [name for name, _ in rule.named_parameters()] == ["beta", "alpha", "leak"]
    x, f = (draw(3, 8, D, seed=i).requires_grad_() for i in (1, 2))
    layout = LAYOUTS["padded"]
    y = rule.merge(x, f, make_segments(layout))

    def merge(x, f, j, p, g):
        return n(x + g["beta"] * (p @ f) + g["alpha"] * (j @ f) - g["leak"] * (j @ x))

    expected = by_formula(rule, merge, x, f, layout)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    leaves, upstream = (x, f, *rule.parameters()), draw(3, 8, D, seed=3)
    ours = torch.autograd.grad(y, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for value, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-11)


def test_untied_leak_starts_where_the_config_says():
    config = RuleConfig(alpha=0.2, tied_leak=False, leak=0.4)
    rule = build_rule(config, width=D, depth=L, branch="ffn")
    assert rule.leak.tolist() == pytest.approx([0.4] * D)
    assert rule.alpha.tolist() == pytest.approx([0.2] * D)


def model(depth=4, **fields):
    config = DiTConfig(
        depth=depth, width=64, heads=4, kv_heads=2, ffn_width=96, channels=3, text_width=8, **fields
    )
    return DiT(config, torch.Generator().manual_seed(7))


def test_a_rule_shows_its_width_and_where_its_gains_start():
    config = RuleConfig(name="mvsplit", beta=0.5)
    shown = "width=6, beta from 0.5, alpha from 0"
    assert repr(build_rule(config, width=6, depth=3, branch="ffn")) == f"MVSplit({shown})"
    untied = replace(config, tied_leak=False, leak=0.25)
    assert shown + ", leak from 0.25" in repr(build_rule(untied, width=6, depth=3, branch="ffn"))


def test_attention_only_protects_attention_alone():
    for block in model(rule=RuleConfig(name="mvsplit-attention-only")).blocks:
        assert isinstance(block.rule_attention, MVSplit)
        assert isinstance(block.rule_ffn, Plain)


def test_gains_are_of_one_block_and_one_branch():
    dit = model(rule=RuleConfig(name="mvsplit"))
    rules = [rule for block in dit.blocks for rule in (block.rule_attention, block.rule_ffn)]
    for i, rule in enumerate(rules):
        with torch.no_grad():
            rule.beta.fill_(i)
    assert [rule.beta[0].item() for rule in rules] == list(range(8))
    assert all(rule.beta.shape == rule.alpha.shape == (64,) for rule in rules)


def branch_weights(block):
    queries, keys, values = block.attention.qkv.weight.split([64, 32, 32])
    return {
        "query": queries,
        "key": keys,
        "value": values,
        "writer_attention": block.attention.proj.weight,
        "w13": block.ffn.w13.weight,
        "writer_ffn": block.ffn.w2.weight,
    }


def test_deepnorm_divides_value_output_and_ffn_weights_and_keel_divides_nothing():
    keel, deepnorm = (model(rule=RuleConfig(name=name)) for name in ("keel", "deepnorm"))
    factor = (8 * 4) ** 0.25
    for k_block, d_block in zip(keel.blocks, deepnorm.blocks, strict=True):
        standard, scaled = branch_weights(k_block), branch_weights(d_block)
        for name, weight in standard.items():
            divided = weight if name in {"query", "key"} else weight / factor
            torch.testing.assert_close(scaled[name], divided, rtol=1e-6, atol=0)
    for name in ("patch_in", "text_in", "head"):
        assert torch.equal(getattr(keel, name).weight, getattr(deepnorm, name).weight)


@pytest.mark.parametrize("name", RULES)
def test_initial_spread(name):
    """Each weight is N(0, s²): its estimated spread is within 5 of its own deviations s/√(2n)."""
    for block in model(depth=2, rule=RuleConfig(name=name)).blocks:
        for weight_name, weight in branch_weights(block).items():
            zero = name in ZERO_WRITERS - {"mvsplit"}  # whose gains nobody gives here
            if zero and weight_name.startswith("writer"):
                assert torch.all(weight == 0)
                continue
            std = 1 / math.sqrt(3 * weight.shape[1])
            if name == "deepnorm" and weight_name not in {"query", "key"}:
                std /= (8 * 2) ** 0.25
            assert abs(weight.std() / std - 1) < 5 / math.sqrt(2 * weight.numel())
            assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel())


@pytest.mark.parametrize(
    ("gains", "zero"),
    [
        ({}, False),
        ({"beta": 0.5}, True),
        ({"alpha": 0.0}, True),
        ({"beta": 0.5, "alpha": 0.5}, True),
    ],
)
def test_writers_of_mvsplit_start_at_zero_where_the_gains_are_given(gains, zero):
    """As the paper's do; the default is the start that the depth bench suggests."""
    for block in model(depth=2, rule=RuleConfig(**gains)).blocks:
        for name, weight in branch_weights(block).items():
            if name.startswith("writer"):
                assert bool((weight == 0).all()) is zero


@pytest.mark.parametrize(("writers", "zero"), [("zero", True), ("standard", False)])
@pytest.mark.parametrize("name", ["mvsplit", "layerscale"])
def test_writers_can_be_told_how_to_start(name, writers, zero):
    for block in model(rule=RuleConfig(name=name), writers=writers).blocks:
        for writer in (block.attention.proj.weight, block.ffn.w2.weight):
            assert bool((writer == 0).all()) is zero


class ForeignTransformer(nn.Module):
    """Somebody else's encoder, with PyTorch's own attention and MLP."""

    def __init__(self, rule_name):
        super().__init__()
        torch.manual_seed(0)
        size = {"width": D, "depth": 2}
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(D, 2, batch_first=True) for _ in range(2)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)) for _ in range(2)
        )
        self.rules = nn.ModuleList(
            build_rule(rule_name, **size, branch=branch)
            for _ in range(2)
            for branch in ("attention", "ffn")
        )

    def forward(self, x, segments):
        padding = None if segments.mask is None else ~segments.mask
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            first, second = self.rules[2 * i], self.rules[2 * i + 1]
            h = first.enter(x)
            f = attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
            x = first.merge(x, f, segments)
            x = second.merge(x, mlp(second.enter(x)), segments)
        return x


@pytest.mark.parametrize("name", RULES)
def test_a_rule_works_in_a_foreign_transformer(name):
    net = ForeignTransformer(name).double()
    x, target, lengths = draw(3, 7, D, seed=1), draw(3, 7, D, seed=2), (7, 3, 1)
    segments = Segments((7,), torch.tensor(lengths).unsqueeze(1))
    together = net(x, segments)
    for b, length in enumerate(lengths):
        alone = net(x[b : b + 1, :length], Segments((length,)))
        torch.testing.assert_close(together[b, :length], alone[0], rtol=1e-10, atol=1e-11)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (net(x, segments) - target)[segments.mask].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_unknown_rule_is_answered_with_the_nearest_names():
    with pytest.raises(UserError, match=r"'mvspilt' is unknown: did you mean mvsplit") as error:
        build_rule("mvspilt", width=D, depth=L, branch="ffn")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"choose one of: deepnorm, hard-center, keel"):
        build_rule("?", width=D, depth=L, branch="ffn")


def test_an_unknown_branch_is_refused_by_rules_that_do_not_use_it():
    with pytest.raises(UserError, match=r"branch='fnn' is unknown: did you mean ffn"):
        build_rule("mvsplit", width=8, depth=4, branch="fnn")


@pytest.mark.parametrize("size", ["width", "depth"])
def test_a_rule_of_no_size_is_refused(size):
    with pytest.raises(UserError, match=f"{size}=0: must be at least 1"):
        build_rule("mvsplit", branch="ffn", **({"width": D, "depth": L} | {size: 0}))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("x", "f", "segments", "message"),
    [
        ((2, 8, D), (2, 8, D + 1), Segments(LENGTHS), r"f has the shape \[2, 8, 7\], the trunk x"),
        ((2, 8, D), (2, 7, D), Segments(LENGTHS), r"f has the shape \[2, 7, 6\], the trunk x"),
        ((8, D), (8, D), Segments(LENGTHS), r"x has the shape \[8, 6\]; it must be \[B, T, D\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, x, f, segments, message):
    rule = build_rule(name, width=D, depth=L, branch="ffn")
    with pytest.raises(UserError, match=message):
        rule.merge(torch.ones(x), torch.ones(f), segments)


def test_bare_lengths_and_another_width_are_refused_by_name():
    rule = build_rule("mvsplit", width=D, depth=L, branch="ffn")
    with pytest.raises(UserError, match="built for width=6, the trunk x has 4"):
        rule.merge(torch.ones(2, 8, 4), torch.ones(2, 8, 4), Segments(LENGTHS))
    with pytest.raises(UserError, match=r"segments=\(3, 5\): give Segments\(\(3, 5\)\)"):
        rule.merge(torch.ones(2, 8, D), torch.ones(2, 8, D), LENGTHS)  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_a_useless_epsilon_is_refused(eps):
    with pytest.raises(UserError, match=r"rule\.eps=.*greater than 0"):
        RuleConfig(eps=eps)


@pytest.mark.parametrize("name", ["beta", "alpha", "leak", "gamma"])
def test_a_gain_that_is_no_number_is_refused(name):
    with pytest.raises(UserError, match=rf"rule\.{name}=nan: must be a finite number"):
        RuleConfig(**{name: float("nan")})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backward", [False, True])
def test_under_autocast_a_merge_is_what_it_is_without(name, backward):
    """Forward, and backward where it is called inside as well."""
    rule = trained_rule(name, dtype=torch.float32)
    segments = make_segments(LAYOUTS["padded"])
    x, f = (draw(3, 8, D, seed=i, dtype=torch.float32).requires_grad_() for i in (1, 2))

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = rule.merge(x, f, segments)
        upstream = draw(3, 8, D, seed=3, dtype=torch.float32).to(y.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and backward):
            return (y, *torch.autograd.grad(y, (x, f, *rule.parameters()), upstream))

    for found, wanted in zip(run(True), run(False), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_a_compiled_merge_has_full_precision_inside_of_an_autocast():
    rule = trained_rule(RuleConfig(tied_leak=False), dtype=torch.float32)
    x, f = (draw(3, 8, D, seed=i, dtype=torch.float32).requires_grad_() for i in (1, 2))
    upstream = draw(3, 8, D, seed=3, dtype=torch.float32)

    def run(merge, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = merge(x, f, Segments((7, 1)))
            return (y, *torch.autograd.grad(y, (x, f, *rule.parameters()), upstream))

    compiled = torch.compile(rule.merge, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(run(compiled, True), run(rule.merge, False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_merge_on_the_meta_device_has_the_shape_of_the_trunk():
    """What plans memory runs there, where there is no autocast to ask for."""
    x = torch.empty(3, 8, D, device="meta", requires_grad=True)
    y = (
        trained_rule("mvsplit", dtype=torch.float32)
        .to("meta")
        .merge(x, torch.empty_like(x), Segments((7, 1)))
    )
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == grad.shape == x.shape


@pytest.mark.parametrize("depth", [4, 16, 100])
def test_of_the_mean_of_a_trunk_the_default_leaves_what_the_page_says(depth):
    """(1 − 1/√L)^2L where branches write nothing and no norm is behind the merge."""
    merge = UnnormedMVSplit(RuleConfig(), width=D, depth=depth, branch="ffn").double()
    segments, x = Segments((5, 3)), draw(2, 8, D, seed=4) + 1
    y = x
    for _ in range(2 * depth):
        y = merge.merge(y, torch.zeros_like(y), segments)
    mean = averaging_matrix((5, 3)) @ x
    torch.testing.assert_close(y, x - mean + (1 - depth**-0.5) ** (2 * depth) * mean)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": -1.0}, r"rule\.beta=-1\.0: must not be negative at the start; leave it out"),
        ({"alpha": -0.1}, r"rule\.alpha=-0\.1: must not be negative"),
        ({"gamma": -1e-3}, r"rule\.gamma=-0\.001: must not be negative"),
        ({"leak": -0.5}, r"rule\.leak=-0\.5: must not be negative"),
        ({"alpha": 2.5}, r"rule\.alpha=2\.5: must be between 0 and 2 .* by 1 − alpha"),
        ({"leak": 3.0, "tied_leak": False}, r"rule\.leak=3\.0: must be between 0 and 2"),
        ({"beta": "1"}, r"rule\.beta='1': must be a finite number, for example"),
        ({"gamma": None}, r"rule\.gamma=None: must be a finite number"),
    ],
)
def test_gains_with_which_nothing_can_start_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        RuleConfig(**given)


def test_gains_at_the_borders_are_taken():
    RuleConfig(beta=0.0, alpha=2, gamma=0, leak=0)
    RuleConfig(beta=3.0, alpha=4.0, leak=2.0, tied_leak=False)
