"""What must hold before runs on a device are worth anything: a short one repeats, and learns."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from mvsplit.errors import UserError
from mvsplit.reproduce.workers import Stopped
from mvsplit.training import Experiment, train
from mvsplit.training.files import read_lines

ALIKE = 0.02  # of a loss: kernels that add in no fixed order
LEARNED = 0.8  # of the first loss


def check_minutes(minutes: float | None) -> None:
    """Raises UserError where they are not positive."""
    if minutes is not None and not minutes > 0:
        raise UserError(
            f"minutes={minutes:g}: nothing can be run in them; give more than 0, or leave "
            f"--minutes out to run to the end"
        )


def nearest_existing(path: Path) -> Path:
    """The path itself if it is there, else the nearest above it that is: where it can be made a
    folder, that is one."""
    return next(each for each in (path, *path.parents) if each.exists())


def check_training(experiment: Experiment) -> str:
    """Trains twice and says in a sentence what came out.

    Raises:
        RuntimeError: two runs of one seed are not alike, or a loss is not finite or does not fall.
        Stopped: SIGTERM or Ctrl-C came meanwhile.
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
        outcome = train(experiment, folder)
        if outcome.signal is not None:
            raise Stopped(outcome.signal)
        return [line["loss"] for line in read_lines(Path(folder) / "metrics.jsonl")]
