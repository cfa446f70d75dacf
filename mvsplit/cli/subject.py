"""What `mvsplit sample` draws with: a trained run, or weights with an autoencoder and a text
encoder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from mvsplit.data import Embedder, sample_shape
from mvsplit.data.encoders import LatentEncoder, Pixels
from mvsplit.data.text_encoder import Padding, QwenEncoder
from mvsplit.data.vae import Flux2Autoencoder
from mvsplit.errors import UserError, nearest_run
from mvsplit.hub import load_weights
from mvsplit.hub.released import LikelyHeads
from mvsplit.hub.weights import ends_of
from mvsplit.models import DiT
from mvsplit.sampling import SamplingConfig
from mvsplit.training import Experiment, load_run, load_settings
from mvsplit.training.builders import build_codec, build_data, resolve_device

RELEASED_SHIFT = 4.0  # paper §5
RELEASED_ENDS = (128, 1024)  # channels of FLUX.2's latents, width of Qwen3-0.6B's states
DEFAULT_SIDE = 256  # pixels, of the released model
DTYPES: dict[str, torch.dtype | None] = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network that can draw.

    Attributes:
        model, embedder: the network and what encodes its prompts.
        shape: (C, H, W) of its latents, or of clips (C, F, H, W).
        codec: pictures in [−1, 1] to latents [B, C, H, W] and back.
        shift: of the time, where nothing else is asked for.
        shift_source: whose that is.
        title: for the progress bar.
        folder, name: where pictures go by default, and how their folder begins.
        record: what identifies it in the pictures' records.
    """

    model: DiT
    embedder: Embedder
    shape: tuple[int, ...]
    codec: LatentEncoder
    shift: float
    shift_source: str
    title: str
    folder: Path
    name: str
    record: dict[str, Any]

    @property
    def kind(self) -> Literal["picture", "clip"]:
        """What it draws."""
        return "picture" if len(self.shape) == 3 else "clip"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What draws.

    Attributes:
        source: a run's folder or one of its checkpoints; or weights: model.pt, a .safetensors file,
            a folder of shards, a diffusers folder.
        ema: the averaged weights, or the weights as trained.
        device: cpu, cuda, …; auto is cuda where there is one. On a CPU a narrow network is often
            faster with OMP_NUM_THREADS=1 before the command.
        vae: for weights, folder or hub id of the FLUX.2 autoencoder; that of a diffusers folder if
            not given.
        text_encoder: for weights, folder or hub id of Qwen3-0.6B; that of a diffusers folder if
            not given.
        padding: for weights, mask the padding of short prompts, or attend to it as the released
            code does; mask if not given.
        resolution: for weights, pixels of a side, or height x width; 256 if not given.
        num_heads: for weights in the released layout, width / 128 if not given.
        dtype: for weights, the dtype in which they run; keep runs them as stored.
    """

    source: tyro.conf.Positional[Path]
    ema: bool = True
    device: str = "auto"
    vae: str | None = None
    text_encoder: str | None = None
    padding: Literal["mask", "attend"] | None = None
    resolution: str | None = None
    num_heads: int | None = None
    dtype: Literal["keep", "fp32", "bf16"] = "keep"


def open_subject(args: Options, settings: Path | None = None) -> Subject:
    """The run or the weights at `args.source`.

    Args:
        args: what draws.
        settings: for weights of a run, the run whose data, words and shift they are drawn with.

    Raises:
        UserError: neither is there; options that do not belong to it, or do not fit.
    """
    run = find_run(args.source)
    if settings is not None:
        if run is not None:
            raise UserError(f"settings={settings}: {args.source} is a run and has its own")
        return _with_settings(args, settings)
    if run is not None:
        return _of_run(run, args)
    if args.source.exists() or args.source.suffix in (".pt", ".safetensors"):
        return _of_weights(args)
    raise nothing_at(args.source)


def sampling_config(args: object, subject: Subject) -> SamplingConfig:
    """What a command's options ask for, which are named as the fields of `SamplingConfig`; the
    time shift is the subject's where none is given.

    Raises:
        UserError: an option out of range.
    """
    given = {field.name: getattr(args, field.name) for field in fields(SamplingConfig)}
    if given["shift"] is None:
        given["shift"] = subject.shift
    return SamplingConfig(**given)


def nothing_at(source: Path) -> UserError:
    """What is said where neither a run nor weights are; names the run with the nearest name."""
    return UserError(f"no run at {source}; {nearest_run(source)}")


def find_run(path: Path) -> Path | None:
    """The run's folder of a run or of one of its checkpoints."""
    one = (path / "manifest.json").is_file() and path.parent.name == "checkpoints"
    run = path.parent.parent if one else path
    config = run / "config.json"
    return run if config.is_file() and "_class_name" not in _read(config) else None


