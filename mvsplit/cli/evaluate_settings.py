"""What `mvsplit evaluate` can be asked for, and the name that an evaluation of it has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mvsplit.cli.subject import DEFAULT_SIDE, Options, Subject
from mvsplit.errors import UserError
from mvsplit.sampling import SamplingConfig
from mvsplit.sampling.guidance import EVERYWHERE
from mvsplit.training.builders import resolve_device

_SHORT = 24  # letters of a file's name in that of an evaluation


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Scores a trained run or weights, and writes with the scores a passport: all that they depend
    on. The same command goes on where it was interrupted. `mvsplit evaluate compare A B …` shows
    scores side by side, if their passports agree in everything but the weights.

    Attributes:
        settings: as in mvsplit sample; the run's data are what the weights are scored on, as its
            own would be.
        num_images: pictures drawn for the scores; 0 for none.
        validation_samples: samples of the validation loss; 0 for none; 256, or what there is, if
            not given.
        validation_data: for a run on a cache, another cache, of pictures that it was not trained
            on.
        reference: real pictures, for FID, Inception Score, precision and recall (extra eval): a
            folder, or ADM's .npz.
        inception: the file with the Inception weights of torch-fidelity.
        prompts: file with one prompt a line, which are used in turn; else the captions of held-out
            samples.
        seed: of the noise, for drawing and for the validation loss.
        steps: of the sampler.
        sampler: as in mvsplit sample.
        guidance: as in mvsplit sample.
        guidance_interval: as in mvsplit sample.
        guidance_rescale: as in mvsplit sample.
        shift: as in mvsplit sample.
        batch_size: pictures at a time.
        name: of the evaluation, one folder's; all settings that are not as by default if not
            given.
        json: where scores and passport go too, besides RUN/evaluations/NAME.json.
    """

    settings: Path | None = None
    num_images: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 600
    validation_samples: int | None = None
    validation_data: Path | None = None
    reference: Path | None = None
    inception: Path | None = None
    prompts: Path | None = None
    seed: int = 0
    steps: int = 35
    sampler: str = "euler"
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    shift: float | None = None
    batch_size: int = 64
    name: str | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        for field in ("num_images", "validation_samples"):
            if (getattr(self, field) or 0) < 0:
                raise UserError(f"{field}={getattr(self, field)}: must not be negative")
        if self.name is not None:
            _require_folder_name(self.name)
        if (self.reference is None) != (self.inception is None):
            raise UserError(
                f"reference={self.reference}, inception={self.inception}: FID needs both, real "
                "pictures and the Inception weights"
            )


@dataclass(frozen=True, kw_only=True)
class Names:
    """Of one evaluation.

    Attributes:
        pictures: of the folder of what is drawn; evaluations that draw the same share it.
        scores: of the file with scores and passport.
    """

    pictures: str
    scores: str


def names_of(
    args: Arguments, subject: Subject, config: SamplingConfig, samples: int | None
) -> Names:
    """--name, or every setting in short, in a fixed order: what decides the pictures, then what
    they and the network are judged on. What is as by default is left out but for the first few.

    Args:
        samples: of the validation loss; None for as many as by default.
    """
    if args.name is not None:
        return Names(pictures=args.name, scores=args.name)
    pictures = (
        f"{subject.name}{'' if args.ema else '_no-ema'}_{config.sampler}{config.steps}"
        f"_g{config.guidance:g}_shift{config.shift:g}_seed{config.seed}_n{args.num_images}"
    )
    low, high = config.guidance_interval
    if (low, high) != EVERYWHERE:
        pictures += f"_interval{low:g}-{high:g}"
    if config.guidance_rescale:
        pictures += f"_rescale{config.guidance_rescale:g}"
    for word, path in (("prompts", args.prompts), ("val", args.validation_data)):
        pictures += "" if path is None else f"_{word}-{_short(path)}"
    if args.settings is not None:
        pictures += f"_settings-{_short(args.settings)}"
    for option, value in options_of_weights(args).items():
        pictures += f"_{option.replace('_', '-')}-{_short(value)}"
    if args.dtype != "keep":
        pictures += f"_{args.dtype}"
    if args.device != "auto":
        device = resolve_device(args.device, "--device").type
        pictures += "" if device == resolve_device("auto", "--device").type else f"_{device}"
    scores = pictures
    if samples is not None:
        scores += f"_v{samples}"
    if args.reference is not None:
        scores += f"_ref-{_short(args.reference)}"
    return Names(pictures=pictures, scores=scores)


def options_of_weights(args: Options) -> dict[str, Any]:
    """What weights without a run were given and is not as by default, for name and passport."""
    usual = {"padding": "mask", "resolution": str(DEFAULT_SIDE)}
    given = {
        option: getattr(args, option)
        for option in ("vae", "text_encoder", "padding", "resolution", "num_heads")
    }
    return {
        option: value
        for option, value in given.items()
        if value is not None and value != usual.get(option)
    }


def _short(value: object) -> str:
    """The last name of a path, as what may stand in a file's name."""
    last = Path(str(value)).resolve().name.removesuffix(".txt").removesuffix(".npz")
    return re.sub(r"[^\w.-]+", "-", last)[:_SHORT]


def _require_folder_name(name: str) -> None:
    """Raises UserError where `name` is not that of one folder."""
    one = name.isprintable() and not set(name) & set("/\\") and name.strip(". ")
    if not one:
        raise UserError(
            f"name={name}: must be the name of one folder in evaluations/; leave out / and .., or "
            "put a copy elsewhere with --json FILE"
        )
