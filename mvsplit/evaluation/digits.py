"""How well drawn digits are recognised, by a classifier that knows only the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvsplit.data import Digits
from mvsplit.evaluation.frechet import frechet_distance
from mvsplit.evaluation.scores import share

if TYPE_CHECKING:
    from sklearn.svm import SVC

CHANCE = 0.1


@cache
def digit_classifier() -> tuple[SVC, float]:
    """A support-vector classifier of the real digits, and its accuracy on real digits that it has
    not seen (a quarter of them, held out)."""
    from sklearn.model_selection import train_test_split  # here: the import costs about a second
    from sklearn.svm import SVC

    digits = Digits()
    pixels = _pixels(digits.fetch(range(len(digits))).latents)
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        pixels, np.asarray(digits.labels), test_size=0.25, random_state=0
    )
    classifier = SVC(gamma=0.001, decision_function_shape="ovo").fit(seen, seen_labels)
    return classifier, float(classifier.score(held_out, held_out_labels))


def evaluate_digits(
    latents: Tensor,
    labels: Sequence[int],
    *,
    on_each: Callable[[list[float]], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Scores of drawn digits.

    Args:
        latents: [N, 1, 8, 8] in [−1, 1]; values outside are cut, as in a picture.
        labels: the digit that each was asked to be.
        on_each: given 1 for each picture that is read as asked, else 0.

    Yields:
        `digit_accuracy`, the share that the classifier reads as asked (chance is 0.1), its standard
        error, and `digit_accuracy_real`, the same for held-out real digits, which bounds what can
        be expected.
    """
    right = [digit == label for digit, label in zip(read_digits(latents), labels, strict=True)]
    if on_each is not None:
        on_each([float(each) for each in right])
    yield from share("digit_accuracy", right)
    yield "digit_accuracy_real", digit_classifier()[1]


def read_digits(latents: Tensor) -> list[int]:
    """What the classifier reads in [N, 1, 8, 8]; values outside [−1, 1] are cut."""
    classifier, _ = digit_classifier()
    return classifier.predict(_pixels(latents.clamp(-1, 1))).tolist()


def digit_frechet(latents: Tensor) -> Iterator[tuple[str, float]]:
    """`digit_frechet`: the Fréchet distance of drawn digits [N, 1, 8, 8] to all real ones, in the
    classifier's 45 margins, one for each pair of digits."""
    digits = Digits()
    real = digits.fetch(range(len(digits))).latents
    yield "digit_frechet", frechet_distance(_margins(latents.clamp(-1, 1)), _margins(real))


def _margins(latents: Tensor) -> Tensor:
    """[N, 45]: how far each is on the one side of the border between two digits."""
    classifier, _ = digit_classifier()
    return torch.from_numpy(classifier.decision_function(_pixels(latents)))


def _pixels(latents: Tensor) -> NDArray[np.float32]:
    """[N, 64] in 0…16, the scale on which the classifier's kernel width is usual."""
    return (latents.flatten(1).float().cpu().numpy() + 1) * 8