def _refuse_options(args: Options, *names: str) -> None:
    """Of what a run brings with it."""
    for name in ("vae", "text_encoder", "padding", "resolution", *names):
        if (value := getattr(args, name)) is not None:
            raise UserError(f"{name}={value}: a run has its own; it is an option for weights")
    if args.dtype != "keep":
        raise UserError(f"dtype={args.dtype}: a run is drawn with as it was trained; leave it out")


def _of_run(run: Path, args: Options) -> Subject:
    _refuse_options(args, "num_heads")
    device = resolve_device(args.device, "--device")
    loaded = load_run(args.source, ema=args.ema, device=device)
    data = build_data(replace(loaded.experiment.data, verify=False))  # only its shape is asked
    weights = "averaged" if args.ema else "as trained"
    shift, shift_source = _shift_of_run(loaded.experiment)
    return Subject(
        model=loaded.model,
        embedder=loaded.embedder,
        shape=sample_shape(data),
        codec=build_codec(data, device),
        shift=shift,
        shift_source=shift_source,
        title=f"step {loaded.step}",
        folder=run / "samples",
        name=f"step_{loaded.step:08d}",
        record={"run": str(run), "step": loaded.step, "weights": weights},
    )


def _with_settings(args: Options, settings: Path) -> Subject:
    """The weights in the place of those of the run at `settings`."""
    run = find_run(settings)
    if run is None:
        raise nothing_at(settings)
    _refuse_options(args)
    device = resolve_device(args.device, "--device")
    trained = load_settings(settings)
    theirs = trained.experiment.model
    data = build_data(replace(trained.experiment.data, verify=False))  # only its shape is asked
    model = load_weights(
        args.source,
        ema=args.ema,
        num_heads=args.num_heads,
        likely_heads=LikelyHeads(
            count=theirs.heads, whose=f"those of the run {settings}", option="--num-heads"
        ),
        device=device,
    )
    for name in ("channels", "text_width", "patch_frames"):
        ours, needed = getattr(model.config, name), getattr(theirs, name)
        if ours != needed:
            raise UserError(
                f"settings={settings}: the run's model.{name} is {needed}, that of {args.source} "
                f"{ours}; name the run that the weights are from"
            )
    shift, shift_source = _shift_of_run(trained.experiment)
    return Subject(
        model=model.requires_grad_(False).eval(),
        embedder=trained.embedder,
        shape=sample_shape(data),
        codec=build_codec(data, device),
        shift=shift,
        shift_source=shift_source,
        title=args.source.name,
        folder=Path("samples"),
        name=args.source.stem,
        record={"weights": str(args.source), "settings": str(settings)},
    )


