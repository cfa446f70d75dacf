"""What each score says, in which unit, and which way is better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mvsplit.evaluation.scores import STDERR

SPREAD = (
    "± is one standard error, over the pictures or samples of this evaluation; ± ? where none is "
    "known"
)
_SHARE = "share, 0 to 1, higher is better"
_DISTANCE = "distance, no unit, 0 is best, lower is better"
_LOSS = "squared error of the velocity, mean over its values, lower is better"


@dataclass(frozen=True)
class Meaning:
    """Of the scores whose whole name `pattern` matches.

    Attributes:
        measure: unit and range, and which way is better.
        says: what is measured.
    """

    pattern: str
    measure: str
    says: str


MEANINGS = (
    Meaning("validation_loss", _LOSS, "on samples that the training has not seen"),
    Meaning(
        r"validation_loss_t[\d.]+-[\d.]+",
        _LOSS,
        "the same at times t between these two; t is 0 at the data and 1 at pure noise",
    ),
    Meaning(
        "digit_accuracy",
        f"{_SHARE}, 0.1 is chance",
        "of the drawn digits, what a classifier of real digits reads as the digit asked for",
    ),
    Meaning(
        "digit_accuracy_real",
        f"{_SHARE}, the bound of digit_accuracy",
        "the same of real digits that this classifier has not seen; says nothing of the network",
    ),
    Meaning(
        "digit_frechet",
        _DISTANCE,
        "Fréchet distance of the drawn digits from all real ones, in the margins of that "
        "classifier",
    ),
    Meaning("geneval_mean", _SHARE, "mean of GenEval's tasks; as many pictures are drawn for each"),
    Meaning(
        "geneval_.*",
        _SHARE,
        "of the pictures of this task of GenEval, those that show what it asks for; further "
        "objects do no harm but where they are counted",
    ),
    Meaning(
        "caption_exact",
        _SHARE,
        "of the pictures, those that show all that the caption says and nothing else",
    ),
    Meaning(
        "unnamed_objects",
        "share, 0 to 1, lower is better",
        "of all objects seen, those of no shape or no colour that there is",
    ),
    Meaning(
        "shapes_frechet",
        _DISTANCE,
        "Fréchet distance from rendered pictures in features of a fixed network of random "
        "weights: colours, edges and textures, not whether the caption is met",
    ),
    Meaning("clip_objects", _SHARE, "of the clips, those with the objects of the caption"),
    Meaning(
        "clip_direction",
        _SHARE,
        "of the clips, those in which each object goes as the caption says",
    ),
    Meaning("clip_speed", _SHARE, "of the clips that say a speed, those that move at it"),
    Meaning("clip_bounce", _SHARE, "of the clips that say a bounce, those in which it turns back"),
    Meaning(
        "clip_occlusion",
        _SHARE,
        "of the clips in which two objects pass, those with the right one in front",
    ),
    Meaning(
        "clip_exact",
        _SHARE,
        "of the clips, those that show all that the caption says and nothing else",
    ),
    Meaning(
        "clip_.*",
        _SHARE,
        "of the clips of this motion, those that show all that the caption says and nothing else",
    ),
    Meaning("fid", _DISTANCE, "Fréchet distance from the real pictures in Inception's features"),
    Meaning(
        "inception_score",
        "no unit, 1 or more, higher is better",
        "how sure Inception is of each picture and how various all are; real pictures play no part",
    ),
    Meaning(
        "inception_score_std",
        "no unit, neither way is better",
        "standard deviation of that score over its parts of 5000 pictures",
    ),
    Meaning(
        "precision", _SHARE, "of the drawn pictures, those that lie among the real ones: fidelity"
    ),
    Meaning("recall", _SHARE, "of the real pictures, those that lie among the drawn ones: variety"),
)


def meaning_of(score: str) -> Meaning | None:
    """Of a score by its name; the first that matches. None where this version has no such score."""
    return next((each for each in MEANINGS if re.fullmatch(each.pattern, score)), None)


def explain_scores(scores: Iterable[str]) -> Iterator[str]:
    """A line for each meaning among `scores`, with the names that have it, in their order; then
    what the errors are."""
    for meaning, names in _by_meaning(scores).items():
        what = "of another version of mvsplit, not known to this one"
        if meaning is not None:
            what = f"{meaning.says} ({meaning.measure})"
        yield f"{_few(names)}: {what}"
    yield SPREAD


def list_scores(scores: Iterable[str]) -> str:
    """Their names in a line, of many with one meaning the first and the last."""
    return ", ".join(map(_few, _by_meaning(scores).values()))


def _by_meaning(scores: Iterable[str]) -> dict[Meaning | None, list[str]]:
    named: dict[Meaning | None, list[str]] = {}
    for score in scores:
        if not score.endswith(STDERR):
            named.setdefault(meaning_of(score), []).append(score)
    return named


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 2 else [names[0], "…", names[-1]])
