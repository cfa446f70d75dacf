"""One optimiser step: gradients of a batch, the check for non-finite values, clip, update, average.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mvsplit.data import Batch
from mvsplit.diagnostics.taps import gradient_norm_tensors, read
from mvsplit.flow import flow_losses, interpolate, sample_times
from mvsplit.models import DiT
from mvsplit.training.config import TrainConfig
from mvsplit.training.distributed import at, from_each, rank, rows_of_each, world
from mvsplit.training.gradient_families import family_norms
from mvsplit.training.graphs import Graphs
from mvsplit.training.nonfinite import (
    NonFiniteError,
    first_in_activations,
    first_in_gradients,
    first_in_weights,
)
from mvsplit.training.optimizer import clip_gradients_, global_norm
from mvsplit.training.parallelize import sync_gradients
from mvsplit.training.pieces import Piece, in_few_lengths
from mvsplit.training.randomness import generator_for
from mvsplit.training.state import TrainState
from mvsplit.training.surgery import anneal


def pieces(batch: Batch, step: int, config: TrainConfig, device: torch.device) -> Iterator[Piece]:
    """Cuts this rank's share of the batch of a step; chance is drawn for the whole batch first, so
    that neither this cut nor that into shares changes anything."""
    data = batch.latents.to(device)
    samples = len(data) * world()
    stream = partial(generator_for, config.seed, device=device)
    noise = torch.randn((samples, *data.shape[1:]), generator=stream("noise", step), device=device)
    times = sample_times(
        samples, shift=config.time_shift, generator=stream("times", step), device=device
    )
    if samples > len(data):
        share = slice(rank() * len(data), (rank() + 1) * len(data))
        noise, times = noise[share], times[share]
    text = batch.text.to(device)
    valid = None if batch.text_valid is None else batch.text_valid.to(device)
    if device.type == "cuda":
        text, valid = in_few_lengths(text, valid)
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


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a step knows before its update is made.

    Attributes:
        step: the step that is being taken; `TrainState.step` is one less until the update is made.
        position: of the loader, before the batch.
        batch: what the step reads, this rank's share.
        indices: the places of the samples of the whole batch in the data set.
        metrics: `loss`, `grad_norm` before clipping, `lr`, and the norms of `train_step`.
        sample_losses: of each sample of the whole batch.
        family_norms: the gradient norm of every layer by family (paper App. F); Embed and Final
            have one entry.
    """

    step: int
    position: int
    batch: Batch
    indices: list[int]
    metrics: dict[str, float]
    sample_losses: list[float]
    family_norms: dict[str, list[float]]


