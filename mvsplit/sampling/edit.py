"""Image-to-image and inpainting: pure functions around any sampler.

Both walk the straight path of `mvsplit.flow` from a given picture x0 to noise x1. Image-to-image
begins on it at t = strength instead of at its noisy end (the rectified-flow form of SDEdit, Meng et
al. 2021, arXiv 2108.01073). Inpainting puts the known part back on it wherever the network is asked
(Lugmayr et al. 2022, arXiv 2201.09865, without their resampling).

Shapes: pictures and noise [B, C, H, W] or what broadcasts to it, known [H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.flow import interpolate, velocity_target
from mvsplit.sampling.samplers import Callback, Sample, Velocity


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is to become of a given picture.

    Attributes:
        picture: x0, [C, H, W] in the latents' space.
        strength: t in (0, 1] at which the path is entered; 1 keeps nothing of the picture but what
            is known, and near 0 the picture comes out.
        known: True where the picture is to stay exactly as it is, [H, W]; None: nowhere.
    """

    picture: Tensor
    strength: float = 1.0
    known: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(
                f"strength={self.strength}: must be greater than 0 and at most 1; at 1 nothing of "
                "the picture is kept"
            )
        if self.known is not None and self.known.shape != self.picture.shape[1:]:
            raise UserError(
                f"mask of {list(self.known.shape)} latents for a picture of "
                f"{list(self.picture.shape[1:])}; give one of the picture's size"
            )


def sample_edit(
    sample: Sample,
    velocity: Velocity,
    noise: Tensor,
    edit: Edit,
    *,
    steps: int,
    shift: float,
    callback: Callback | None = None,
) -> Tensor:
    """`sample` from the point of the path that `edit` names; all N steps lie below its time.

    At strength 1 without a known part it is `sample` from `noise`, bit for bit. With one, the known
    part of what comes out is the picture, bit for bit.

    Raises:
        UserError: what `sample` raises; a picture of another shape than the noise.
    """
    if edit.picture.shape != noise.shape[1:]:
        raise UserError(
            f"picture of shape {list(edit.picture.shape)} for latents of {list(noise.shape[1:])}; "
            "resize it"
        )
    picture = edit.picture.to(noise)
    known = None if edit.known is None else edit.known.to(noise.device)
    if known is not None:
        velocity = on_the_path(velocity, picture, noise, known)
    begin = interpolate(picture, noise, _time(edit.strength))
    start = noise if edit.strength == 1 else begin
    z = sample(velocity, start, steps=steps, shift=shift, start=edit.strength, callback=callback)
    return z if known is None else torch.where(known, picture.to(z), z)


def on_the_path(velocity: Velocity, picture: Tensor, noise: Tensor, known: Tensor) -> Velocity:
    """`velocity` as it is where nothing is known. Where something is, z is put on the path at t
    before the network sees it, and moves along the path: v = x0 − x1."""

    def held(z: Tensor, t: float) -> Tensor:
        on_path = interpolate(picture, noise, _time(t)).to(z)
        v = velocity(torch.where(known, on_path, z), t).to(z.dtype)
        return torch.where(known, velocity_target(picture, noise).to(z), v)

    return held


def _time(t: float) -> Tensor:
    """A scalar that changes no tensor's dtype."""
    return torch.tensor(t, dtype=torch.float64)
