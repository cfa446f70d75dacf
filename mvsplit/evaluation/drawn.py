"""Drawn pictures that wait on the disk to be scored, so that a killed evaluation goes on.

FOLDER/recipe.json     all that decides the pictures; another recipe is refused
FOLDER/000000.png, …   in their own size, each whole or not there; a clip's frames side by side
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mvsplit.data import Embedder
from mvsplit.data.atomic import write_atomically
from mvsplit.errors import UserError
from mvsplit.evaluation.passport import in_short
from mvsplit.sampling import Engine, SamplingConfig, generate, save_png
from mvsplit.sampling.images import to_bytes

_RECIPE = "recipe.json"


class DrawnPictures:
    """A folder of pictures 0 … done - 1 of one recipe.

    Args:
        folder: created if absent.
        recipe: all that decides the pictures.
        frames: of clips; None for pictures.

    Raises:
        UserError: the folder holds pictures of another recipe, or cannot be written.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], frames: int | None = None) -> None:
        self.folder, self._frames = folder, frames
        file, given = folder / _RECIPE, json.loads(json.dumps(recipe))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_atomically(file, json.dumps(given, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {folder}: {error.strerror}; evaluate a copy that can be written"
            ) from error
        there = json.loads(file.read_text(encoding="utf-8"))
        for field in sorted(there.keys() | given.keys()):
            if there.get(field) != given.get(field):
                raise UserError(
                    f"{folder} holds pictures drawn otherwise ({field}: "
                    f"{in_short(there.get(field))} there, {in_short(given.get(field))} now); "
                    "choose another --name, or remove it"
                )

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def paths(self, count: int) -> list[Path]:
        return [self.path(index) for index in range(count)]

    @property
    def done(self) -> int:
        """How many there are without a gap."""
        names = {path.name for path in self.folder.glob("*.png")}
        return next(k for k in range(len(names) + 1) if self.path(k).name not in names)

    def add(self, indices: Sequence[int], pictures: Tensor) -> None:
        """Saves pictures [B, 1 or 3, S, S], or clips [B, 1 or 3, F, S, S], in [−1, 1]; values
        outside are cut."""
        if self._frames is not None:
            pictures = pictures.transpose(2, 3).flatten(3)  # [B, C, S, F·S]
        pixels = to_bytes(pictures)
        for index, array in zip(indices, pixels.permute(0, 2, 3, 1).numpy(), strict=True):
            picture = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
            save_png(self.path(index), picture, {"index": index})

    def read(self, count: int) -> Tensor:
        """The first `count` pictures, [N, C, S, S] in [−1, 1], or clips [N, C, F, S, S]."""
        pictures = torch.cat([read_png(path) for path in self.paths(count)]).float() / 127.5 - 1
        if self._frames is None:
            return pictures
        return pictures.unflatten(3, (self._frames, -1)).transpose(2, 3)


def draw_missing(
    folder: DrawnPictures,
    model: nn.Module | Engine,
    embedder: Embedder,
    prompts: Sequence[str],
    shape: Sequence[int],
    config: SamplingConfig,
    decode: Callable[[Tensor], Tensor],
    on_step: Callable[..., None] | None = None,
) -> None:
    """Draws what is missing of one picture a prompt; saved batch after batch.

    Args:
        decode: latents to pictures in [−1, 1].
        on_step: as in `generate`.
    """
    first = folder.done
    batches = generate(model, embedder, prompts, shape, config, first=first, on_step=on_step)
    for batch in batches:
        folder.add(batch.indices, decode(batch.latents))


def read_png(path: Path) -> Tensor:
    """[1, C, H, W] uint8, C = 1 or 3 as in the file."""
    with Image.open(path) as picture:
        array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))[None]


def png_batches(paths: Sequence[Path], size: int) -> Iterator[Tensor]:
    """RGB pictures of one size as [B, 3, H, W] uint8, `size` at a time."""
    for start in range(0, len(paths), size):
        batch = torch.cat([read_png(path) for path in paths[start : start + size]])
        yield batch.expand(-1, 3, -1, -1)
