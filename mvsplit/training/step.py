"""One optimiser step: gradients of a batch, the check for non-finite values, clip, update, average.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mvsplit.data import Batch
from mvsplit.diagnostics.taps import gradient_norm_tensors, read
from mvsplit.flow import flow_loss, interpolate, sample_times
from mvsplit.models import DiT
from mvsplit.training.config import TrainConfig
from mvsplit.training.nonfinite import (
    NonFiniteError,
    first_in_activations,
    first_in_gradients,
    first_in_weights,
)
from mvsplit.training.optimizer import clip_gradients_, global_norm
from mvsplit.training.randomness import generator_for
from mvsplit.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a global batch with its noise and times, on the device."""

    data: Tensor  # x0 [B, C, H, W]
    noise: Tensor  # x1 [B, C, H, W]
    times: Tensor  # t [B]
    text: Tensor  # [B, T, Dc]
    text_valid: Tensor | None  # [B]


def pieces(batch: Batch, step: int, config: TrainConfig, device: torch.device) -> Iterator[Piece]:
    """Cuts the batch of a step; chance is drawn for all of it first, so the cut changes nothing."""
    data = batch.latents.to(device)
    stream = partial(generator_for, config.seed, device=device)
    noise = torch.randn(data.shape, generator=stream("noise", step), device=device)
    times = sample_times(
        len(data), shift=config.time_shift, generator=stream("times", step), device=device
    )
    text = batch.text.to(device)
    valid = None if batch.text_valid is None else batch.text_valid.to(device)
    size = len(data) // config.accumulate
    for start in range(0, len(data), size):
        rows = slice(start, start + size)
        yield Piece(
            data=data[rows],
            noise=noise[rows],
            times=times[rows],
            text=text[rows],
            text_valid=None if valid is None else valid[rows],
        )


def piece_loss(model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
    """The flow-matching loss of a piece (Eq. 2), a scalar in fp32. bf16 concerns the network only:
    the path, the loss and the weights are fp32."""
    z = interpolate(piece.data, piece.noise, piece.times)
    low = config.precision == "bf16"
    with torch.autocast(z.device.type, torch.bfloat16, enabled=low):
        # The text in bf16 too, or concatenation would lift the whole trunk to fp32.
        text = piece.text.bfloat16() if low else piece.text
        velocity = model(z, text, piece.text_valid)
    return flow_loss(velocity, piece.data, piece.noise)


def accumulate_gradients(state: TrainState, config: TrainConfig, parts: list[Piece]) -> Tensor:
    """Adds up the gradients of the mean loss over all pieces and returns that loss, a scalar."""
    state.optimizer.zero_grad()
    total = torch.zeros((), device=state.device)
    for piece in parts:
        loss = piece_loss(state.model, piece, config) / len(parts)
        loss.backward()
        total += loss.detach()
    return total


def train_step(state: TrainState, config: TrainConfig) -> dict[str, float]:
    """Takes the next step of the run.

    Returns:
        `loss`, `grad_norm` (before clipping), `lr`, `tokens`, and the gradient norms of W_O, W_2,
        W_Q and W_K over the deepest quarter of the layers.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    step = state.step + 1
    batch = state.loader.next_batch()
    parts = list(pieces(batch, step, config, state.device))
    loss = accumulate_gradients(state, config, parts)
    numbers = {"loss": loss, "grad_norm": global_norm(state.optimizer.groups)}
    numbers |= gradient_norm_tensors(state.taps)
    metrics = dict(zip(numbers, read(numbers.values()), strict=True))  # waits for the device, once
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise NonFiniteError(_explain(state.model, config, parts, step, metrics))
    clip_gradients_(state.optimizer.groups, metrics["grad_norm"], config.clip)
    lr = state.schedule(step)
    state.optimizer.step(lr)
    if state.ema is not None:
        state.ema.update(step)
    state.step = step
    return metrics | {"lr": lr, "tokens": _tokens(state.model, batch)}


def _tokens(model: DiT, batch: Batch) -> int:
    """Tokens that the network processes for the batch, padding included."""
    samples, _, height, width = batch.latents.shape
    return samples * (height * width // model.config.patch**2 + batch.text.shape[1])


def _explain(
    model: DiT, config: TrainConfig, parts: list[Piece], step: int, metrics: dict[str, float]
) -> str:
    """Which value is not finite, and where it began: in a weight, else an activation, else a
    gradient."""
    weight = first_in_weights(model)
    if weight is not None:
        origin = f"the weights of {weight} are not finite"
    elif not math.isfinite(metrics["loss"]):
        found = (first_in_activations(model, partial(piece_loss, model, p, config)) for p in parts)
        place = next((p for p in found if p), None)
        origin = f"first in the output of {place}" if place else "every activation is finite"
    else:
        place = first_in_gradients(model)
        origin = f"first in the gradient of {place}" if place else "every gradient is finite"
    return (
        f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}, "
        f"{origin}"
    )
