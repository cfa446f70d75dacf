"""Real photographs for the tests: pieces of the two that come with scikit-learn."""

from __future__ import annotations

import os
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mvsplit.data import EncodeConfig, Encoders, encode
from mvsplit.data.encoders import OpenWords, Pixels
from mvsplit.data.manifest import Manifest
from mvsplit.data.sources import ImageFolder

SIZES = ((40, 40), (36, 48), (48, 32), (40, 44))  # height, width
CONFIG = EncodeConfig(
    resolution=16, multiple=4, flips=True, dtype="float32", shard_size=8, batch_size=3
)
FOLDERS = ("a_temple", "a_flower")


@cache
def photographs() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


def piece(number: int) -> Image.Image:
    """Piece `number` of the photographs, in one of four sizes."""
    photograph = photographs()[number % 2]
    height, width = SIZES[number // 2 % 4]
    top, left = 37 * number % 380, 53 * number % 590
    return Image.fromarray(photograph[top : top + height, left : left + width])


def fill(folder: Path, count: int = 20) -> Path:
    """`count` pieces without loss in two folders that name them; one has captions of its own."""
    for number in range(count):
        path = folder / FOLDERS[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        piece(number).save(path)
    (folder / FOLDERS[1] / "001.txt").write_text("a red dahlia\n\n  petals in the sun \n")
    return folder


def encode_pixels(source: Path, out: Path, **options: Any) -> Manifest | None:
    """Pixels and words of 24, with `CONFIG` but for what is given."""
    config = options.pop("config", CONFIG)
    encoders = options.pop("encoders", None) or Encoders(
        vae=Pixels(), text=OpenWords(24), text_name="words:24"
    )
    return encode(ImageFolder(source), out, encoders, config, **options)


def encode_until(source: Path, out: Path, crash_at: int) -> None:
    """Encodes in this process; before its `crash_at`-th change of the disk it dies by kill −9."""
    torch.set_num_threads(1)
    left = crash_at

    def counted(change: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (shutil, "copymode")):
        setattr(owner, name, counted(getattr(owner, name)))
    encode_pixels(source, out)


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but hidden ones."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
