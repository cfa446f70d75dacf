"""The judge of drawn digits is judged on real ones, on wrong labels and on noise."""

import torch

from mvsplit.data import Digits
from mvsplit.evaluation import CHANCE, digit_classifier, evaluate_digits
from mvsplit.evaluation.digits import read_digits


def real(count=300):
    digits = Digits()
    return digits.fetch(range(count)).latents, [int(label) for label in digits.labels[:count]]


def test_real_digits_are_recognised_and_wrong_labels_are_not():
    latents, labels = real()
    assert dict(evaluate_digits(latents, labels))["digit_accuracy"] > 0.97
    wrong = [(label + 1) % 10 for label in labels]
    assert dict(evaluate_digits(latents, wrong))["digit_accuracy"] < 0.02


def test_noise_is_read_at_about_chance():
    noise = torch.rand(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    accuracy = dict(evaluate_digits(noise, [i % 10 for i in range(1000)]))["digit_accuracy"]
    assert abs(accuracy - CHANCE) < 0.05  # five standard deviations of 1000 draws at 0.1


def test_values_outside_are_cut_as_in_a_picture():
    latents, labels = real()
    stretched = torch.where(latents.abs() == 1, latents * 50, latents)
    assert dict(evaluate_digits(stretched, labels)) == dict(evaluate_digits(latents, labels))


def test_held_out_accuracy_is_measured_on_digits_it_has_not_seen():
    classifier, held_out = digit_classifier()
    assert 0.97 < held_out <= 1
    latents, _ = real(len(Digits()))
    seen = {row.tobytes() for row in classifier.support_vectors_.astype("float32")}
    rows = [((latents[i].flatten() + 1) * 8).numpy().tobytes() for i in range(len(latents))]
    assert sum(row in seen for row in rows) < 0.76 * len(rows)


def test_what_is_no_digit_is_read_as_one_all_the_same():
    """As docs/evaluation.md says of a plain grey picture."""
    assert read_digits(torch.zeros(1, 1, 8, 8)) == [8]
