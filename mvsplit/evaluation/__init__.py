"""Evaluators that yield (name, value)."""

from mvsplit.evaluation.digits import CHANCE, digit_classifier, evaluate_digits

__all__ = ["CHANCE", "digit_classifier", "evaluate_digits"]
