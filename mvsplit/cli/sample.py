"""`mvsplit sample RUN_OR_WEIGHTS --prompt …`: pictures from a trained run or released weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mvsplit.cli.subject import Options, Subject, open_subject
from mvsplit.errors import UserError
from mvsplit.sampling import PictureFolder, SamplingConfig, generate, to_pictures

GRID_AT_MOST = 256  # pictures; more would not be seen anyway


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Draws pictures with a trained run or weights; PNG files, a grid and metadata.jsonl.

    Attributes:
        prompt: what to draw; "" for no condition.
        num_images: how many pictures.
        seed: of the noise; picture k has the same noise in any batch size.
        steps: Euler steps, each two evaluations of the network.
        guidance: strength of classifier-free guidance; 1 is none.
        shift: time shift; that of the run's training if not given.
        batch_size: pictures at a time.
        out: a new folder for the pictures; one in RUN/samples, or in samples for weights, if not
            given.
    """

    prompt: str
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 16
    seed: int = 0
    steps: int = 35
    guidance: float = 2.0
    shift: float | None = None
    batch_size: int = 16
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"num-images={self.num_images}: must be at least 1")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: no such run or checkpoint, a prompt it does not know, an option out of range.
    """
    run(tyro.cli(Arguments, args=list(arguments), prog="mvsplit sample"))
    return 0


def run(args: Arguments) -> None:
    """Draws the pictures and says where they are, also when it is interrupted."""
    subject = open_subject(args)
    shift = subject.shift if args.shift is None else args.shift
    config = SamplingConfig(
        steps=args.steps,
        guidance=args.guidance,
        shift=shift,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    subject.embedder.encode([args.prompt])  # an unknown word is an error before a folder is made
    pictures = PictureFolder(args.out or _new_folder(subject, args))
    record = {
        "prompt": args.prompt,
        "seed": args.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "shift": shift,
        **subject.record,
    }
    try:
        _draw(subject, config, args.num_images, pictures, record)
    finally:
        saved = len(list(pictures.path.glob("[0-9]*.png")))
        print(f"{saved} of {args.num_images} pictures are in {pictures.path}")


def _draw(
    subject: Subject,
    config: SamplingConfig,
    count: int,
    folder: PictureFolder,
    record: dict[str, Any],
) -> None:
    """Saves every picture as soon as its batch is done, then the grid."""
    first: list[Image.Image] = []
    with _progress() as bar:
        task = bar.add_task(f"drawing with {subject.title}", total=count * config.steps)
        batches = generate(
            subject.model,
            subject.embedder,
            [record["prompt"]] * count,
            subject.shape,
            config,
            on_step=lambda *, pictures: bar.advance(task, pictures),
        )
        for batch in batches:
            made = to_pictures(subject.decode(batch.latents))
            for index, picture in zip(batch.indices, made, strict=True):
                folder.add(index, picture, {**record, "index": index})
            first += made[: GRID_AT_MOST - len(first)]
    folder.add_grid(first, record)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _new_folder(subject: Subject, args: Arguments) -> Path:
    """NAME_seven_seed0, or the same with -2, -3, … where that is taken."""
    words = re.sub(r"\W+", "-", args.prompt).strip("-").lower()[:40] or "unconditional"
    name = f"{subject.name}_{words}_seed{args.seed}"
    suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    folders = (subject.folder / f"{name}{suffix}" for suffix in suffixes)
    return next(folder for folder in folders if not folder.exists())
