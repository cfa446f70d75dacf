"""What became of a run on the digits: the numbers and pictures that the demo shows."""

from __future__ import annotations

import os
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
from mvsplit.training import load_run

DRAWN = 100  # pictures a run, ten of each digit
COLLAPSED_SIMILARITY = 0.99
COLLAPSED_LOSS = 0.75  # of the first loss


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
        layers = self.similarity.shape[1]
        return float(self.similarity[-1, -max(layers // 4, 1) :].mean())

    @property
    def collapsed(self) -> bool:
        """All deep tokens alike, and the loss not far below where it began."""
        return (
            self.deep_similarity > COLLAPSED_SIMILARITY
            and self.last_loss > COLLAPSED_LOSS * self.first_loss
        )

    def numbers(self) -> dict[str, float | int | bool]:
        """What the demo's table shows, for a file."""
        return {
            "steps": int(self.steps[-1]),
            "seconds_per_step": round(self.seconds, 3),
            "first_loss": round(self.first_loss, 4),
            "last_loss": round(self.last_loss, 4),
            "deep_token_similarity": round(self.deep_similarity, 4),
            "deep_query_gradient": float(self.query_gradient[-1]),
            "digit_accuracy": self.accuracy,
            "digit_accuracy_real": round(self.accuracy_real, 4),
            "collapsed": self.collapsed,
        }


def examine(run: Path, *, steps: int = 12, guidance: float = 2.0, seed: int = 0) -> Twin:
    """Draws with a finished run on the digits and reads its logs.

    Raises:
        UserError: the run has no checkpoint, or no layer of it was looked into.
    """
    probes = list(read_jsonl(run / "layers.jsonl"))
    if not probes:
        raise UserError(f"{run} has no probe of its layers yet; train it on to its first")
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # twins are examined side by side
    loaded = load_run(run)
    digits = Digits()
    labels = [i % 10 for i in range(DRAWN)]
    prompts = [digits.vocabulary[label] for label in labels]
    config = SamplingConfig(steps=steps, guidance=guidance, shift=1.0, seed=seed, batch_size=DRAWN)
    shape = (digits.channels, digits.height, digits.width)
    (drawn,) = generate(loaded.model, loaded.embedder, prompts, shape, config)
    scores = dict(evaluate_digits(drawn.latents, labels))
    metrics = list(read_jsonl(run / "metrics.jsonl"))
    return Twin(
        name=run.name,
        planned=loaded.experiment.train.steps,
        steps=np.array([line["step"] for line in metrics]),
        loss=np.array([line["loss"] for line in metrics]),
        seconds=float(np.median([line["seconds"] for line in metrics])),
        probe_steps=np.array([line["step"] for line in probes]),
        similarity=np.array([line["tcs"] for line in probes], dtype=np.float64),
        query_gradient=np.array([line["grad_query"] for line in metrics]),
        pictures=drawn.latents,
        accuracy=scores["digit_accuracy"],
        accuracy_real=scores["digit_accuracy_real"],
    )
