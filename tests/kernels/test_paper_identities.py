"""The identities that the method rests on (arXiv 2605.06169, §1–2 and App. C–E), in fp64.

X [T, D] tokens, J the average over tokens, P = I − J, A [T, T] an attention matrix. A writer is a
linear map W with inputs y_t and output adjoints δ_t.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mvsplit.kernels import Segments, qk_norm_rope, split_merge
from tests.oracles import averaging_matrix

T, D = 13, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_and_centering(tokens=T):
    j = averaging_matrix((tokens,))
    return j, torch.eye(tokens, dtype=torch.float64) - j


def queries_and_keys(seed):
    tables = torch.ones(T, D // 2), torch.zeros(T, D // 2)
    q, k, _ = qk_norm_rope(draw(1, T, 3 * D, seed=seed), *tables, 1, 1)
    return q, k


def attention_matrix(seed=0):
    """A as the model's attention applies it: what it makes of the identity as values."""
    q, k = queries_and_keys(seed)
    return functional.scaled_dot_product_attention(q, k, torch.eye(T).double()[None, None])[0, 0]


def writer_gradient(y, delta):
    """∇W by autograd, and its exact parts ΔW_μ = T·δ̄ȳᵀ and ΔW_c = Σ_t δ̃_tỹ_tᵀ (Eq. 5)."""
    writer = nn.Linear(y.shape[1], delta.shape[1], bias=False, dtype=torch.float64)
    writer(y).backward(delta)
    mean_part = len(y) * torch.outer(delta.mean(0), y.mean(0))
    centered_part = (delta - delta.mean(0)).T @ (y - y.mean(0))
    return writer.weight.grad, mean_part, centered_part


def amplification(grad, y, delta):
    """A = ‖∇W‖²_F / Σ_t ‖δ_t‖²‖y_t‖² (Eq. 6)."""
    return grad.norm() ** 2 / (delta.norm(dim=1) ** 2 * y.norm(dim=1) ** 2).sum()


def pairwise_products(y, delta):
    """(δ_sᵀδ_t)(y_sᵀy_t) for all s ≠ t, as a flat list."""
    product = (delta @ delta.T) * (y @ y.T)
    return product[~torch.eye(len(y), dtype=torch.bool)]


def test_proposition_1_attention_keeps_the_mean_part():
    a, x = attention_matrix(), draw(T, D, seed=1)
    j, _ = mean_and_centering()
    torch.testing.assert_close(a @ (j @ x), j @ x)


def test_proposition_2_and_eq_4_attention_contracts_the_centered_part():
    a, x = attention_matrix(), draw(T, D, seed=1)
    _, p = mean_and_centering()
    pap = p @ a @ p
    torch.testing.assert_close(p @ (a @ x), pap @ x)
    mu_eff = torch.linalg.matrix_norm(pap, 2)
    assert (p @ a @ x).norm() <= mu_eff * (p @ x).norm()
    worst = torch.linalg.svd(pap).Vh[:1].T  # the bound is attained: no smaller number would do
    torch.testing.assert_close((p @ a @ worst).norm(), mu_eff * (p @ worst).norm())
    assert mu_eff < 1


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_eq_5_the_writer_gradient_is_a_mean_part_plus_a_centered_part(offset):
    y, delta = draw(T, D) + offset, draw(T, 5, seed=1) + offset
    grad, mean_part, centered_part = writer_gradient(y, delta)
    torch.testing.assert_close(grad, mean_part + centered_part)


def test_eq_5_alignment_moves_the_gradient_into_the_mean_part():
    one_y, one_delta = draw(1, D), draw(1, 5, seed=1)
    for tokens in (1, 7, 64):
        grad, mean_part, centered_part = writer_gradient(
            one_y.expand(tokens, -1), one_delta.expand(tokens, -1)
        )
        torch.testing.assert_close(mean_part.norm(), tokens * one_y.norm() * one_delta.norm())
        assert centered_part.norm() < 1e-12 * grad.norm()


def test_eq_6_alignment_law():
    y, delta = draw(T, D) + 0.5, draw(T, 5, seed=1) + 0.5
    grad, _, _ = writer_gradient(y, delta)
    scale = (delta.norm(dim=1) ** 2 * y.norm(dim=1) ** 2).sum()
    excess = pairwise_products(y, delta).sum() / scale
    torch.testing.assert_close(amplification(grad, y, delta) - 1, excess)


def test_eq_6_at_equal_magnitudes_is_t_minus_one_times_kappa():
    y, delta = (functional.normalize(v, dim=1) for v in (draw(T, D), draw(T, 5, seed=1)))
    y, delta = 3 * y, 0.2 * delta
    grad, _, _ = writer_gradient(y, delta)
    cosines = pairwise_products(y / 3, delta / 0.2)
    excess = amplification(grad, y, delta) - 1
    torch.testing.assert_close(excess, (T - 1) * cosines.mean())
    assert excess.abs() <= (T - 1) * cosines.abs().mean()  # the envelope with κ̂