def piece_losses(model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
    """The flow-matching loss of each sample of a piece (Eq. 2), [B] in fp32. bf16 concerns the
    network only: the path, the loss and the weights are fp32."""
    z = interpolate(piece.data, piece.noise, piece.times)
    low = config.precision == "bf16"
    with torch.autocast(z.device.type, torch.bfloat16, enabled=low):
        # The text in bf16 too, or concatenation would lift the whole trunk to fp32.
        text = piece.text.bfloat16() if low else piece.text
        velocity = model(z, text, piece.text_valid)
    return flow_losses(velocity, piece.data, piece.noise)


def add_gradients(
    model: DiT,
    config: TrainConfig,
    parts: list[Piece],
    graphs: Graphs | None = None,
    after_first: Callable[[], None] | None = None,
) -> Tensor:
    """Adds the gradients of the mean loss over all samples to what the model's gradients hold, and
    returns the loss of each sample, [B]. Ranks send each other their gradients once. `after_first`
    is called when the first piece has been forward and back."""
    samples = sum(len(piece.data) for piece in parts)
    found = []

    def run(piece: Piece) -> Tensor:
        assert piece.parts is not None
        losses = piece_losses(model, piece, config)
        (losses.mean() / piece.parts).backward()
        return losses.detach()

    for number, piece in enumerate((_counted(piece, samples) for piece in parts), start=1):
        at(f"forward and backward of piece {number}")
        sync_gradients(model, number == len(parts))
        found.append(run(piece) if graphs is None else graphs.run(piece, run))
        if number == 1 and after_first is not None:
            after_first()
    return torch.cat(found)


def _counted(piece: Piece, samples: int) -> Piece:
    """A piece that knows its part of `samples` samples; on the device, so that a graph serves for
    any number of pieces."""
    device = piece.data.device
    return replace(piece, parts=torch.full((), samples / len(piece.data), device=device))


def accumulate_gradients(
    state: TrainState,
    config: TrainConfig,
    parts: list[Piece],
    after_first: Callable[[], None] | None = None,
) -> Tensor:
    """The gradients of the mean loss over all pieces instead of those that were there; returns the
    loss of each sample, [B]."""
    if state.planner is not None:
        state.planner.before(max(_tokens(state.model, p.data, p.text) for p in parts))
    state.optimizer.zero_grad()
    losses = add_gradients(state.model, config, parts, state.graphs, after_first)
    state.optimizer.collect_grads()
    return losses


def train_step(
    state: TrainState,
    config: TrainConfig,
    *,
    before_update: Callable[[Gradients], bool | None] | None = None,
    after_first: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Takes the next step of the run.

    Args:
        after_first: is called when the first piece of the batch has been forward and back.
        before_update: is told what the step knows before the update is made, non-finite or not;
            where it returns False, the update is not made and the step is not counted.

    Returns:
        `loss`, `grad_norm` (before clipping), `lr`, `tokens`, and the gradient norms of W_O, W_2,
        W_Q and W_K over the deepest quarter of the layers.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    step, position = state.step + 1, state.loader.position
    at(f"the batch of step {step}")
    batch = state.loader.next_batch()
    parts = list(pieces(batch, step, config, state.device))
    losses = accumulate_gradients(state, config, parts, after_first)
    metrics, found = _read_all(state, losses, batch)
    lr = state.learning_rate(step)
    numbers = metrics | {"lr": lr, "tokens": found.tokens}
    if before_update is not None:
        gradients = Gradients(
            step=step,
            position=position,
            batch=batch,
            indices=found.indices,
            metrics=metrics | {"lr": lr},
            sample_losses=found.losses,
            family_norms=found.family_norms,
        )
        if before_update(gradients) is False:
            return numbers
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise NonFiniteError(_explain(state.model, config, parts, step, metrics))
    at("the update")
    clip_gradients_(state.optimizer.groups, metrics["grad_norm"], config.clip)
    state.optimizer.step(lr)
    state.step = step
    anneal(state, config.reaction.anneal)
    if state.ema is not None:
        state.ema.update(step)
    return numbers


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """What a step knows of the whole batch, on every rank: of each sample its loss and its place in
    the data set, the tokens, and the norms of each family."""

    losses: list[float]
    indices: list[int]
    tokens: int
    family_norms: dict[str, list[float]]


def _read_all(state: TrainState, losses: Tensor, batch: Batch) -> tuple[dict[str, float], _Whole]:
    """The numbers of a step: waits for the device, once where one process is alone."""
    indices, tokens = batch.indices, _tokens(state.model, batch.latents, batch.text)
    if world() > 1:
        losses, indices, tokens = _of_all_ranks(losses, indices, tokens)
    scalars = {"loss": losses.mean(), "grad_norm": global_norm(state.optimizer.groups)}
    scalars |= gradient_norm_tensors(state.taps)
    norms = family_norms(state.model, state.optimizer.groups)
    numbers = iter(read([*scalars.values(), losses, *norms.values()]))
    metrics = {name: next(numbers) for name in scalars}
    sample_losses = list(islice(numbers, len(losses)))
    families = {f: list(islice(numbers, len(n))) for f, n in norms.items()}
    return metrics, _Whole(
        losses=sample_losses, indices=indices.tolist(), tokens=tokens, family_norms=families
    )


def _of_all_ranks(losses: Tensor, indices: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
    """The losses and indices of the samples of all ranks, and their tokens together."""
    numbers = (losses, indices.to(losses.device), torch.full_like(losses, tokens / len(losses)))
    rows = rows_of_each(torch.stack([n.double() for n in numbers], dim=1))  # [B, 3], exact in fp64
    losses, indices, each = rows.unbind(1)
    return losses.float(), indices.long(), round(float(each.sum()))


def _tokens(model: DiT, latents: Tensor, text: Tensor) -> int:
    """Tokens that the network processes for such a batch, padding included."""
    each = math.prod(model.config.patch_grid(latents.shape[2:])) + text.shape[1]
    return len(latents) * each


def _explain(
    model: DiT, config: TrainConfig, parts: list[Piece], step: int, metrics: dict[str, float]
) -> str:
    """Which value is not finite, and where it began: in a weight, else an activation, else a
    gradient."""
    weight = first_in_weights(model)
    if weight is not None:
        origin = f"the weights of {weight} are not finite"
    elif not math.isfinite(metrics["loss"]):
        found = [
            first_in_activations(model, partial(piece_losses, model, p, config)) for p in parts
        ]
        place = next((p for places in from_each(found) for p in places if p), None)
        origin = f"first in the output of {place}" if place else "every activation is finite"
    else:
        place = first_in_gradients(model)
        origin = f"first in the gradient of {place}" if place else "every gradient is finite"
    return (
        f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}, "
        f"{origin}"
    )
