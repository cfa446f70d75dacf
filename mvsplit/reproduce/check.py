"""What must hold before runs on a device are worth anything: a short one repeats, and learns."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from mvsplit.training import Experiment, train
from mvsplit.training.files import read_lines

ALIKE = 0.02  # of a loss: kernels that add in no fixed order
LEARNED = 0.8  # of the first loss


def check_training(experiment: Experiment) -> str:
    """Trains twice and says in a sentence what came out.

    Raises:
        RuntimeError: two runs of one seed are not alike, or a loss is not finite or does not fall.
    """
    first, second = (_losses(experiment) for _ in range(2))
    apart = [abs(a - b) / b for a, b in zip(first, second, strict=True)]
    if not all(share < ALIKE for share in apart):  # NaN is not
        raise RuntimeError(f"two runs of one seed differ: {first} and {second}")
    fell = f"loss {first[0]:.3f} → {first[-1]:.3f}"
    if not (math.isfinite(first[0]) and first[-1] < LEARNED * first[0]):
        raise RuntimeError(f"a short run does not learn: {fell}")
    return f"check: {fell}, two runs within {max(apart):.1e}"


def _losses(experiment: Experiment) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, folder)
        return [line["loss"] for line in read_lines(Path(folder) / "metrics.jsonl")]
