"""`mvsplit sample RUN_OR_WEIGHTS --prompt …`: pictures from a trained run or released weights, or
clips from a run on clips."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from rich.console import Console
from rich.progress import TaskProgressColumn
from torch import Tensor

from mvsplit.cli.bars import progress_bar
from mvsplit.cli.given import read_edit
from mvsplit.cli.subject import Options, Subject, open_subject, sampling_config
from mvsplit.data import DATASETS
from mvsplit.errors import UserError
from mvsplit.sampling import (
    SAMPLERS,
    ClipFolder,
    Edit,
    PictureFolder,
    SamplingConfig,
    accelerated,
    generate,
    skip_least,
    to_clips,
    to_pictures,
)

RANKING_STEPS, RANKING_PICTURES = 4, 4  # of the look that ranks the blocks
GRID_AT_MOST = 256  # pictures; more would not be seen anyway
ROWS_AT_MOST = 32  # clips of a contact sheet
FPS = 8.0  # of clips


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Draws pictures with a trained run or weights; PNG files, a grid and metadata.jsonl. A run on
    clips draws clips: GIF files, a contact sheet and metadata.jsonl.

    Attributes:
        prompt: what to draw; "" for no condition. A run knows the words of its data (see above).
        settings: for weights converted or grown from a run, that run: its data's words, its shape
            and its shift are taken.
        num_images: how many pictures, or clips.
        frames: of a clip; only those of the run's training are possible, and are taken if not
            given.
        fps: frames a second at which a clip is shown; 8 if not given.
        mp4: write each clip as MP4 too (extra video).
        seed: of the noise; picture k has the same noise in any batch size.
        steps: of the sampler.
        sampler: euler and ab2 and dpmpp-2m evaluate the velocity once a step, heun twice
            (docs/samplers.md compares them).
        guidance: strength of classifier-free guidance; 1 is none. An evaluation with guidance runs
            the network twice, on the prompt and on none.
        guidance_interval: times low < t ≤ high at which there is guidance; 0 is data, 1 is noise.
        guidance_rescale: share in [0, 1] by which guided velocities get the deviation of unguided
            ones.
        shift: time shift; if not given, that of the run (train.sample_shift, or its training's), of
            a pipeline's scheduler, or 4 for released weights, as in the paper.
        image: a picture to begin with; it is cut and resized to what the network draws.
        strength: in (0, 1], how much of it is noise at the beginning; 0.6 if not given, 1 with a
            mask.
        mask: of the size of the picture; white is drawn anew, black stays as it is (with an
            autoencoder: its latents stay).
        skip_blocks: how many blocks to leave out, those that change the trunk least. It saves their
            time and costs quality, on the network measured in docs/samplers.md more than fewer
            steps do for the same time; try these first.
        batch_size: pictures at a time.
        out: a new folder for the pictures; one in RUN/samples, or in samples for weights, if not
            given.
    """

    prompt: str
    settings: Path | None = None
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 16
    frames: int | None = None
    fps: float | None = None
    mp4: bool = False
    seed: int = 0
    steps: int = 35
    sampler: str = "euler"
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    shift: float | None = None
    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    skip_blocks: int = 0
    batch_size: int = 16
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"num-images={self.num_images}: must be at least 1")
        if self.fps is not None and not 0.1 <= self.fps <= 100:
            raise UserError(f"fps={self.fps:g}: must be in 0.1 … 100 frames a second")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: no such run or checkpoint, a prompt it does not know, an option out of range.
    """
    prog = "mvsplit sample"
    run(tyro.cli(Arguments, args=list(arguments), prog=prog, description=describe()))
    return 0


def describe() -> str:
    """What the command does and what it can be asked for, for its help."""
    words = {
        name: ", ".join(data.vocabulary)
        for name, data in DATASETS.items()
        if hasattr(data, "vocabulary")
    }
    lines = [f"Words of a run on {name}: {known}." for name, known in words.items()]
    return "\n\n".join(
        (
            "Draws pictures with a trained run or weights; PNG files, a grid and metadata.jsonl. A "
            "run on clips draws clips: GIF files, a contact sheet and metadata.jsonl.",
            f"Samplers: {', '.join(SAMPLERS)}.",
            *lines,
            "A run on a cache and released weights take any words.",
        )
    )


def run(args: Arguments) -> None:
    """Draws the pictures and says where they are, also when it is interrupted."""
    subject = open_subject(args, args.settings)
    _check_clips(args, subject)
    config = sampling_config(args, subject)
    edit = read_edit(args.image, args.mask, args.strength, subject)
    subject.embedder.encode([args.prompt])  # an unknown word is an error before a folder is made
    subject = _shallower(subject, args, config)
    record = _record(args, config, edit, subject)
    folder, kind = args.out or _new_folder(subject, args), subject.kind
    output = _Clips(folder, record, args) if kind == "clip" else _Pictures(folder, record)
    print(_summary(args, config, edit, subject), flush=True)
    try:
        _draw(subject, config, args.num_images, edit, output)
    finally:
        print(f"{output.saved} of {args.num_images} {kind}s are in {folder}")


def _check_clips(args: Arguments, subject: Subject) -> None:
    """Raises UserError where options for clips do not fit what is drawn with."""
    if subject.kind == "picture":
        given = {"frames": args.frames, "fps": args.fps, "mp4": args.mp4 or None}
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"{name}={value}: {args.source} draws pictures; train on clips, for example "
                    "mvsplit train clips-tiny"
                )
        return
    frames = subject.shape[1]
    if args.frames not in (None, frames):
        raise UserError(
            f"frames={args.frames}: {args.source} was trained on clips of {frames} frames and "
            f"knows no other; leave --frames out, or train with --data.frames {args.frames}"
        )


def _shallower(subject: Subject, args: Arguments, config: SamplingConfig) -> Subject:
    """Without --skip-blocks of its blocks, after a short look at all of them."""
    look = replace(config, steps=RANKING_STEPS, sampler="euler", guidance=1.0)
    prompts = [args.prompt] * min(args.num_images, RANKING_PICTURES)
    model, skipped = skip_least(
        subject.model,
        args.skip_blocks,
        lambda network: list(generate(network, subject.embedder, prompts, subject.shape, look)),
    )
    record = {**subject.record, "skipped_blocks": skipped} if skipped else subject.record
    return replace(subject, model=model, record=record)


def _record(
    args: Arguments, config: SamplingConfig, edit: Edit | None, subject: Subject
) -> dict[str, Any]:
    """All that decides a picture, but for its index."""
    record = {
        "prompt": args.prompt,
        "seed": config.seed,
        "steps": config.steps,
        "sampler": config.sampler,
        "guidance": config.guidance,
        "guidance_interval": list(config.guidance_interval),
        "guidance_rescale": config.guidance_rescale,
        "shift": config.shift,
        **subject.record,
    }
    if edit is not None:
        record |= {"image": str(args.image), "strength": edit.strength}
        record |= {} if args.mask is None else {"mask": str(args.mask)}
    return record


def _summary(args: Arguments, config: SamplingConfig, edit: Edit | None, subject: Subject) -> str:
    """What is used, and how often the network runs."""
    source = f" ({subject.shift_source})" if args.shift is None else ""
    passes = config.passes(1.0 if edit is None else edit.strength)
    return (
        f"{config.sampler}, {config.steps} steps, guidance {config.guidance:g}, shift "
        f"{config.shift:g}{source}: {passes} passes of the network a {subject.kind}"
    )


class _Pictures:
    """Where pictures go as soon as their batch is done, and then the grid."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self._folder, self.record = PictureFolder(path), record
        self._first: list[Image.Image] = []
        self.saved = 0

    def add(self, indices: Sequence[int], decoded: Tensor) -> None:
        made = to_pictures(decoded)
        for index, picture in zip(indices, made, strict=True):
            self._folder.add(index, picture, {**self.record, "index": index})
            self.saved += 1
        self._first += made[: GRID_AT_MOST - len(self._first)]

    def finish(self) -> None:
        if self._first:
            self._folder.add_grid(self._first, self.record)


