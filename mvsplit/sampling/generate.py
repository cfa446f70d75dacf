"""From prompts to latents, batch after batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mvsplit.data import Embedder
from mvsplit.errors import UserError
from mvsplit.sampling.guidance import classifier_free
from mvsplit.sampling.noise import sample_noise
from mvsplit.sampling.samplers import euler


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How latents are made from noise.

    Attributes:
        steps: Euler steps (the paper uses 35 for pictures, 25 for scores).
        guidance: w of classifier-free guidance; 1 is none.
        shift: a of the time shift; use the one of training.
        seed: of the noise, together with a picture's index.
        batch_size: pictures at a time; it changes memory and speed, not the pictures.
    """

    steps: int = 35
    guidance: float = 2.0
    shift: float = 4.0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift={self.shift}: must be greater than 0; 1 leaves time as it is")
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance={self.guidance}: must be a number; 1 is no guidance")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One batch: latents [B, C, H, W] in fp32 and the index of each in the list of prompts."""

    indices: list[int]
    latents: Tensor


class OnStep(Protocol):
    """Told after every Euler step; `pictures` is the size of the batch that made it."""

    def __call__(self, *, pictures: int) -> None: ...


def generate(
    model: nn.Module,
    embedder: Embedder,
    prompts: Sequence[str],
    shape: Sequence[int],
    config: SamplingConfig,
    *,
    on_step: OnStep | None = None,
) -> Iterator[Generated]:
    """Latents for `prompts`, in order, one batch at a time; the network runs as it is given.

    Picture k depends on the prompt, the seed and k, not on the batch it is in: its noise is its
    own, and all text is padded to the same masked length. What remains is the rounding of matrix
    products of another size.

    Args:
        model: a `DiT`, on the device and in the dtype in which it is to run.
        embedder: of the text that the model was trained with.
        prompts: one for each picture; "" is unconditional.
        shape: (C, H, W) of a latent.
        config: steps, guidance, shift, seed, batch size.
        on_step: told after every step.

    Raises:
        UserError: a prompt that the embedder does not know; latents that are not finite.
    """
    weight = next(model.parameters())
    text, valid = _encode(embedder, prompts, weight)
    for start in range(0, len(prompts), config.batch_size):
        indices = list(range(len(prompts)))[start : start + config.batch_size]
        rows = slice(start, start + len(indices))
        velocity = classifier_free(
            model,
            text[rows],
            text[-1:],
            config.guidance,
            text_valid=None if valid is None else valid[rows],
            null_valid=None if valid is None else valid[-1:],
        )
        noise = sample_noise(indices, shape, seed=config.seed, device=weight.device)
        with torch.no_grad():
            latents = euler(
                velocity,
                noise,
                steps=config.steps,
                shift=config.shift,
                callback=_counting(on_step, len(indices)),
            )
        _require_finite(latents, indices)
        yield Generated(indices=indices, latents=latents)


def _encode(
    embedder: Embedder, prompts: Sequence[str], weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """All prompts and, last, the unconditional one; no counts where nothing is padded."""
    text, valid = embedder.encode([*prompts, ""])
    padded = bool((valid < text.shape[1]).any())
    return text.to(weight), valid.to(weight.device) if padded else None


def _counting(on_step: OnStep | None, pictures: int) -> Callable[[int, Tensor], None] | None:
    return None if on_step is None else lambda done, z: on_step(pictures=pictures)


def _require_finite(latents: Tensor, indices: list[int]) -> None:
    finite = latents.flatten(1).isfinite().all(1).tolist()
    for index, good in zip(indices, finite, strict=True):
        if not good:
            raise UserError(
                f"picture {index} came out with values that are not finite; the weights have "
                "diverged, or the precision is too low: take an earlier checkpoint or fp32"
            )
