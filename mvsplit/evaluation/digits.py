"""How well drawn digits are recognised, by a classifier that knows only the real ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from mvsplit.data import Digits

CHANCE = 0.1


@cache
def digit_classifier() -> tuple[SVC, float]:
    """A support-vector classifier of the real digits, and its accuracy on real digits that it has
    not seen (a quarter of them, held out)."""
    digits = Digits()
    pixels = _pixels(digits.fetch(range(len(digits))).latents)
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        pixels, np.asarray(digits.labels), test_size=0.25, random_state=0
    )
    classifier = SVC(gamma=0.001).fit(seen, seen_labels)
    return classifier, float(classifier.score(held_out, held_out_labels))


def evaluate_digits(latents: Tensor, labels: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Scores of drawn digits.

    Args:
        latents: [N, 1, 8, 8] in [−1, 1]; values outside are cut, as in a picture.
        labels: the digit that each was asked to be.

    Yields:
        `digit_accuracy`, the share that the classifier reads as asked (chance is 0.1), and
        `digit_accuracy_real`, the same for held-out real digits, which bounds what can be expected.
    """
    classifier, real = digit_classifier()
    read = classifier.predict(_pixels(latents.clamp(-1, 1)))
    yield "digit_accuracy", float((read == np.asarray(labels)).mean())
    yield "digit_accuracy_real", real


def _pixels(latents: Tensor) -> NDArray[np.float32]:
    """[N, 64] in 0…16, the scale on which the classifier's kernel width is usual."""
    return (latents.flatten(1).float().cpu().numpy() + 1) * 8
