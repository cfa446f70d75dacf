"""One optimiser step: gradients of a batch, the check for non-finite values, clip, update, average.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from mvsplit.data import Batch
from mvsplit.diagnostics.taps import gradient_norm_tensors, read
from mvsplit.flow import sample_times
from mvsplit.models import DiT
from mvsplit.training.config import TrainConfig
from mvsplit.training.distributed import at, from_each, rank, rows_of_each, world
from mvsplit.training.gradient_families import family_norms
from mvsplit.training.graphs import Graphs, Look
from mvsplit.training.nonfinite import (
    NonFiniteError,
    first_in_activations,
    first_in_gradients,
    first_in_weights,
)
from mvsplit.training.objective import FLOW, Objective
from mvsplit.training.optimizer import clip_gradients_, global_norm
from mvsplit.training.parallelize import sync_gradients
from mvsplit.training.pieces import Piece, cut, in_few_lengths
from mvsplit.training.randomness import generator_for
from mvsplit.training.state import TrainState
from mvsplit.training.surgery import anneal

STREAMS = " beside"  # behind the names of the chance of what comes beside a batch


def pieces(
    batch: Batch, step: int, config: TrainConfig, device: torch.device, streams: str = ""
) -> Iterator[Piece]:
    """Cuts this rank's share of the batch of a step; chance is drawn for the whole batch first, so
    that neither this cut nor that into shares changes anything. `streams` names other chance."""
    data = batch.latents.to(device)
    samples = len(data) * world()
    stream = partial(generator_for, config.seed, device=device)
    noise = torch.randn(
        (samples, *data.shape[1:]), generator=stream(f"noise{streams}", step), device=device
    )
    times = sample_times(
        samples, shift=config.time_shift, generator=stream(f"times{streams}", step), device=device
    )
    if samples > len(data):
        share = slice(rank() * len(data), (rank() + 1) * len(data))
        noise, times = noise[share], times[share]
    rejected = None if batch.rejected is None else batch.rejected.to(device)
    text = batch.text.to(device)
    valid = None if batch.text_valid is None else batch.text_valid.to(device)
    if device.type == "cuda":
        text, valid = in_few_lengths(text, valid)
    for rows in cut(len(data), config.accumulate):
        yield Piece(
            data=data[rows],
            noise=noise[rows],
            times=times[rows],
            text=text[rows],
            text_valid=None if valid is None else valid[rows],
            rejected=None if rejected is None else rejected[rows],
        )


def pieces_beside(
    batch: Batch, step: int, config: TrainConfig, device: torch.device
) -> list[Piece]:
    """The pieces of what comes beside the batch, if anything does."""
    if batch.beside is None:
        return []
    return list(pieces(batch.beside, step, config, device, streams=STREAMS))


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


def add_gradients(
    model: DiT,
    config: TrainConfig,
    parts: list[Piece],
    graphs: Graphs | None = None,
    look: Look | None = None,
    objective: Objective = FLOW,
) -> Tensor:
    """Adds the gradients of the mean loss over all samples to what the model's gradients hold, and
    returns what the objective measures of each sample, [B] or [B, names]. Ranks send each other
    their gradients once. `look` sees the first piece go forward and back."""
    samples = sum(len(piece.data) for piece in parts)
    found = []

    def run(piece: Piece) -> Tensor:
        assert piece.parts is not None
        measured = objective(model, piece, config)
        losses = measured.view(len(measured), -1)[:, 0]
        (losses.mean() / piece.parts).backward()
        return measured.detach()

    for number, piece in enumerate((_counted(piece, samples) for piece in parts), start=1):
        at(f"forward and backward of piece {number}")
        sync_gradients(model, number == len(parts))
        eye = look if number == 1 else None
        if graphs is not None:
            found.append(graphs.run(piece, run, eye))
        else:
            with nullcontext() if eye is None else eye.passes():
                found.append(run(piece))
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
    look: Look | None = None,
    beside: list[Piece] | None = None,
) -> Tensor:
    """The gradients of the mean loss over all pieces, and of that over those beside them, instead
    of those that were there; returns what the objective measures of each sample, [B] or
    [B, names]; the last columns are of the samples beside."""
    if state.planner is not None:
        every = (*parts, *(beside or ()))
        state.planner.before(max(_tokens(state.model, p.data, p.text, p.rejected) for p in every))
    state.optimizer.zero_grad()
    model, graphs, objective = state.model, state.graphs, state.objective
    measured = add_gradients(model, config, parts, graphs, look, objective)
    if beside:
        assert objective.beside is not None
        others = add_gradients(model, config, beside, graphs, objective=objective.beside)
        measured = torch.cat((measured, others[:, 1:]), dim=1)
    at("the exchange of gradients")
    state.optimizer.collect_grads()
    if look is not None:
        look.read_gradients()
    return measured


def train_step(
    state: TrainState,
    config: TrainConfig,
    *,
    before_update: Callable[[Gradients], bool | None] | None = None,
    look: Look | None = None,
) -> dict[str, float]:
    """Takes the next step of the run.

    Args:
        look: sees the first piece of the batch go forward and back, and reads the gradients of the
            parameters before the update is made.
        before_update: is told what the step knows before the update is made, non-finite or not;
            where it returns False, the update is not made and the step is not counted.

    Returns:
        `loss` and what else the objective measures, `grad_norm` (before clipping), `lr`, `tokens`,
        and the gradient norms of W_O, W_2, W_Q and W_K over the deepest quarter of the layers.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    step, position = state.step + 1, state.loader.position
    at(f"the batch of step {step}")
    batch = state.loader.next_batch()
    parts = list(pieces(batch, step, config, state.device))
    beside = pieces_beside(batch, step, config, state.device)
    measured = accumulate_gradients(state, config, parts, look, beside)
    metrics, found = _read_all(state, measured, batch)
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
        raise NonFiniteError(_explain(state, config, parts, beside, step, metrics))
    at("the update")
    clip_gradients_(state.optimizer.groups, metrics["grad_norm"], config.clip)
    state.optimizer.step(lr)
    state.step = step
    anneal(state, config.reaction)
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


