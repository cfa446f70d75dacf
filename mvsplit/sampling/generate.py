"""From prompts to latents, batch after batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mvsplit.data import Embedder
from mvsplit.errors import UserError
from mvsplit.kernels.hopper.driver import check_waits, vain_waits
from mvsplit.sampling.edit import Edit, sample_edit
from mvsplit.sampling.engine import Engine, accelerated
from mvsplit.sampling.guidance import EVERYWHERE, classifier_free, in_interval
from mvsplit.sampling.noise import sample_noise
from mvsplit.sampling.samplers import Callback, Velocity, get_sampler


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How latents are made from noise.

    Attributes:
        steps: of the sampler (the paper uses 35 for pictures, 25 for scores).
        sampler: a name of `mvsplit.sampling.SAMPLERS`; the paper uses euler.
        guidance: w of classifier-free guidance; 1 is none.
        guidance_interval: times (low, high] at which there is guidance; elsewhere only the prompts
            are evaluated.
        guidance_rescale: φ in [0, 1] of the rescaling of guided velocities; 0 is none.
        shift: a of the time shift.
        seed: of the noise, together with a picture's index.
        batch_size: pictures at a time; it changes memory and speed, not the pictures.
    """

    steps: int = 35
    sampler: str = "euler"
    guidance: float = 2.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    guidance_rescale: float = 0.0
    shift: float = 4.0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        get_sampler(self.sampler)
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift={self.shift}: must be greater than 0; 1 leaves time as it is")
        if not 0 <= self.guidance < math.inf:
            raise UserError(
                f"guidance={self.guidance}: must be a number of at least 0; 1 is no guidance"
            )
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise UserError(
                f"guidance_interval={low} {high}: give two times with 0 ≤ low < high ≤ 1; 0 is "
                "data, 1 is noise"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(
                f"guidance_rescale={self.guidance_rescale}: must be in [0, 1]; 0 is none"
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must not be negative")

    def passes(self, start: float = 1.0) -> int:
        """How often the network is run on each picture's latents, from `start` on: once for every
        evaluation of the velocity, twice where there is guidance."""
        times: list[float] = []

        def count(z: Tensor, t: float) -> Tensor:
            times.append(t)
            return z

        sample = get_sampler(self.sampler).sample
        sample(count, torch.zeros(1), steps=self.steps, shift=self.shift, start=start)
        guided = [self.guidance != 1 and in_interval(t, self.guidance_interval) for t in times]
        return len(times) + sum(guided)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One batch: latents [B, C, H, W] in fp32 and the index of each in the list of prompts."""

    indices: list[int]
    latents: Tensor


class OnStep(Protocol):
    """Told after every step; `pictures` is the size of the batch that made it."""

    def __call__(self, *, pictures: int) -> None: ...


Preview = Callable[[list[int], int, Tensor], None]


def generate(
    model: nn.Module | Engine,
    embedder: Embedder,
    prompts: Sequence[str],
    shape: Sequence[int],
    config: SamplingConfig,
    *,
    edit: Edit | None = None,
    first: int = 0,
    on_step: OnStep | None = None,
    preview: Preview | None = None,
) -> Iterator[Generated]:
    """Latents for `prompts`, in order, one batch at a time.

    Picture k depends on the prompt, the seed and k, not on the batch it is in: its noise is its
    own, and the padding of a batch's text is masked. What remains is the rounding of matrix
    products of another size. (An embedder that counts padding among the real tokens, as the
    released code does, makes a picture depend on the longest prompt of its batch.)

    A batch that does not fit into the memory of a CUDA device is halved, with a warning, and all
    that follow are as small.

    Args:
        model: a `DiT`, on the device and in the dtype in which it is to run, or its `Engine`. A DiT
            on CUDA gets an engine for this call.
        embedder: of the text that the model was trained with.
        prompts: one for each picture; "" is unconditional.
        shape: (C, H, W) of a latent.
        config: steps, sampler, guidance, shift, seed, batch size.
        edit: a given picture that every picture begins with, or keeps a part of.
        first: the picture to begin with; those before it are left out, the rest is the same.
        on_step: told after every step.
        preview: called after every step with the indices of the batch, the number of steps done and
            the latents [B, C, H, W] as they stand.

    Raises:
        UserError: a prompt that the embedder does not know, when its batch comes; one picture that
            does not fit into memory; latents that are not finite.
        DriverError: kernels of the engine waited in vain, as `Engine.check` says.
    """
    network = accelerated(model)
    model = network.model if isinstance(network, Engine) else network
    start, size = first, config.batch_size
    while start < len(prompts):
        indices = list(range(len(prompts)))[start : start + size]
        noted = _noting(on_step, preview, indices)
        known = vain_waits()
        try:
            batch = [prompts[i] for i in indices]
            latents = _one_batch(
                network, model, embedder, batch, indices, shape, config, edit, noted
            )
        except torch.OutOfMemoryError as error:
            size = _halved(len(indices), error)
            continue  # outside of the handler, whose traceback holds the tensors
        finite = latents.flatten(1).isfinite().all(1).tolist()  # which waits for them
        check_waits(known)  # before NaN of a kernel is put down to the weights
        _require_finite(finite, indices, model)
        yield Generated(indices=indices, latents=latents)
        start += len(indices)


def _one_batch(
    network: nn.Module | Engine,
    model: nn.Module,
    embedder: Embedder,
    prompts: Sequence[str],
    indices: list[int],
    shape: Sequence[int],
    config: SamplingConfig,
    edit: Edit | None,
    callback: Callback | None,
) -> Tensor:
    weight = next(model.parameters())
    velocity = _velocity(network, embedder, prompts, config, weight)
    noise = sample_noise(indices, shape, seed=config.seed, device=weight.device)
    sample = get_sampler(config.sampler).sample
    with torch.no_grad():
        if edit is None:
            return sample(
                velocity, noise, steps=config.steps, shift=config.shift, callback=callback
            )
        return sample_edit(
            sample,
            velocity,
            noise,
            edit,
            steps=config.steps,
            shift=config.shift,
            callback=callback,
        )


def _velocity(
    network: nn.Module | Engine,
    embedder: Embedder,
    prompts: Sequence[str],
    config: SamplingConfig,
    weight: Tensor,
) -> Velocity:
    text, valid = _encode(embedder, prompts, weight)
    return classifier_free(
        network,
        text[:-1],
        text[-1:],
        config.guidance,
        text_valid=None if valid is None else valid[:-1],
        null_valid=None if valid is None else valid[-1:],
        interval=config.guidance_interval,
        rescale=config.guidance_rescale,
    )


def _encode(
    embedder: Embedder, prompts: Sequence[str], weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A batch's prompts and, last, the unconditional one; no counts where nothing is padded."""
    text, valid = embedder.encode([*prompts, ""])
    padded = bool((valid < text.shape[1]).any())
    return text.to(weight), valid.to(weight.device) if padded else None


def _noting(on_step: OnStep | None, preview: Preview | None, indices: list[int]) -> Callback | None:
    if on_step is None and preview is None:
        return None

    def note(done: int, z: Tensor) -> None:
        if on_step is not None:
            on_step(pictures=len(indices))
        if preview is not None:
            preview(indices, done, z)

    return note


def _halved(size: int, error: torch.OutOfMemoryError) -> int:
    """Half of a batch that did not fit, said aloud."""
    reason = next(iter(str(error).splitlines()), "out of memory").split(". ")[0]
    if size == 1:
        raise UserError(
            f"one picture does not fit into the device's memory ({reason}); use --dtype bf16, a "
            "smaller resolution, or another device"
        ) from error
    warnings.warn(
        f"batch_size={size} does not fit into the device's memory ({reason}); going on with "
        f"{size // 2}",
        stacklevel=3,
    )
    return size // 2


def _require_finite(finite: list[bool], indices: list[int], model: nn.Module) -> None:
    for index, good in zip(indices, finite, strict=True):
        if not good:
            raise UserError(
                f"picture {index} came out with values that are not finite; {_why(model)}"
            )


def _why(model: nn.Module) -> str:
    """The first parameter with values that are not finite, or that there is none."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return (
                f"{name} of the weights holds such values: the training had diverged, or the file "
                "is damaged; take an earlier checkpoint"
            )
    return (
        "all weights are finite, so the network overflowed: the precision is too low, or the "
        "training was diverging; use fp32 or take an earlier checkpoint"
    )
