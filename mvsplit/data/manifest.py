"""What a cache is made of, in JSON: how it was begun, each finished shard, and the whole.

OUT/settings.json            how it was begun; who goes on with it must agree
OUT/shards/00000.safetensors
OUT/shards/00000.json        written after the shard: while it is absent, so is the shard
OUT/manifest.json            written when every shard is there
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvsplit.data.atomic import sha256, write_atomically
from mvsplit.errors import UserError

FORMAT = "mvsplit-cache"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the content of a cache.

    Attributes:
        source: fingerprint of the pictures and captions.
        vae, text_encoder: fingerprints of the encoders.
        vae_name, text_encoder_name: what `mvsplit encode` was given, to load them again.
        resolution, multiple, max_aspect: of `aspect_buckets`.
        flips: whether the mirror image of each picture is there too.
        dtype: of latents and text states.
        shard_size: pictures of the source that go into a shard.
    """

    source: str
    vae: str
    vae_name: str
    text_encoder: str
    text_encoder_name: str
    resolution: int
    multiple: int
    max_aspect: float
    flips: bool
    dtype: str
    shard_size: int


_REMEDIES = {
    "source": "pictures or captions were added, removed or replaced",
    "vae": "the weights of the VAE are others, and its latents do not match",
    "text_encoder": "the weights of the text encoder are others, and its states do not match",
}


def begin(folder: Path, settings: Settings) -> None:
    """Writes the settings of a new cache, or agrees with those that are there.

    Raises UserError for a setting that differs, naming it, and for a folder that holds other files.
    """
    path = folder / "settings.json"
    if not path.exists():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"out: {folder} holds other files; choose a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
        write_atomically(path, text, writer=f".{os.getpid()}")
    (folder / "shards").mkdir(exist_ok=True)
    before, now = _read_json(path), dataclasses.asdict(settings)
    for name, value in now.items():
        if name.endswith("_name"):  # where the encoders lie; their fingerprints say what they are
            continue
        if before.get(name) != value:
            why = f" ({_REMEDIES[name]})" if name in _REMEDIES else ""
            raise UserError(
                f"{name}={value!r}: {folder} was begun with {before.get(name)!r}{why}; give that, "
                "or encode into a new folder"
            )


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """One finished shard.

    Attributes:
        file: its name in `shards/`.
        bytes, sha256: of the file.
        pictures: of each bucket, by the latents' "HxW".
        captions, tokens: distinct captions, and their tokens.
        values: of each channel, how many there are, their sum and the sum of their squares.
        broken: pictures that were skipped: (name, reason).
    """

    file: str
    bytes: int
    sha256: str
    pictures: dict[str, int]
    captions: int
    tokens: int
    values: dict[str, list[float]]
    broken: list[list[str]] = field(default_factory=list)


def shard_file(folder: Path, number: int) -> Path:
    """OUT/shards/00007.safetensors for 7."""
    return folder / "shards" / f"{number:05d}.safetensors"


def write_summary(folder: Path, number: int, summary: ShardSummary) -> None:
    """Declares a shard finished."""
    path = shard_file(folder, number).with_suffix(".json")
    write_atomically(path, json.dumps(dataclasses.asdict(summary)) + "\n")


def finished(folder: Path, number: int) -> ShardSummary | None:
    """The summary of shard `number`; None while it is not there, or its file has another size."""
    path = shard_file(folder, number)
    if not path.with_suffix(".json").exists():
        return None
    summary = ShardSummary(**_read_json(path.with_suffix(".json")))
    whole = path.exists() and path.stat().st_size == summary.bytes
    return summary if whole else None


def write_manifest(folder: Path, shards: Iterable[ShardSummary]) -> Manifest:
    """Completes a cache whose shards are all there."""
    shards = list(shards)
    settings = _read_json(folder / "settings.json")
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "pictures": sum(sum(shard.pictures.values()) for shard in shards),
        "broken": sum(len(shard.broken) for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "latents": statistics(shards),
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    path = folder / "manifest.json"
    write_atomically(path, json.dumps(tree, indent=1) + "\n", writer=f".{os.getpid()}")
    return read_manifest(folder)


def statistics(shards: Iterable[ShardSummary]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel over all latents."""
    totals: dict[str, list[float]] = {}
    for shard in shards:
        for name, values in shard.values.items():
            before = totals.get(name, [0.0] * len(values))
            totals[name] = [a + b for a, b in zip(before, values, strict=True)]
    if not totals:
        return {"mean": [], "std": []}
    rows = list(zip(totals["count"], totals["sum"], totals["squares"], strict=True))
    mean = [total / count for count, total, _ in rows]
    square = [squares / count for count, _, squares in rows]
    return {
        "mean": mean,
        "std": [max(s - m * m, 0.0) ** 0.5 for s, m in zip(square, mean, strict=True)],
    }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole cache."""

    settings: Settings
    pictures: int
    latents: dict[str, list[float]]
    shards: list[ShardSummary]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache. Raises UserError where there is none, or one of another version."""
    path = folder / "manifest.json"
    if not path.exists():
        begun = (folder / "settings.json").exists()
        remedy = (
            "it is not finished: give the mvsplit encode command again"
            if begun
            else "make it with mvsplit encode SOURCE OUT"
        )
        raise UserError(f"data.path: {folder} holds no finished cache; {remedy}")
    tree = _read_json(path)
    if tree.get("format") != FORMAT or tree.get("version") != VERSION:
        raise UserError(
            f"data.path: {path} is of version {tree.get('version')} of {tree.get('format')}, this "
            f"program reads {VERSION} of {FORMAT}; encode again"
        )
    return Manifest(
        settings=Settings(**tree["settings"]),
        pictures=tree["pictures"],
        latents=tree["latents"],
        shards=[ShardSummary(**shard) for shard in tree["shards"]],
    )


def verify_shards(folder: Path, shards: Iterable[ShardSummary], *, checksums: bool) -> None:
    """Raises UserError, naming it, for a shard that is missing, truncated or, where `checksums` are
    to be computed, changed."""
    for shard in shards:
        path = folder / "shards" / shard.file
        size = path.stat().st_size if path.exists() else None
        if size is None:
            found = "is missing"
        elif size != shard.bytes:
            found = f"is truncated ({size} of {shard.bytes} bytes)"
        elif checksums and sha256(path) != shard.sha256:
            found = "is damaged (checksum)"
        else:
            continue
        remedy = f"remove {path.with_suffix('.json')} and give the mvsplit encode command again"
        raise UserError(f"data.path: {path} {found}; {remedy}")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; encode again") from error
