"""Makes a cache of latents and text states, shard by shard, each whole or not there.

Shard k holds pictures k·S … (k+1)·S − 1 of the source, so several processes can share the work and
one that was killed goes on with the first shard that is not there.

Shapes: N pictures of one bucket, V views, C, h, w of the latents, T tokens, Dc text width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from mvsplit.data.aspect import Shape, aspect_buckets, fit, nearest_bucket
from mvsplit.data.atomic import sha256
from mvsplit.data.encoders import LatentEncoder, TextEncoder, to_images
from mvsplit.data.manifest import (
    Manifest,
    Settings,
    ShardSummary,
    begin,
    finished,
    shard_file,
    write_manifest,
    write_summary,
)
from mvsplit.data.shards import caption_hash, offsets, pack_strings, write_shard
from mvsplit.data.sources import BrokenPicture, Record, Source
from mvsplit.errors import UserError

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How a cache is made.

    Attributes:
        resolution: side of a square picture; other shapes have about as many pixels.
        max_aspect: largest ratio of the longer side to the shorter; 1 cuts every picture square.
        multiple: of which every side in pixels is one; None for what the VAE needs.
        flips: also encode the mirror image of each picture, to draw from in training.
        dtype: of latents and text states on the disk.
        shard_size: pictures a shard; what a kill can cost.
        batch_size: pictures and captions that the encoders take at a time.
        max_broken: pictures that cannot be read before the whole is given up.
        workers: threads that read and scale pictures.
    """

    resolution: int = 256
    max_aspect: float = 2.0
    multiple: int | None = None
    flips: bool = False
    dtype: Dtype = "bfloat16"
    shard_size: int = 1024
    batch_size: int = 32
    max_broken: int = 10
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_broken < 0:
            raise UserError(f"max_broken={self.max_broken}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """A VAE and a text encoder with the names under which they can be loaded again."""

    vae: LatentEncoder
    text: TextEncoder
    vae_name: str = "pixels"
    text_name: str = "words"


OnShard = Callable[[int, list[list[str]]], None]


def encode(
    source: Source,
    out: Path,
    encoders: Encoders,
    config: EncodeConfig,
    *,
    part: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    on_shard: OnShard | None = None,
) -> Manifest | None:
    """Encodes what is not encoded yet.

    Args:
        source: pictures with captions.
        out: the cache's folder; new, or one that the same call has begun.
        encoders: on `device`.
        config: sizes, flips, limits.
        part: (i, n): the shards i, i + n, i + 2n, … are this process's.
        on_shard: told after every shard how many records are done and which were broken.

    Returns:
        The manifest once all shards are there, whoever made them; None before.

    Raises:
        UserError: the folder was begun with other settings, too many pictures are broken, or the
            disk is full.
    """
    if not 0 <= part[0] < part[1]:
        raise UserError(f"shard={part[0]}/{part[1]}: use 0/n … n-1/n")
    multiple = config.multiple or encoders.vae.multiple
    if multiple % encoders.vae.multiple:
        raise UserError(f"multiple={multiple}: the VAE needs multiples of {encoders.vae.multiple}")
    shapes = aspect_buckets(config.resolution, multiple, config.max_aspect)
    begin(out, _settings(source, encoders, config, multiple))
    job = _Job(out, encoders, config, shapes, torch.device(device))
    records = iter(source)
    summaries: list[ShardSummary | None] = []
    for number in count():
        chunk = list(islice(records, config.shard_size))
        if not chunk:
            break
        summary = finished(out, number)
        if summary is None and number % part[1] == part[0]:
            summary = job.make_shard(number, chunk)
        if summary is not None:
            job.count_broken(summary.broken)
        summaries.append(summary)
        if on_shard is not None:
            on_shard(len(chunk), summary.broken if summary else [])
    # Another process may have finished its part meanwhile; the last one to look sees all.
    whole = [s or finished(out, number) for number, s in enumerate(summaries)]
    present = [summary for summary in whole if summary is not None]
    return write_manifest(out, present) if len(present) == len(whole) else None


def _settings(source: Source, encoders: Encoders, config: EncodeConfig, multiple: int) -> Settings:
    return Settings(
        source=source.fingerprint(),
        vae=encoders.vae.fingerprint(),
        vae_name=encoders.vae_name,
        text_encoder=encoders.text.fingerprint(),
        text_encoder_name=encoders.text_name,
        resolution=config.resolution,
        multiple=multiple,
        max_aspect=config.max_aspect,
        flips=config.flips,
        dtype=config.dtype,
        shard_size=config.shard_size,
    )


@dataclass
class _Bucket:
    """The pictures of a shard that have one shape: those that wait, and those that are encoded."""

    pixels: list[np.ndarray] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # [n, V, C, h, w] each


@dataclass(frozen=True)
class _Ready:
    """A picture as the encoder takes it."""

    name: str
    pixels: np.ndarray  # [H, W, 3] uint8
    captions: tuple[str, ...]


@dataclass(frozen=True)
class _Broken:
    name: str
    reason: str


class _Job:
    """What turns records into shards."""

    def __init__(
        self,
        out: Path,
        encoders: Encoders,
        config: EncodeConfig,
        shapes: list[Shape],
        device: torch.device,
    ) -> None:
        self.out, self.encoders, self.config, self.shapes = out, encoders, config, shapes
        self.device = device
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._broken = 0  # in the finished shards that this process has met

    def count_broken(self, broken: list[list[str]]) -> None:
        """Counts the pictures that a finished shard has skipped."""
        self._require_few(broken)
        self._broken += len(broken)

    def _require_few(self, broken: list[list[str]]) -> None:
        total = self._broken + len(broken)
        if total > self.config.max_broken:
            name, reason = broken[-1]
            raise UserError(
                f"max_broken={self.config.max_broken}: {total} pictures cannot be read, the last "
                f"is {name} ({reason}); mend or remove them, or raise the limit"
            )

    def make_shard(self, number: int, records: list[Record]) -> ShardSummary:
        """Encodes the records and puts the shard on the disk, then its summary."""
        buckets: dict[Shape, _Bucket] = defaultdict(_Bucket)
        broken: list[list[str]] = []
        for ready in self._read(records):
            if isinstance(ready, _Broken):
                broken.append([ready.name, ready.reason])
                self._require_few(broken)
                continue
            bucket = buckets[ready.pixels.shape[:2]]
            bucket.pixels.append(ready.pixels)
            bucket.names.append(ready.name)
            bucket.captions.append(ready.captions)
            if len(bucket.pixels) == self.config.batch_size:
                self._encode_pixels(bucket)
        for bucket in buckets.values():
            self._encode_pixels(bucket)
        ordered = [buckets[shape] for shape in sorted(buckets)]
        path = shard_file(self.out, number)
        try:
            summary = self._write(path, ordered, broken)
            write_summary(self.out, number, summary)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write {path}: {error}; free some space, then give the same command again"
            ) from error
        return summary

    def _read(self, records: list[Record]) -> Iterator[_Ready | _Broken]:
        """Reads and scales in threads, a few pictures ahead, in order."""
        with ThreadPoolExecutor(self.config.workers) as pool:
            step = 4 * self.config.workers
            for start in range(0, len(records), step):
                yield from pool.map(self._ready, records[start : start + step])

    def _ready(self, record: Record) -> _Ready | _Broken:
        try:
            picture = record.load()
        except BrokenPicture as error:
            return _Broken(record.name, str(error))
        shape = nearest_bucket(picture.image.height, picture.image.width, self.shapes)
        return _Ready(record.name, np.array(fit(picture.image, shape)), picture.captions)

    def _encode_pixels(self, bucket: _Bucket) -> None:
        if not bucket.pixels:
            return
        images = to_images(bucket.pixels, self.device)
        views = [images, images.flip(-1)] if self.config.flips else [images]
        with torch.no_grad():
            encoded = [self.encoders.vae.encode(view).float().cpu() for view in views]
        latents = torch.stack(encoded, dim=1)  # [n, V, C, h, w]
        for name, good in zip(bucket.names[-len(latents) :], latents.flatten(1), strict=True):
            if not good.isfinite().all():
                raise UserError(f"the VAE's latents of {name} are not finite; use another dtype")
        bucket.latents.append(latents)
        bucket.pixels.clear()

    def _write(self, path: Path, buckets: list[_Bucket], broken: list[list[str]]) -> ShardSummary:
        tensors: dict[str, Tensor] = {}
        pictures: dict[str, int] = {}
        values: list[Tensor] = []
        for bucket in buckets:
            latents = torch.cat(bucket.latents)
            name = "x".join(map(str, latents.shape[-2:]))
            tensors[f"latents.{name}"] = latents.flatten(0, 1).to(self.dtype)
            pictures[name] = len(latents)
            values.append(_sums(latents))
        captions = [own or ("",) for bucket in buckets for own in bucket.captions]
        distinct = sorted({"", *(caption for own in captions for caption in own)})
        tensors |= self._encode_text(distinct)
        row = {caption: i for i, caption in enumerate(distinct)}
        tensors["pictures.captions"] = torch.tensor(
            [row[c] for own in captions for c in own], dtype=torch.int64
        )
        tensors["pictures.offsets"] = offsets(map(len, captions))
        tensors |= pack_strings("names", [name for bucket in buckets for name in bucket.names])
        write_shard(path, tensors)
        names = ("count", "sum", "squares")
        sums = torch.stack(values).sum(0).tolist() if values else []
        return ShardSummary(
            file=path.name,
            bytes=path.stat().st_size,
            sha256=sha256(path),
            pictures=pictures,
            captions=len(distinct),
            tokens=len(tensors["text"]),
            values=dict(zip(names, sums, strict=True)) if values else {},
            broken=broken,
        )

    def _encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """The text tensors of a shard. Captions of like length go together, so little is padded."""
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        states: dict[int, Tensor] = {}
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            with torch.no_grad():
                text, valid = self.encoders.text.encode([captions[i] for i in rows])
            for i, tokens, length in zip(rows, text, valid.tolist(), strict=True):
                states[i] = tokens[:length].to("cpu", self.dtype, copy=True)
        ordered = [states[i] for i in range(len(captions))]
        return {
            "text": torch.cat(ordered),
            "text.offsets": offsets(map(len, ordered)),
            "captions.hashes": torch.tensor([caption_hash(caption) for caption in captions]),
            **pack_strings("captions", captions),
        }


def _sums(latents: Tensor) -> Tensor:
    """[3, C] fp64: how many values each channel of [N, V, C, h, w] has, their sum, their squares'
    sum."""
    channels = latents.double().transpose(0, 2).flatten(1)  # [C, V·N·h·w]
    ones = torch.full((len(channels),), channels.shape[1], dtype=torch.float64)
    return torch.stack([ones, channels.sum(1), channels.square().sum(1)])
