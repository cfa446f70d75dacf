"""The Fréchet distance against other ways to compute it, in fp64."""

import numpy as np
import pytest
import torch

from mvsplit.data import Digits
from mvsplit.errors import UserError
from mvsplit.evaluation.digits import digit_frechet
from mvsplit.evaluation.frechet import _random_weights, fixed_features, frechet_distance


def cloud(count, width, seed, stretch=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    points = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return points @ mix * stretch + torch.randn(width, generator=generator, dtype=torch.float64)


def by_eigenvalues(a, b):
    """As ADM and torch-fidelity: the roots of the eigenvalues of the product, not symmetric."""
    a, b = a.numpy(), b.numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(first) + np.trace(second) - 2 * roots


@pytest.mark.parametrize(("counts", "width"), [((50, 71), 7), ((300, 40), 13), ((9, 30), 20)])
def test_it_is_the_formula(counts, width):
    a, b = cloud(counts[0], width, 1), cloud(counts[1], width, 2, stretch=1.7)
    assert frechet_distance(a, b) == pytest.approx(by_eigenvalues(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_of_independent_features_it_is_a_sum_over_them():
    a = torch.tensor([[-1.0, -2.0], [-1.0, 2.0], [1.0, -2.0], [1.0, 2.0]], dtype=torch.float64)
    b = a * torch.tensor([3.0, 0.5]) + torch.tensor([10.0, 0.0])
    variance = 4 / 3 * torch.tensor([1.0, 4.0])
    expected = 100 + float((variance * (1 - torch.tensor([3.0, 0.5])) ** 2).sum())
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_one_sample_has_no_covariance():
    with pytest.raises(UserError, match="two samples"):
        frechet_distance(cloud(1, 3, 0), cloud(5, 3, 0))


def test_fixed_features_are_what_a_plain_convolution_gives():
    pictures = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    x = pictures.clamp(-1, 1).double().numpy()
    expected = []
    for layer, width in enumerate((32, 64)):
        weight = _random_weights(layer, width, x.shape[1]).double().numpy()
        wide = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
        windows = np.lib.stride_tricks.sliding_window_view(wide, (5, 5), axis=(2, 3))[
            :, :, ::2, ::2
        ]
        x = np.maximum(np.einsum("bchwij,ocij->bohw", windows, weight), 0)
        flat = x.reshape(*x.shape[:2], -1)
        expected += [flat.mean(2), flat.std(2, ddof=1)]
    np.testing.assert_allclose(fixed_features(pictures), np.concatenate(expected, 1), atol=1e-5)


def test_the_fixed_weights_are_normal_and_stay_what_they_are():
    weight = _random_weights(1, 64, 32) * (32 * 25) ** 0.5
    assert float(weight.mean()) == pytest.approx(0, abs=0.02)
    assert float(weight.std()) == pytest.approx(1, abs=0.02)
    assert float((weight.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)


def test_digits_that_are_worse_lie_further_away():
    digits = Digits()  # read from a file anew each time
    real = digits.fetch(range(600)).latents
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    found = [dict(digit_frechet(real + s * noise))["digit_frechet"] for s in (0.0, 0.3, 1.0)]
    assert found[0] < 0.5 * found[1] < 0.5 * found[2]
    sevens = real[[i for i in range(600) if int(digits.labels[i]) == 7]]
    assert dict(digit_frechet(sevens))["digit_frechet"] > 10 * found[0]