@pytest.mark.parametrize("lengths", [(T,), (9, 4), (12, 1)])
def test_eq_9_the_mean_leaks_and_the_centered_part_adds(lengths):
    x, f, beta, alpha = draw(T, D), draw(T, D, seed=1), draw(D, seed=2), draw(D, seed=3)
    j = averaging_matrix(lengths)
    p = torch.eye(T, dtype=torch.float64) - j
    z = split_merge(x[None], f[None], beta, alpha, None, Segments(lengths), norm=False)[0]
    torch.testing.assert_close(p @ z, p @ x + beta * (p @ f))
    torch.testing.assert_close(j @ z, (1 - alpha) * (j @ x) + alpha * (j @ f))


@pytest.mark.parametrize("lengths", [(T,), (9, 4), (12, 1)])
def test_eq_10_the_gradient_reaches_the_branch_through_two_gains(lengths):
    x, f = (draw(1, T, D, seed=i).requires_grad_() for i in (0, 1))
    beta, alpha, g = draw(D, seed=2), draw(D, seed=3), draw(1, T, D, seed=4)
    j = averaging_matrix(lengths)
    p = torch.eye(T, dtype=torch.float64) - j
    z = split_merge(x, f, beta, alpha, None, Segments(lengths), norm=False)
    grad_x, grad_f = torch.autograd.grad(z, (x, f), g)
    torch.testing.assert_close(grad_f, beta * (p @ g) + alpha * (j @ g))
    torch.testing.assert_close(grad_x, p @ g + (1 - alpha) * (j @ g))


def test_eq_5_and_10_a_closed_mean_gain_shuts_off_the_mean_part_of_the_writer_gradient():
    x, y, g = draw(1, T, D), draw(1, T, D, seed=1) + 5, draw(1, T, D, seed=2) + 5

    def writer_parts(alpha, leak):
        f = draw(1, T, D, seed=3).requires_grad_()
        (delta,) = torch.autograd.grad(split_merge(x, f, 1.0, alpha, leak), f, g)
        grad, mean_part, centered_part = writer_gradient(y[0], delta[0])
        torch.testing.assert_close(grad, mean_part + centered_part)
        return mean_part.norm() / centered_part.norm()

    assert writer_parts(alpha=0.0, leak=None) < 1e-12
    assert writer_parts(alpha=1.0, leak=0) > 10, "the plain residual lets it through"


def test_eq_45_segments_are_blocks_of_j():
    lengths = (9, 4)
    x, f, beta, alpha = draw(2, T, D), draw(2, T, D, seed=1), draw(D, seed=2), draw(D, seed=3)
    together = split_merge(x, f, beta, alpha, None, Segments(lengths))
    apart = [split_merge(x[:, s], f[:, s], beta, alpha) for s in (slice(0, 9), slice(9, T))]
    torch.testing.assert_close(together, torch.cat(apart, dim=1))
    assert (together - split_merge(x, f, beta, alpha)).abs().max() > 0.1, "one mean is another op"


def test_eq_49_to_54_closed_form_backward():
    """Written out for MV-Split as the paper does, over Z rather than over the saved output."""
    lengths, eps = (9, 4), 1e-2
    x, f = (draw(1, T, D, seed=i).requires_grad_() for i in (0, 1))
    beta, alpha = (draw(D, seed=i).requires_grad_() for i in (2, 3))
    g = draw(1, T, D, seed=4)
    y = split_merge(x, f, beta, alpha, None, Segments(lengths), eps)
    ours = torch.autograd.grad(y, (x, f, beta, alpha), g)
    with torch.no_grad():
        j = averaging_matrix(lengths)
        z = x + beta * (f - j @ f) + alpha * (j @ (f - x))
        r = (z.pow(2).sum(-1, keepdim=True) / D + eps).rsqrt()  # Eq. 49
        delta = r * g - z * (r**3 / D) * (g * z).sum(-1, keepdim=True)  # Eq. 50
        delta_bar = j @ delta  # Eq. 51
        expected = (
            delta - alpha * delta_bar,  # Eq. 52
            beta * delta + (alpha - beta) * delta_bar,  # Eq. 53
            (delta * (f - j @ f)).sum((0, 1)),  # Eq. 54
            (delta * (j @ f - j @ x)).sum((0, 1)),
        )
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_lemma_1_equal_values_silence_queries_and_keys_but_not_the_writer():
    q, k = (t.requires_grad_() for t in queries_and_keys(seed=5))
    writer = nn.Linear(D, D, bias=False, dtype=torch.float64)
    g = draw(1, 1, T, D, seed=6)

    def gradients(spread):
        values = draw(1, 1, 1, D, seed=7) + spread * draw(1, 1, T, D, seed=8)
        out = writer(functional.scaled_dot_product_attention(q, k, values))
        return [t.norm() for t in torch.autograd.grad(out, (q, k, writer.weight), g)]

    q_equal, k_equal, writer_equal = gradients(spread=0.0)
    assert max(q_equal, k_equal) < 1e-13 * writer_equal
    q_small, k_small, _ = gradients(spread=1e-3)
    q_large, k_large, _ = gradients(spread=2e-3)
    torch.testing.assert_close(q_large / q_small, torch.tensor(2.0).double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(k_large / k_small, torch.tensor(2.0).double(), rtol=1e-9, atol=0)
