"""Every metric against its definition, written out in fp64 with explicit J, P, loops over tokens
and D×E gradients; with padding that holds NaN, empty segments and segments of one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mvsplit.diagnostics import metrics
from mvsplit.errors import UserError
from mvsplit.kernels import Segments

B, D, E, H = 3, 7, 5, 2
SEGMENTS = {
    "one": Segments((9,)),
    "two": Segments((6, 3)),
    "empty and single": Segments((6, 0, 1)),
    "padded": Segments((5, 4), torch.tensor([[5, 4], [5, 1], [3, 2]])),
    "text all padding": Segments((5, 4), torch.tensor([[5, 0], [4, 3], [2, 4]])),
}


@pytest.fixture(params=SEGMENTS, name="segments")
def _segments(request: pytest.FixtureRequest) -> Segments:
    return SEGMENTS[request.param]


@pytest.fixture(params=["global", "segment"], name="scope")
def _scope(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(segments: Segments, width: int, seed: int, mean: float = 1.0) -> Tensor:
    """Random tokens [B, T, width] with a mean of their own, and NaN as padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, segments.total, width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x += mean * torch.randn(1, 1, width, generator=generator, dtype=torch.float64)
    return x if segments.mask is None else x.masked_fill(~segments.mask[..., None], torch.nan)