class _Clips:
    """Where clips go as soon as their batch is done, and then the contact sheet."""

    def __init__(self, path: Path, record: dict[str, Any], args: Arguments) -> None:
        fps = FPS if args.fps is None else args.fps
        self._folder, self.record = ClipFolder(path, fps, mp4=args.mp4), record
        self._first: list[list[Image.Image]] = []
        self.saved = 0

    def add(self, indices: Sequence[int], decoded: Tensor) -> None:
        made = to_clips(decoded)
        for index, frames in zip(indices, made, strict=True):
            self._folder.add_clip(index, frames, {**self.record, "index": index})
            self.saved += 1
        self._first += made[: ROWS_AT_MOST - len(self._first)]

    def finish(self) -> None:
        if self._first:
            self._folder.add_contact_sheet(self._first, self.record)


def _draw(
    subject: Subject,
    config: SamplingConfig,
    count: int,
    edit: Edit | None,
    output: _Pictures | _Clips,
) -> None:
    """Saves everything as soon as its batch is done, then all in one picture."""
    network = accelerated(subject.model, say=lambda choice: print(f"network: {choice}", flush=True))
    with progress_bar(Console(stderr=True), TaskProgressColumn()) as bar:
        task = bar.add_task(f"drawing with {subject.title}", total=count * config.steps)
        batches = generate(
            network,
            subject.embedder,
            [output.record["prompt"]] * count,
            subject.shape,
            config,
            edit=edit,
            on_step=lambda *, pictures: bar.advance(task, pictures),
        )
        try:
            for batch in batches:
                output.add(batch.indices, subject.codec.decode(batch.latents))
        finally:  # what is finished is shown together, also after Ctrl-C
            output.finish()


def _new_folder(subject: Subject, args: Arguments) -> Path:
    """NAME_seven_seed0, or the same with -2, -3, … where that is taken."""
    words = re.sub(r"\W+", "-", args.prompt).strip("-").lower()[:40] or "unconditional"
    name = f"{subject.name}_{words}_seed{args.seed}"
    suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    folders = (subject.folder / f"{name}{suffix}" for suffix in suffixes)
    return next(folder for folder in folders if not folder.exists())
