"""`mvsplit pairs RUN --out FILE`: draws captions twice and keeps which picture was better.

`mvsplit train PRESET --from RUN --objective dpo --data.pairs FILE` learns from them
(docs/alignment.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn
from torch import Tensor

from mvsplit.cli.bars import progress_bar
from mvsplit.cli.subject import Options, Subject, find_run, nothing_at, open_subject
from mvsplit.data import Shapes
from mvsplit.data.digits import NAMES
from mvsplit.data.pairs import write_pairs
from mvsplit.errors import UserError
from mvsplit.evaluation.geneval import geneval_indices, scenes_at
from mvsplit.evaluation.preference import Judge, draw_pairs, judge_of_digits, judge_of_shapes
from mvsplit.sampling import SamplingConfig
from mvsplit.training import read_experiment
from mvsplit.training.builders import build_data


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Draws captions of a run's training twice, has both pictures judged by the truth, and writes
    those pairs of which one is better as a parquet file: caption, chosen, rejected. On shapes an
    exact reader judges, on digits a classifier of real ones.

    Attributes:
        out: the parquet file, a new one.
        captions: that are drawn twice; of shapes, those of GenEval's six tasks in turn.
        seed: of the noise.
        steps: of the sampler.
        sampler: as in mvsplit sample.
        guidance: as in mvsplit sample.
        shift: as in mvsplit sample.
        batch_size: pictures at a time.
    """

    out: Path
    captions: int = 1024
    seed: int = 0
    steps: int = 20
    sampler: str = "ab2"
    guidance: float = 2.0
    shift: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.captions < 1:
            raise UserError(f"captions={self.captions}: must be at least 1")
        if self.out.exists():
            raise UserError(f"out={self.out}: exists; choose another file")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: no run of shapes or digits; the file exists; no pair was found.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit pairs")
    captions, judge = _asked(args)
    subject = open_subject(args)
    won: Counter[tuple[int, int]] = Counter()
    written = write_pairs(args.out, _draw(args, subject, captions, judge, won))
    words = ", ".join(f"{n} with {b} over {w}" for (b, w), n in sorted(won.items(), reverse=True))
    print(f"wrote {written} pairs of {len(captions)} captions to {args.out} (points: {words})")
    return 0


def _asked(args: Arguments) -> tuple[list[str], Judge]:
    """The captions, and who judges their pictures."""
    run = find_run(args.source)
    if run is None and not args.source.exists():
        raise nothing_at(args.source)
    data = None if run is None else read_experiment(run).data
    if data is None or data.dataset not in ("shapes", "digits"):
        raise UserError(
            f"source={args.source}: only of shapes and digits the truth is known; give a run on "
            f"one of them, or a parquet file of your own to mvsplit train"
        )
    if data.dataset == "digits":
        labels = [k % len(NAMES) for k in range(args.captions)]
        return [NAMES[label] for label in labels], judge_of_digits(labels)
    shapes = build_data(data)
    assert isinstance(shapes, Shapes)
    scenes = scenes_at(shapes, geneval_indices(shapes, args.captions))
    return [scene.caption for scene in scenes], judge_of_shapes(scenes)


def _draw(
    args: Arguments,
    subject: Subject,
    captions: list[str],
    judge: Judge,
    won: Counter[tuple[int, int]],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The pairs as they are found; `won` counts them by points.

    Raises:
        UserError: there was none.
    """
    config = SamplingConfig(
        steps=args.steps,
        sampler=args.sampler,
        guidance=args.guidance,
        shift=subject.shift if args.shift is None else args.shift,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    with progress_bar(Console(stderr=True), MofNCompleteColumn()) as bar:
        task = bar.add_task("drawing", total=2 * len(captions) * config.steps)
        for found in draw_pairs(
            subject.model,
            subject.embedder,
            captions,
            subject.shape,
            config,
            judge,
            decode=subject.codec.decode,
            on_step=lambda *, pictures: bar.advance(task, pictures),
        ):
            won.update(found.points)
            texts = (captions[place] for place in found.places)
            yield from zip(texts, found.chosen, found.rejected, strict=True)
    if not won:
        raise UserError(
            f"captions={args.captions}: of none was one picture better than the other; draw more, "
            f"or train the run further"
        )
