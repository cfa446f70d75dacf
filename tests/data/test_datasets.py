"""The real digits and the registry of data sets."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from mvsplit.data import DATASETS, Digits, Shapes, build_dataset
from mvsplit.errors import UserError


def test_digits_are_the_real_ones():
    raw, digits = load_digits(), Digits()
    assert len(digits) == digits.size == 1797
    order = [1796, 0, 5, 5]
    examples = digits.fetch(order)
    names = "zero one two three four five six seven eight nine".split()  # noqa: SIM905
    assert examples.captions == [names[raw.target[index]] for index in order]
    for latent, index in zip(examples.latents, order, strict=True):
        assert latent.dtype == torch.float32
        assert torch.equal(latent[0].double() * 8 + 8, torch.tensor(raw.images[index]))
    everything = digits.fetch(range(1797)).latents
    assert everything.shape == (1797, digits.channels, digits.height, digits.width)
    assert everything.min() == -1
    assert everything.max() == 1
    assert digits.labels.tolist() == raw.target.tolist()


@pytest.mark.parametrize("index", [-1, 1797])
def test_digits_has_no_other_samples(index):
    with pytest.raises(IndexError, match="digits has samples 0 … 1796"):
        Digits().fetch([0, index])


def test_registry_builds_by_name():
    assert set(DATASETS) == {"cache", "clips", "digits", "shapes"}
    assert isinstance(build_dataset("digits"), Digits)
    shapes = build_dataset("shapes", size=64, seed=3)
    assert torch.equal(shapes.fetch([5]).latents, Shapes(size=64, seed=3).fetch([5]).latents)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "digit",
            {},
            "data.dataset='digit' is unknown; did you mean digits? known: cache",
        ),
        (
            "shapes",
            {"sise": 32},
            "data.sise=32: dataset shapes: unknown option 'sise'; did you",
        ),
        (
            "digits",
            {"size": 8},
            "data.size=8: dataset digits: unknown option 'size'; choose",
        ),
    ],
)
def test_registry_errors(name, options, message):
    with pytest.raises(UserError) as caught:
        build_dataset(name, **options)
    assert str(caught.value).startswith(message)
