"""`mvsplit encode SOURCE OUT …`: pictures and captions to a cache that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from mvsplit.cli.bars import progress_bar
from mvsplit.data import (
    EncodeConfig,
    Encoders,
    encode,
    load_latent_encoder,
    load_text_encoder,
    open_source,
)
from mvsplit.data.manifest import Manifest
from mvsplit.data.sources import Source
from mvsplit.errors import UserError
from mvsplit.training.builders import resolve_device


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Encodes pictures and captions once, so that training needs no VAE and no text encoder. The
    same command goes on where it was interrupted.

    Attributes:
        source: a folder of pictures, .parquet or .tar files, or a hub data set OWNER/NAME[:CONFIG].
        out: the cache's folder.
        vae: folder or hub id of a FLUX.2 autoencoder; pixels to train on pixels.
        text_encoder: folder or hub id of a Qwen3 model; words:WIDTH for words without meaning.
        split: of a hub data set.
        streaming: read a hub data set as it arrives, keeping nothing of it.
        image_column: of a data set, where the usual names do not fit.
        caption_column: of a data set, where the usual names do not fit.
        shard: i/n: do the i-th of n parts, counted from 0, so that n processes share the work.
        device: cpu, cuda, …; auto is cuda where there is one.
    """

    source: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    vae: str = "black-forest-labs/FLUX.2-dev"
    text_encoder: str = "Qwen/Qwen3-0.6B"
    config: Annotated[EncodeConfig, tyro.conf.arg(name="")] = field(default_factory=EncodeConfig)
    split: str = "train"
    streaming: bool = False
    image_column: str | None = None
    caption_column: str | None = None
    shard: str = "0/1"
    device: str = "auto"


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: nothing to encode, other settings than the folder was begun with, too many broken
            pictures.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit encode")
    part, device = _part(args.shard), resolve_device(args.device, "--device")
    source = open_source(
        args.source,
        split=args.split,
        streaming=args.streaming,
        image_column=args.image_column,
        caption_column=args.caption_column,
    )
    encoders = Encoders(
        vae=load_latent_encoder(args.vae, device),
        text=load_text_encoder(args.text_encoder, device),
        vae_name=_lasting(args.vae),
        text_name=_lasting(args.text_encoder),
    )
    console = Console(stderr=True)
    with progress_bar(console, MofNCompleteColumn(), transient=True) as bar:
        manifest = _run(args, source, encoders, part, bar)
    _say_what_is_there(args.out, manifest)
    return 0


def _run(
    args: Arguments, source: Source, encoders: Encoders, part: tuple[int, int], bar: Progress
) -> Manifest | None:
    task = bar.add_task("encoding", total=source.size)

    def on_shard(records: int, broken: list[list[str]]) -> None:
        bar.advance(task, records)
        for name, reason in broken:
            bar.console.print(f"skipped {name}: {reason}", markup=False, highlight=False)

    return encode(
        source,
        args.out,
        encoders,
        args.config,
        part=part,
        device=resolve_device(args.device, "--device"),
        on_shard=on_shard,
    )


def _say_what_is_there(out: Path, manifest: Manifest | None) -> None:
    if manifest is None:
        print(f"this part of {out} is done; the cache is whole when the other parts are")
        return
    shapes = sorted({shape for shard in manifest.shards for shape in shard.pictures})
    broken = sum(len(shard.broken) for shard in manifest.shards)
    tokens = sum(shard.tokens for shard in manifest.shards)
    text = f"{tokens} text tokens of {manifest.settings.text_encoder_name}"
    channels = len(manifest.latents["mean"])
    print(f"{out}: {manifest.pictures} pictures, {broken} skipped, {text}")
    print(f"latents of {channels} channels, {len(shapes)} shapes: {', '.join(shapes)}")


def _lasting(name: str) -> str:
    """A folder's full path, so that it is found from anywhere; another name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _part(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UserError(f"shard={text!r}: write i/n with i in 0 … n-1, for example 0/4")
    return int(first), int(second)