def _of_weights(args: Options) -> Subject:
    """The weights are read last: what is wrong with the rest is said before."""
    device, dtype = resolve_device(args.device, "--device"), DTYPES[args.dtype]
    shift, shift_source = _shift_of_weights(args.source)
    vae = _autoencoder(args, device)
    side = _side(args.resolution, 1 if vae is None else vae.multiple)
    padding: Padding = args.padding or "mask"
    text = QwenEncoder.load(_text_encoder(args), device=device, padding=padding)
    model = load_weights(
        args.source, ema=args.ema, num_heads=args.num_heads, dtype=dtype, device=device
    )
    model.requires_grad_(False).eval()
    multiple = _require_fit(model, vae, text, args)
    height, width = _side(args.resolution, multiple * model.config.patch)
    return Subject(
        model=model,
        embedder=text,
        shape=(model.config.channels, height // multiple, width // multiple),
        codec=Pixels() if vae is None else vae,
        shift=shift,
        shift_source=shift_source,
        title=args.source.name,
        folder=Path("samples"),
        name=args.source.stem,
        record={
            "weights": str(args.source),
            "vae": args.vae,
            "text_encoder": args.text_encoder,
            "padding": padding,
            "resolution": list(side),
        },
    )


def _autoencoder(args: Options, device: torch.device) -> Flux2Autoencoder | None:
    source = args.vae or _beside(args.source, "vae")
    return None if source is None else Flux2Autoencoder.load(source, device=device)


def _text_encoder(args: Options) -> str:
    source = args.text_encoder or _beside(args.source, "text_encoder")
    if source is None:
        raise _without_text_encoder(args.source)
    return source


def _without_text_encoder(source: Path) -> UserError:
    """What is said of weights that bring none, by what their sizes tell of where they are from."""
    channels, width = ends_of(source)
    if (channels, width) == RELEASED_ENDS:
        return UserError(
            f"text_encoder: {source} holds none; give --text-encoder Qwen/Qwen3-0.6B, or a folder "
            "with it"
        )
    return UserError(
        f"text_encoder: {source} has no run's settings and is not of the released model's sizes "
        f"({channels} channels and text of width {width}, not {RELEASED_ENDS[0]} and "
        f"{RELEASED_ENDS[1]}); of a run (converted, merged or grown): sample and evaluate take its "
        f"settings with --settings RUN; or go on with mvsplit train PRESET --from {source}, of its "
        "shape, and name that run; of a training elsewhere: give its --text-encoder"
    )


def _beside(source: Path, part: str) -> str | None:
    """The pipeline's folder if it has such a part."""
    return str(source) if (source / part).is_dir() else None


def _side(resolution: str | None, multiple: int) -> tuple[int, int]:
    """Height and width in pixels of "256" or "256x384"."""
    numbers = (resolution or str(DEFAULT_SIDE)).lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(f"resolution={resolution}: give a side as 256, or height x width: 256x384")
    sides = [int(number) for number in numbers]
    for side in sides:
        if side < multiple or side % multiple:
            below = max(side // multiple, 1) * multiple
            raise UserError(
                f"resolution={resolution}: {side} is not a multiple of {multiple}, the pixels of a "
                f"token; choose {below} or {below + multiple}"
            )
    return sides[0], sides[-1]


def _require_fit(model: DiT, vae: Flux2Autoencoder | None, text: QwenEncoder, args: Options) -> int:
    """Pixels a latent, once the parts are known to belong together."""
    config = model.config
    if text.width != config.text_width:
        raise UserError(
            f"text_encoder: its states have width {text.width}, {args.source} takes "
            f"{config.text_width}; choose the encoder of the training"
        )
    if vae is None and config.channels not in (1, 3):
        raise UserError(
            f"vae: {args.source} draws latents of {config.channels} channels; give --vae, a folder "
            "or a hub id with the FLUX.2 autoencoder"
        )
    if vae is not None and vae.channels != config.channels:
        raise UserError(
            f"vae: its latents have {vae.channels} channels, those of {args.source} "
            f"{config.channels}; choose the autoencoder of the training"
        )
    return 1 if vae is None else vae.multiple


def _shift_of_run(experiment: Experiment) -> tuple[float, str]:
    """train.sample_shift, which a preset may set; else that of the training times."""
    if experiment.train.sample_shift is None:
        return experiment.train.time_shift, "of the run's training"
    return experiment.train.sample_shift, "of the run's sample_shift"


def _shift_of_weights(source: Path) -> tuple[float, str]:
    """That of a pipeline's scheduler; the paper's for other weights.

    Raises:
        UserError: the scheduler's file cannot be read.
    """
    config = source / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return RELEASED_SHIFT, "the paper's"
    try:
        shift = float(json.loads(config.read_text(encoding="utf-8")).get("shift", 1.0))
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{config}: has no shift that can be used ({error}); put the pipeline's own file "
            "there, or remove it and give --shift"
        ) from error
    return shift, "of the pipeline's scheduler"


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the reader of whatever it is says what is wrong
    return tree if isinstance(tree, dict) else {}
