"""What became of a run on the digits: the numbers and pictures that the demo shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvsplit.data import Digits
from mvsplit.diagnostics.logs import read_jsonl
from mvsplit.errors import UserError
from mvsplit.evaluation.digits import evaluate_digits
from mvsplit.sampling import SamplingConfig, generate
from mvsplit.training import load_run, read_experiment

DRAWN = 100  # pictures a run, ten of each digit
COLLAPSED_SIMILARITY = 0.99
COLLAPSED_LOSS = 0.75  # of the first loss
EXTINCT = 1e-3  # of the largest query gradient that the run had
DEAD_STEPS = 30  # for which all three must have held without a break
# Of what a network of so few steps draws, more is recognised with a guidance of 4 than of 2 or 3;
# beyond it adds little, and 8 steps draw as well as 12.
_SAMPLING = SamplingConfig(steps=8, guidance=4.0, shift=1.0, batch_size=DRAWN)


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A run's course and its drawings.

    Attributes:
        name: of the run.
        planned: steps of the whole run.
        steps, loss: [N] the step and loss of every logged step.
        seconds: median time of a step.
        probe_steps: [P] the steps of the probes.
        similarity: [P, L] token cosine similarity by probe and layer.
        query_gradient: [N] L2 of the query gradients of the deepest quarter.
        pictures: [100, 1, 8, 8], ten columns of digits 0 to 9.
        accuracy: share of the pictures recognised as what was asked for.
        accuracy_real: the same for held-out real digits.
        dead_since: the step from which on it was dead for good (`dead_since`), if it was.
    """

    name: str
    planned: int
    steps: NDArray[np.int64]
    loss: NDArray[np.float64]
    seconds: float
    probe_steps: NDArray[np.int64]
    similarity: NDArray[np.float64]
    query_gradient: NDArray[np.float64]
    pictures: Tensor
    accuracy: float
    accuracy_real: float
    dead_since: int | None = None

    @property
    def first_loss(self) -> float:
        return float(self.loss[0])

    @property
    def last_loss(self) -> float:
        """Mean of the last ten steps."""
        return float(self.loss[-10:].mean())

    @property
    def deep_similarity(self) -> float:
        """Token cosine similarity of the deepest quarter in the last probe."""
        return _deep(self.similarity[-1])

    @property
    def collapsed(self) -> bool:
        """All deep tokens alike, and the loss not far below where it began."""
        return (
            self.deep_similarity > COLLAPSED_SIMILARITY
            and self.last_loss > COLLAPSED_LOSS * self.first_loss
        )

    def numbers(self) -> dict[str, float | int | bool | None]:
        """What the demo's table shows, for a file."""
        return {
            "steps": int(self.steps[-1]),
            "steps_planned": self.planned,
            "seconds_per_step": round(self.seconds, 3),
            "first_loss": round(self.first_loss, 4),
            "last_loss": round(self.last_loss, 4),
            "deep_token_similarity": round(self.deep_similarity, 4),
            "deep_query_gradient": float(self.query_gradient[-1]),
            "digit_accuracy": self.accuracy,
            "digit_accuracy_real": round(self.accuracy_real, 4),
            "collapsed": self.collapsed,
            "dead_since": self.dead_since,
        }


def dead_since(run: Path) -> int | None:
    """The step from which on a run has been dead for good, None if it lives or cannot be told yet.

    From there on, for `DEAD_STEPS` steps or more, its query gradients are extinct, every look found
    all deep tokens alike, and the loss is near where it began. Alike tokens give queries and keys
    no gradient (paper Lemma 1) that could part them. A judgement, no proof: other weights have one.
    """
    paths = run / "metrics.jsonl", run / "layers.jsonl"
    if not all(path.exists() for path in paths):
        return None
    metrics = list(read_jsonl(paths[0]))
    gradient = np.array([line["grad_query"] for line in metrics])
    alive = ~(gradient < EXTINCT * np.maximum.accumulate(gradient))
    dead = metrics[int(np.flatnonzero(alive)[-1]) + 1 :] if metrics else []
    if not dead or dead[-1]["step"] - dead[0]["step"] < DEAD_STEPS:
        return None
    since = int(dead[0]["step"])
    looks = [_deep(np.array(k["tcs"])) for k in read_jsonl(paths[1]) if k["step"] >= since]
    alike = bool(looks) and min(looks) > COLLAPSED_SIMILARITY
    loss = np.mean([line["loss"] for line in dead])
    return since if alike and loss > COLLAPSED_LOSS * metrics[0]["loss"] else None


def _deep(similarity: NDArray[np.float64]) -> float:
    """Mean over the deepest quarter of [L]."""
    return float(similarity[-max(len(similarity) // 4, 1) :].mean())


def draw(run: Path, part: slice) -> Tensor:
    """The pictures `part` of the `DRAWN` that a run on the digits draws. [N, 1, 8, 8]

    Raises:
        UserError: the run has no checkpoint.
    """
    torch.set_num_threads(1)  # others draw or train on the other cores
    loaded = load_run(run)
    digits = Digits()
    prompts = [digits.vocabulary[label] for label in _labels()[: part.stop]]
    shape = (digits.channels, digits.height, digits.width)
    (drawn,) = generate(loaded.model, loaded.embedder, prompts, shape, _SAMPLING, first=part.start)
    return drawn.latents


def _labels() -> list[int]:
    return [i % 10 for i in range(DRAWN)]


def examine(run: Path, pictures: Tensor) -> Twin:
    """Reads the logs of a run on the digits, and what it drew.

    Args:
        pictures: all that `draw` draws. [100, 1, 8, 8]

    Raises:
        UserError: no layer of the run was looked into.
    """
    probes = list(read_jsonl(run / "layers.jsonl"))
    if not probes:
        raise UserError(f"{run} has no probe of its layers yet; train it on to its first")
    scores = dict(evaluate_digits(pictures, _labels()))
    metrics = list(read_jsonl(run / "metrics.jsonl"))
    return Twin(
        name=run.name,
        planned=read_experiment(run).train.steps,
        steps=np.array([line["step"] for line in metrics]),
        loss=np.array([line["loss"] for line in metrics]),
        seconds=float(np.median([line["seconds"] for line in metrics])),
        probe_steps=np.array([line["step"] for line in probes]),
        similarity=np.array([line["tcs"] for line in probes], dtype=np.float64),
        query_gradient=np.array([line["grad_query"] for line in metrics]),
        pictures=pictures,
        accuracy=scores["digit_accuracy"],
        accuracy_real=scores["digit_accuracy_real"],
        dead_since=dead_since(run),
    )