def _read_all(state: TrainState, measured: Tensor, batch: Batch) -> tuple[dict[str, float], _Whole]:
    """The numbers of a step: waits for the device, once where one process is alone."""
    indices = batch.indices
    tokens = sum(
        _tokens(state.model, b.latents, b.text, b.rejected)
        for b in (batch, batch.beside)
        if b is not None
    )
    if world() > 1:
        measured, indices, tokens = _of_all_ranks(measured, indices, tokens)
    losses, *others = measured.view(len(measured), -1).unbind(1)
    means = [column.mean() for column in (losses, *others)]
    scalars = dict(zip(state.objective.names, means, strict=True))
    scalars["grad_norm"] = global_norm(state.optimizer.groups)
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


def _tokens(model: DiT, latents: Tensor, text: Tensor, rejected: Tensor | None) -> int:
    """Tokens that the network learns from for such a batch, padding included."""
    each = math.prod(model.config.patch_grid(latents.shape[2:])) + text.shape[1]
    return len(latents) * each * (1 if rejected is None else 2)


def _explain(
    state: TrainState,
    config: TrainConfig,
    parts: list[Piece],
    beside: list[Piece],
    step: int,
    metrics: dict[str, float],
) -> str:
    """Which value is not finite, and where it began: in a weight, else an activation, else a
    gradient."""
    model, objective = state.model, state.objective
    weight = first_in_weights(model)
    if weight is not None:
        origin = f"the weights of {weight} are not finite"
    elif not all(math.isfinite(metrics[name]) for name in objective.names):
        passes = [(objective, p) for p in parts]
        passes += [(o, p) for p in beside if (o := objective.beside) is not None]
        found = [first_in_activations(model, partial(o, model, p, config)) for o, p in passes]
        place = next((p for places in from_each(found) for p in places if p), None)
        origin = f"first in the output of {place}" if place else "every activation is finite"
    else:
        place = first_in_gradients(model)
        origin = f"first in the gradient of {place}" if place else "every gradient is finite"
    return (
        f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}, "
        f"{origin}"
    )
