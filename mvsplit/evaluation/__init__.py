"""Evaluators that yield (name, value), and the passport that goes with every score."""

from mvsplit.evaluation.clip_reader import read_clips
from mvsplit.evaluation.clips import evaluate_clips
from mvsplit.evaluation.digits import CHANCE, digit_classifier, digit_frechet, evaluate_digits
from mvsplit.evaluation.frechet import frechet_distance
from mvsplit.evaluation.geneval import evaluate_shapes
from mvsplit.evaluation.held_out import held_out, validation_loss
from mvsplit.evaluation.passport import Evaluation, differences, read_evaluation, write_evaluation
from mvsplit.evaluation.reader import read_pictures

__all__ = [
    "CHANCE",
    "Evaluation",
    "differences",
    "digit_classifier",
    "digit_frechet",
    "evaluate_clips",
    "evaluate_digits",
    "evaluate_shapes",
    "frechet_distance",
    "held_out",
    "read_clips",
    "read_evaluation",
    "read_pictures",
    "validation_loss",
    "write_evaluation",
]
