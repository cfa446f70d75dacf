"""`mvsplit sample RUN --prompt …`: pictures from a trained run."""

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
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mvsplit.errors import UserError, nearest
from mvsplit.sampling import PictureFolder, SamplingConfig, generate, to_pictures
from mvsplit.training import LoadedRun, load_run
from mvsplit.training.builders import build_data, build_decoder, resolve_device

GRID_AT_MOST = 256  # pictures; more would not be seen anyway


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draws pictures with a trained run; PNG files, a grid and metadata.jsonl.

    Attributes:
        run: the run's folder, or one of its checkpoints.
        prompt: what to draw; "" for no condition.
        num_images: how many pictures.
        seed: of the noise; picture k has the same noise in any batch size.
        steps: Euler steps, each two evaluations of the network.
        guidance: strength of classifier-free guidance; 1 is none.
        shift: time shift; that of the run's training if not given.
        ema: the averaged weights, or the weights as trained.
        batch_size: pictures at a time.
        device: cpu, cuda, …; auto is cuda where there is one.
        out: a new folder for the pictures; one in RUN/samples if not given.
    """

    run: tyro.conf.Positional[Path]
    prompt: str
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 16
    seed: int = 0
    steps: int = 35
    guidance: float = 2.0
    shift: float | None = None
    ema: bool = True
    batch_size: int = 16
    device: str = "auto"
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
    folder = _find_run(args.run)
    loaded = load_run(args.run, ema=args.ema, device=resolve_device(args.device))
    shift = loaded.experiment.train.time_shift if args.shift is None else args.shift
    config = SamplingConfig(
        steps=args.steps,
        guidance=args.guidance,
        shift=shift,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    loaded.embedder.encode([args.prompt])  # an unknown word is an error before a folder is made
    pictures = PictureFolder(args.out or _new_folder(folder / "samples", loaded.step, args))
    record = {
        "prompt": args.prompt,
        "seed": args.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "shift": shift,
        "run": str(folder),
        "step": loaded.step,
        "weights": "averaged" if args.ema else "as trained",
    }
    try:
        _draw(loaded, config, args.num_images, pictures, record)
    finally:
        saved = len(list(pictures.path.glob("[0-9]*.png")))
        print(f"{saved} of {args.num_images} pictures are in {pictures.path}")


def _draw(
    loaded: LoadedRun,
    config: SamplingConfig,
    count: int,
    folder: PictureFolder,
    record: dict[str, Any],
) -> None:
    """Saves every picture as soon as its batch is done, then the grid."""
    data = build_data(replace(loaded.experiment.data, verify=False))  # only its shape is asked
    decode = build_decoder(data, next(loaded.model.parameters()).device)
    shape = (data.channels, data.height, data.width)
    first: list[Image.Image] = []
    with _progress() as bar:
        task = bar.add_task(f"drawing with step {loaded.step}", total=count * config.steps)
        batches = generate(
            loaded.model,
            loaded.embedder,
            [record["prompt"]] * count,
            shape,
            config,
            on_step=lambda *, pictures: bar.advance(task, pictures),
        )
        for batch in batches:
            made = to_pictures(decode(batch.latents))
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


def _find_run(path: Path) -> Path:
    """The run's folder of a run or of one of its checkpoints."""
    if (path / "config.json").is_file():
        return path
    if (path / "manifest.json").is_file() and (path.parent.parent / "config.json").is_file():
        return path.parent.parent
    near = [*path.parent.glob("*/config.json"), *Path("runs").glob("*/config.json")]
    known = {str(config.parent) for config in near}
    remedy = nearest(str(path), known) if known else "train one first: mvsplit train tiny"
    raise UserError(f"no run at {path}; {remedy}")


def _new_folder(parent: Path, step: int, args: Arguments) -> Path:
    """step_00000040_seven_seed0, or the same with -2, -3, … where that is taken."""
    words = re.sub(r"\W+", "-", args.prompt).strip("-").lower()[:40] or "unconditional"
    name = f"step_{step:08d}_{words}_seed{args.seed}"
    suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    folders = (parent / f"{name}{suffix}" for suffix in suffixes)
    return next(folder for folder in folders if not folder.exists())
