"""A picture and a mask from files, as what sampling begins with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mvsplit.cli.subject import Subject
from mvsplit.errors import UserError
from mvsplit.sampling import Edit

DEFAULT_STRENGTH = 0.6
_WHITE = 128  # a mask's grey levels from here on are to be drawn


def read_edit(
    image: Path | None, mask: Path | None, strength: float | None, subject: Subject
) -> Edit | None:
    """What --image, --mask and --strength ask for; None without a picture.

    The picture is cut around its centre to the shape of the subject's, and resized. A latent is
    known where the mask is black on all of its pixels.

    Raises:
        UserError: files that are no pictures or do not belong together, a mask that leaves nothing
            to draw, a strength outside (0, 1].
    """
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{name}={value}: needs a picture; give it with --image")
        return None
    if subject.kind == "clip":
        raise UserError(f"image={image}: a clip cannot begin with a picture; leave --image out")
    picture = open_picture(image, "image")
    known = None if mask is None else _read_mask(mask, picture.size, subject)
    if strength is None:
        strength = DEFAULT_STRENGTH if mask is None else 1.0
    return edit_of(picture, known, strength, subject)


def edit_of(picture: Image.Image, known: Tensor | None, strength: float, subject: Subject) -> Edit:
    """The edit of a picture of any size; `known` [h, w] of its latents, or None."""
    pixels = _pixels(picture, subject)
    device = next(subject.model.parameters()).device
    latent = subject.codec.encode(pixels[None].to(device))[0].float()
    return Edit(picture=latent, strength=strength, known=known)


def open_picture(path: Path, option: str) -> Image.Image:
    """A picture file, upright. Raises UserError that names `option` where it is none."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{option}={path}: cannot be read as a picture ({error}); give a PNG or JPEG file"
        ) from error


def picture_size(subject: Subject) -> tuple[int, int]:
    """Width and height in pixels of what the subject draws."""
    height, width = subject.shape[1:]
    return width * subject.codec.multiple, height * subject.codec.multiple


def _pixels(picture: Image.Image, subject: Subject) -> Tensor:
    """[1 or 3, H, W] in [−1, 1]; grey for a network that draws grey pixels."""
    fitted = _fitted(picture.convert("L" if subject.shape[0] == 1 else "RGB"), subject)
    array = np.asarray(fitted, dtype=np.float32)
    channels_last = array[:, :, None] if array.ndim == 2 else array
    return torch.from_numpy(channels_last / 127.5 - 1).permute(2, 0, 1)


def _read_mask(path: Path, size: tuple[int, int], subject: Subject) -> Tensor:
    """Which latents are known, [h, w]."""
    mask = open_picture(path, "mask")
    if mask.size != size:
        raise UserError(
            f"mask={path}: has {mask.size[0]}×{mask.size[1]} pixels, the picture "
            f"{size[0]}×{size[1]}; give one of the picture's size"
        )
    drawn = mask.convert("L").point(lambda grey: 255 if grey >= _WHITE else 0)
    black = torch.from_numpy(np.array(_fitted(drawn, subject)) == 0)
    height, width = subject.shape[1:]
    cells = black.reshape(height, subject.codec.multiple, width, subject.codec.multiple)
    known = cells.all(3).all(1)
    if known.all():
        raise UserError(f"mask={path}: is black; paint white what is to be drawn anew")
    return known


def _fitted(picture: Image.Image, subject: Subject) -> Image.Image:
    """Cut and resized; a mean over areas where it gets smaller, so that white stays seen."""
    size = picture_size(subject)
    larger = picture.width < size[0] or picture.height < size[1]
    method = Image.Resampling.BICUBIC if larger else Image.Resampling.BOX
    return ImageOps.fit(picture, size, method)