def attention(segments: Segments, seed: int) -> Tensor:
    """Row-stochastic [B, H, T, T] over the real keys; what padded queries attend to is NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, H, segments.total, segments.total)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if segments.mask is None:
        return logits.softmax(-1)
    logits = logits.masked_fill(~segments.mask[:, None, None, :], -torch.inf)
    return logits.softmax(-1).masked_fill(~segments.mask[:, None, :, None], torch.nan)


def real(segments: Segments, scope: str) -> Iterator[tuple[int, int, list[int]]]:
    """(sample, group, indices of its real tokens), by counting."""
    for b in range(B):
        groups, start = [], 0
        for s, length in enumerate(segments.lengths):
            count = length if segments.valid is None else int(segments.valid[b, s])
            groups.append(list(range(start, start + count)))
            start += length
        if scope == "global":
            groups = [[i for indices in groups for i in indices]]
        for g, indices in enumerate(groups):
            yield b, g, indices


def j_and_p(n: int) -> tuple[Tensor, Tensor]:
    j = torch.ones(n, n, dtype=torch.float64) / max(n, 1)
    return j, torch.eye(n, dtype=torch.float64) - j


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def check(actual: Tensor, expected: dict[tuple[int, ...], float]) -> None:
    """Compares every entry; both are NaN, or they agree to 1e-10."""
    assert actual.numel() == len(expected)
    for index, value in expected.items():
        torch.testing.assert_close(
            actual[index].item(), float(value), rtol=1e-10, atol=1e-12, equal_nan=True
        )


def test_token_cosine_similarity(segments: Segments, scope: str) -> None:
    x = tokens(segments, D, 0)
    expected = {}
    for b, g, real_tokens in real(segments, scope):
        pairs = [cosine(x[b, s], x[b, t]) for s in real_tokens for t in real_tokens if s != t]
        expected[b, g] = sum(pairs) / len(pairs) if pairs else torch.nan
    check(metrics.token_cosine_similarity(x, segments, scope), expected)


def test_token_cosine_similarity_of_equal_and_of_zero_tokens() -> None:
    x = torch.ones(1, 4, D).mul_(torch.tensor([1.0, 2.0, 3.0, 0.0])[:, None])
    similarity = metrics.token_cosine_similarity(x)
    # Three of the six pairs are parallel, the pairs with the zero token count as orthogonal.
    torch.testing.assert_close(similarity, torch.tensor([[0.5]]))


def test_mean_ratio(segments: Segments, scope: str) -> None:
    x = tokens(segments, D, 1)
    expected = {}
    for b, g, real_tokens in real(segments, scope):
        j, p = j_and_p(len(real_tokens))
        x_g = x[b, real_tokens]
        expected[b, g] = (j @ x_g).norm() / ((p @ x_g).norm() + 0.1)
    check(metrics.mean_ratio(x, segments, scope, eps=0.1), expected)


def test_trunk_ratio_and_variance_gain(segments: Segments, scope: str) -> None:
    x, u = tokens(segments, D, 2), tokens(segments, D, 3)
    ratio, gain = {}, {}
    for b, g, real_tokens in real(segments, scope):
        _, p = j_and_p(len(real_tokens))
        x_g, u_g = x[b, real_tokens], u[b, real_tokens]
        ratio[b, g] = u_g.norm() / (x_g.norm() + 0.1)
        gain[b, g] = (p @ u_g).norm() / ((p @ x_g).norm() + 0.1)
    check(metrics.trunk_ratio(u, x, segments, scope, eps=0.1), ratio)
    check(metrics.variance_gain(u, x, segments, scope, eps=0.1), gain)


def test_attention_metrics(segments: Segments, scope: str) -> None:
    a, x = attention(segments, 4), tokens(segments, D, 5)
    mu, divergence, kept, leaked = {}, {}, {}, {}
    for b, g, real_tokens in real(segments, scope):
        j, p = j_and_p(len(real_tokens))
        centered = p @ x[b, real_tokens]
        for h in range(H):
            a_g = a[b, h][real_tokens][:, real_tokens]
            singular = torch.linalg.svdvals(p @ a_g @ p)
            mu[b, h, g] = singular.max() if real_tokens else 0.0
            divergence[b, h, g] = (a_g - j @ a_g).norm() / (a_g.norm() + 0.1)
            kept[b, h, g] = (p @ a_g @ centered).norm() / (centered.norm() + 0.1)
            leaked[b, h, g] = (j @ a_g @ centered).norm() / (centered.norm() + 0.1)
    check(metrics.mu_eff_exact(a, segments, scope), mu)
    check(metrics.row_divergence(a, segments, scope, eps=0.1), divergence)
    check(metrics.retention(a, x, segments, scope, eps=0.1), kept)
    check(metrics.leakage(a, x, segments, scope, eps=0.1), leaked)


def test_power_iteration_converges_to_the_singular_value_from_below(
    segments: Segments, scope: str
) -> None:
    a = attention(segments, 6)
    exact = metrics.mu_eff_exact(a, segments, scope)
    quick = metrics.mu_eff(a, segments, scope)
    assert (quick <= exact + 1e-12).all()
    torch.testing.assert_close(quick, exact, rtol=0.03, atol=1e-12)
    torch.testing.assert_close(metrics.mu_eff(a, segments, scope, iterations=3000), exact)


@pytest.mark.parametrize("estimate", [metrics.mu_eff, metrics.mu_eff_exact])
def test_mu_eff_of_attention_that_keeps_all_or_nothing(estimate: Callable[..., Tensor]) -> None:
    identity = torch.eye(6, dtype=torch.float64).expand(1, 1, 6, 6)
    uniform = torch.full((1, 1, 6, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(estimate(identity).item(), 1.0)
    torch.testing.assert_close(estimate(uniform).item(), 0.0)


def test_mu_eff_bounds_what_attention_keeps_of_the_differences() -> None:
    """Prop. 1 and 2: A μ(X) = μ(X), and ‖c(AX)‖ ≤ ‖PAP‖₂ ‖c(X)‖, with equality for the worst X."""
    a = attention(SEGMENTS["one"], 7)
    _, p = j_and_p(9)
    _, values, right = torch.linalg.svd(p @ a @ p)
    worst = right[..., :1, :].mT  # [B, H, T, 1]
    torch.testing.assert_close((p @ a @ worst).norm(dim=(-2, -1)), values[..., 0])
    torch.testing.assert_close(metrics.mu_eff_exact(a)[..., 0], values[..., 0])
    assert (metrics.retention(a, tokens(SEGMENTS["one"], D, 8)) <= metrics.mu_eff_exact(a)).all()
    torch.testing.assert_close(a.sum(-1), torch.ones(B, H, 9, dtype=torch.float64))


def test_logit_gradient_is_that_of_autograd_and_zero_for_equal_values() -> None:
    generator = torch.Generator().manual_seed(9)
    shape = (B, H, 6, 4)
    logits = torch.randn(B, H, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    v, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    a = logits.softmax(-1)
    (expected,) = torch.autograd.grad(a @ v, logits, g)
    torch.testing.assert_close(metrics.logit_gradient(a.detach(), v, g), expected)
    equal = v[:, :, :1].expand(shape)  # Lemma 1
    starved = metrics.logit_gradient(a.detach(), equal, g)
    torch.testing.assert_close(starved, torch.zeros_like(starved), rtol=0, atol=1e-14)


def explicit_split(
    y: Tensor, delta: Tensor, segments: Segments, scope: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """ΔW_μ and ΔW_c of each group as D×E matrices, token by token (Eq. 5)."""
    split: dict[int, tuple[Tensor, Tensor]] = {}
    for b, g, real_tokens in real(segments, scope):
        zero = torch.zeros(D, E, dtype=torch.float64)
        mean, centered = split.setdefault(g, (zero, zero.clone()))
        if not real_tokens:
            continue
        y_mean = sum(y[b, t] for t in real_tokens) / len(real_tokens)
        delta_mean = sum(delta[b, t] for t in real_tokens) / len(real_tokens)
        mean += len(real_tokens) * torch.outer(delta_mean, y_mean)
        for t in real_tokens:
            centered += torch.outer(delta[b, t] - delta_mean, y[b, t] - y_mean)
    return split


def test_writer_gradient_norms(segments: Segments, scope: str) -> None:
    y, delta = tokens(segments, E, 10), tokens(segments, D, 11)
    split = explicit_split(y, delta, segments, scope)
    mean = {(g,): m.norm() for g, (m, _) in split.items()}
    centered = {(g,): c.norm() for g, (_, c) in split.items()}
    check(metrics.mean_gradient_norm(y, delta, segments, scope), mean)
    check(metrics.centered_gradient_norm(y, delta, segments, scope), centered)


def test_the_two_parts_are_the_gradient_of_the_writer(segments: Segments, scope: str) -> None:
    """Eq. 5 against autograd: the cross terms vanish."""
    y, delta = (torch.nan_to_num(tokens(segments, w, 12 + w)) for w in (E, D))
    writer = torch.nn.Linear(E, D, bias=False, dtype=torch.float64)
    (writer(y) * delta).sum().backward()
    split = explicit_split(y, delta, segments, scope)
    torch.testing.assert_close(sum(m + c for m, c in split.values()), writer.weight.grad)
    given = metrics.centered_norm_given_gradient(writer.weight.grad, y, delta, segments)
    _, centered = explicit_split(y, delta, segments, "global")[0]
    torch.testing.assert_close(given, centered.norm())


def test_mean_gradient_grows_like_tokens_and_centered_like_their_root() -> None:
    """As tokens align, ΔW_μ grows like T and ΔW_c like √T (paper §1)."""
    generator = torch.Generator().manual_seed(13)
    norms = []
    for count in (64, 4096):
        y = 3 + torch.randn(1, count, E, generator=generator, dtype=torch.float64)
        delta = 3 + torch.randn(1, count, D, generator=generator, dtype=torch.float64)
        parts = (metrics.mean_gradient_norm, metrics.centered_gradient_norm)
        norms.append([part(y, delta).item() for part in parts])
    assert norms[1][0] / norms[0][0] == pytest.approx(64, rel=0.1)
    assert norms[1][1] / norms[0][1] == pytest.approx(8, rel=0.3)


def test_centered_gradient_survives_a_mean_a_million_times_larger() -> None:
    generator = torch.Generator().manual_seed(15)
    y, delta = torch.randn(2, 8, E, generator=generator), torch.randn(2, 8, D, generator=generator)
    y += 1000
    delta += 1000
    expected = metrics.centered_gradient_norm(y.double(), delta.double())
    ratio = metrics.mean_gradient_norm(y, delta) / expected
    assert ratio.item() > 1e5
    actual = metrics.centered_gradient_norm(y, delta).double()
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


def test_alignment(segments: Segments, scope: str) -> None:
    y, delta = tokens(segments, E, 16), tokens(segments, D, 17)
    law: dict[str, dict[tuple[int, int], float]] = {n: {} for n in metrics.Alignment._fields}
    for b, g, real_tokens in real(segments, scope):
        values = (torch.nan,) * 5
        if len(real_tokens) >= 2:
            values = explicit_alignment(y[b, real_tokens], delta[b, real_tokens])
        for name, value in zip(law, values, strict=True):
            law[name][b, g] = value
    for name, value in metrics.alignment(y, delta, segments, scope)._asdict().items():
        check(value, law[name])


def explicit_alignment(y: Tensor, delta: Tensor) -> tuple[float, float, float, float, float]:
    """Eq. 6 from the D×E gradient and a loop over pairs. y [n, E], δ [n, D]."""
    n = len(y)
    gradient = sum(torch.outer(delta[t], y[t]) for t in range(n))
    own = sum(delta[t].norm() ** 2 * y[t].norm() ** 2 for t in range(n))
    pairs = [(s, t) for s in range(n) for t in range(n) if s != t]
    cosines = [cosine(y[s], y[t]) * cosine(delta[s], delta[t]) for s, t in pairs]
    excess = sum(float((delta[s] @ delta[t]) * (y[s] @ y[t])) for s, t in pairs) / float(own)
    amplification = float(gradient.norm() ** 2 / own)
    kappa = sum(cosines) / len(pairs)
    kappa_abs = sum(map(abs, cosines)) / len(pairs)
    return amplification, excess, kappa, kappa_abs, (n - 1) * kappa_abs


def test_alignment_law_at_equal_magnitudes() -> None:
    """A − 1 = (T − 1)κ ≤ (T − 1)κ̂ where all magnitudes are equal; T − 1 for equal tokens."""
    y = torch.nn.functional.normalize(tokens(SEGMENTS["one"], E, 18), dim=-1)
    delta = torch.nn.functional.normalize(tokens(SEGMENTS["one"], D, 19), dim=-1)
    law = metrics.alignment(y, delta)
    torch.testing.assert_close(law.excess, 8 * law.kappa)
    assert (law.excess <= law.envelope).all()
    equal = metrics.alignment(y[:, :1].expand_as(y), delta[:, :1].expand_as(delta))
    torch.testing.assert_close(equal.excess, torch.full((B, 1), 8.0, dtype=torch.float64))


def test_alignment_does_not_depend_on_the_scale_even_where_squares_underflow() -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(B, 9, D, generator=generator) + 1
    delta = torch.randn(B, 9, D, generator=generator) + 1
    law, tiny = (metrics.alignment(y, scale * delta) for scale in (1.0, 1e-25))
    for name, value in law._asdict().items():
        torch.testing.assert_close(getattr(tiny, name), value, rtol=1e-4, atol=1e-5, msg=name)


def test_alignment_without_any_gradient_is_zero_not_nan() -> None:
    y = tokens(SEGMENTS["one"], E, 20)
    law = metrics.alignment(y, torch.zeros(B, 9, D, dtype=torch.float64))
    assert [value.unique().tolist() for value in law] == [[1.0], [0.0], [0.0], [0.0], [0.0]]


def test_gradient_rms() -> None:
    gradient = tokens(SEGMENTS["one"], D, 21)
    expected = sum(float(g) ** 2 for g in gradient.flatten()) / gradient.numel()
    assert metrics.gradient_rms(gradient).item() == pytest.approx(expected**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, segments: Segments) -> None:
    """Exactly what fp32 gives for the rounded inputs."""
    y, delta = (torch.nan_to_num(tokens(segments, w, 22 + w)).to(dtype) for w in (D, D))
    a = torch.nan_to_num(attention(segments, 23)).to(dtype)
    calls = [
        (metrics.token_cosine_similarity, (y,)),
        (metrics.mean_ratio, (y,)),
        (metrics.trunk_ratio, (delta, y)),
        (metrics.variance_gain, (delta, y)),
        (metrics.mu_eff, (a,)),
        (metrics.row_divergence, (a,)),
        (metrics.retention, (a, y)),
        (metrics.leakage, (a, y)),
        (metrics.mean_gradient_norm, (y, delta)),
        (metrics.centered_gradient_norm, (y, delta)),
    ]
    for metric, inputs in calls:
        actual = metric(*inputs, segments)
        assert actual.dtype == torch.float32
        expected = metric(*(i.float() for i in inputs), segments)
        assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1)), metric.__name__


def test_nan_of_a_real_token_is_reported() -> None:
    x = tokens(SEGMENTS["two"], D, 24)
    x[1, 2, 3] = torch.nan
    for metric in (metrics.token_cosine_similarity, metrics.mean_ratio):
        assert metric(x).isnan().flatten().tolist() == [False, True, False]
    assert metrics.mean_gradient_norm(x, tokens(SEGMENTS["two"], E, 25)).isnan().all()


def test_batch_mean_leaves_out_samples_without_enough_tokens_but_keeps_nan() -> None:
    segments = SEGMENTS["text all padding"]
    x = tokens(segments, D, 26)
    groups = metrics.token_groups(x, segments, "segment")
    values = metrics.token_cosine_similarity(x, segments, "segment")
    mean = metrics.batch_mean(values, groups, at_least=2)
    torch.testing.assert_close(mean, torch.stack([values[:, 0].mean(), values[1:, 1].mean()]))
    values[1, 1] = torch.nan
    assert metrics.batch_mean(values, groups, at_least=2).isnan().tolist() == [False, True]


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 9, D)
    with pytest.raises(UserError, match="scope='segments' is unknown; did you mean segment"):
        metrics.mean_ratio(x, scope="segments")
    with pytest.raises(UserError, match="cover 8 tokens, the input has 9"):
        metrics.mean_ratio(x, Segments((8,)))
