"""A step of a run once more: as it was, and under what might have caused its gradient spike.

Nothing is updated: every trial has the weights that the step had, and only its gradients differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mvsplit.diagnostics.attribution import (
    CENTERED,
    REMOVED,
    Sample,
    Trial,
    calm_norm,
    removed_share,
)
from mvsplit.diagnostics.counterfactual import CenteredAdjoints
from mvsplit.diagnostics.probe import CHEAP_FIELDS, LayerProbe
from mvsplit.diagnostics.taps import BranchName, read
from mvsplit.errors import UserError
from mvsplit.training.builders import build_state
from mvsplit.training.checkpoint import DamagedCheckpoint, read_checkpoint
from mvsplit.training.config import TrainConfig
from mvsplit.training.flight import Flight
from mvsplit.training.gradient_families import family_norms
from mvsplit.training.nonfinite import first_in_activations, first_in_gradients, first_in_weights
from mvsplit.training.objective import Objective
from mvsplit.training.optimizer import global_norm
from mvsplit.training.parallelize import raised_weights
from mvsplit.training.pieces import Piece, cut
from mvsplit.training.state import TrainState
from mvsplit.training.step import add_gradients, pieces, pieces_beside, train_step

MOST_SAMPLES = 3  # that are dropped together before the data are acquitted

_BRANCHES: dict[str, tuple[BranchName, ...]] = {
    "centered-attn": ("attn",),
    "centered-ffn": ("ffn",),
    "centered-both": ("attn", "ffn"),
}


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The numbers of one pass over some samples of the step: `loss` is that of the batch, and
    behind its `sample_losses` are those of the samples beside it."""

    loss: float
    grad_norm: float
    sample_losses: list[float]
    family_norms: dict[str, list[float]]

    def family(self, name: str) -> float:
        """The norm of a family over all layers; 0 where all of it is frozen."""
        return math.hypot(*self.family_norms.get(name, ()))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the paper's App. F looks at on a spike.

    Attributes:
        rank_losses: the loss of each process's share of the batch.
        worst_samples: the samples with the largest loss.
        output_gradient_rms: of ∂L/∂v over the batch and what comes beside, v the network's output.
        not_finite: the first place among weights, activations and gradients that is not finite.
        family_norms: of every layer, by family.
        calm_family_norms: the medians of the recorded steps before, empty where none was recorded.
        mode_split: `tcs`, `g_mean_*` and `g_ctr_*` of every layer, of the piece of the batch where
            the mean-coherent gradients are largest.
    """

    rank_losses: list[float]
    worst_samples: list[Sample]
    output_gradient_rms: float
    not_finite: dict[str, str | None]
    family_norms: dict[str, list[float]]
    calm_family_norms: dict[str, list[float]]
    mode_split: dict[str, list[float | None]]


def state_before(
    flight: Flight, device: str | None, say: Callable[[str], None] = lambda line: None
) -> tuple[TrainState, int]:
    """The run as it was before the step, and the step of the state that it was reached from.

    Raises:
        UserError: a checkpoint is damaged, none is left of a run that began with trained weights,
            or the run cannot be rebuilt here.
    """
    origin = flight.experiment.origin
    if origin is not None and not flight.checkpoints:
        raise UserError(
            f"step={flight.step}: the run began with the weights of {origin.source}, and no "
            f"checkpoint before this step is left; name a step after one that is"
        )
    train = flight.experiment.train
    train = train if device is None else dataclasses.replace(train, device=device)
    state = build_state(dataclasses.replace(flight.experiment, train=train))
    if flight.checkpoints:
        _restore(state, flight)
    start = state.step
    if start < flight.step - 1:
        say(f"replaying the steps {start + 1} to {flight.step - 1}")
    while state.step < flight.step - 1:
        train_step(state, train)
    return state, start


def _restore(state: TrainState, flight: Flight) -> None:
    try:
        snapshot = read_checkpoint(flight.checkpoints[-1])
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; remove it, and an older one is used") from error
    if "optimizer" in snapshot.tensors:
        state.restore(snapshot)
        return
    # Weights alone are enough where no step lies between, and the flight holds the batch.
    snapshot.copy_to("model", dict(state.model.state_dict()))
    for name, tensors in state.objective.tensors().items():
        snapshot.copy_to(name, tensors)
    state.step = snapshot.step


class Rerun:
    """A step that can be run again on any of its samples. These go by numbers: first the `rows` of
    the batch, then as many of what comes beside it, if anything does."""

    def __init__(self, flight: Flight, state: TrainState) -> None:
        self.flight, self.state, self.config = flight, state, flight.experiment.train
        self.batch = state.loader.next_batch() if flight.batch is None else flight.batch
        one = dataclasses.replace(self.config, accumulate=1)
        self._wholes: list[tuple[Objective | None, Piece]] = [
            *((state.objective, p) for p in pieces(self.batch, flight.step, one, state.device)),
            *(
                (state.objective.beside, p)
                for p in pieces_beside(self.batch, flight.step, one, state.device)
            ),
        ]
        self.rows = list(range(len(self.batch.latents)))
        self.samples = list(range(len(self.rows) * len(self._wholes)))

    def run(
        self,
        samples: list[int],
        config: TrainConfig | None = None,
        within: AbstractContextManager[Any] | None = None,
    ) -> Gradient:
        """The gradient of the mean loss over some samples, and of that over those beside."""
        state, found = self.state, []
        state.optimizer.zero_grad()
        with within or nullcontext():
            for objective, parts in self._passes(samples):
                measured = add_gradients(
                    state.model, config or self.config, parts, objective=objective
                )
                found.append(measured.view(len(measured), -1)[:, 0])
        losses = torch.cat(found)
        norms = family_norms(state.model, state.optimizer.groups)
        scalars = [found[0].mean(), global_norm(state.optimizer.groups)]
        loss, norm, *rest = read([*scalars, losses, *norms.values()])
        families, at = {}, len(losses)
        for name, values in norms.items():
            families[name] = rest[at : at + len(values)]
            at += len(values)
        return Gradient(
            loss=loss, grad_norm=norm, sample_losses=rest[: len(losses)], family_norms=families
        )

    def _passes(self, samples: list[int]) -> Iterator[tuple[Objective, list[Piece]]]:
        """What is minimised of the samples, in pieces of the size that the run had."""
        for number, (objective, whole) in enumerate(self._wholes):
            rows = [self._row(n) for n in samples if self._kind(n) == number]
            if rows:
                assert objective is not None
                yield objective, list(self._parts(whole, rows))

    def _kind(self, sample: int) -> int:
        """0 in the batch, 1 beside it."""
        return sample // len(self.rows)

    def _row(self, sample: int) -> int:
        return sample % len(self.rows)

    def _parts(self, whole: Piece, rows: list[int]) -> Iterator[Piece]:
        count = -(-len(rows) * self.config.accumulate // len(self.rows))
        for part in cut(len(rows), count):
            chosen = torch.tensor(rows[part], device=self.state.device)
            yield Piece(
                data=whole.data[chosen],
                noise=whole.noise[chosen],
                times=whole.times[chosen],
                text=whole.text[chosen],
                text_valid=None if whole.text_valid is None else whole.text_valid[chosen],
                rejected=None if whole.rejected is None else whole.rejected[chosen],
            )

    def trial(self, name: str, label: str, gradient: Gradient) -> Trial:
        return Trial(
            name=name,
            label=label,
            loss=gradient.loss,
            grad_norm=gradient.grad_norm,
            writer_attn=gradient.family("Attn_WO"),
            writer_ffn=gradient.family("FFN_W2"),
        )

    def other_trials(self) -> Iterator[Trial]:
        """In fp32 (weights too, from where bf16 has rounded them to), and with MV-Split's backward
        at α = 0 on one branch and on both."""
        if self.config.precision != "fp32":
            fp32 = dataclasses.replace(self.config, precision="fp32", weights="fp32")
            networks = (self.state.model, *self.state.objective.networks())
            raised = raised_weights(nn.ModuleList(networks))
            yield self.trial("fp32", "in fp32", self.run(self.samples, fp32, raised))
        for name, branches in _BRANCHES.items():
            within = CenteredAdjoints(self.state.taps, branches)
            label = f"MV-Split on {CENTERED[name]}"
            yield self.trial(name, label, self.run(self.samples, within=within))

    def without_samples(
        self, whole: Gradient, calm: float | None
    ) -> tuple[list[Sample], Gradient | None]:
        """Drops the sample with the largest gradient, then one more, until the spike is gone.

        Returns:
            The samples and the step without them; with the first one only where none of it helps.
            ([], None) for a batch of one.
        """
        found: list[tuple[list[Sample], Gradient]] = []
        dropped: list[Sample] = []
        left = list(self.samples)
        for _ in range(min(MOST_SAMPLES, len(self.rows) - 1)):
            largest = self._largest(left)
            left.remove(largest)
            dropped = [*dropped, self._sample(largest, whole)]
            found.append((dropped, self.run(left)))
            share = removed_share(whole.grad_norm, found[-1][1].grad_norm, calm)
            if share is None:
                break
            if share >= REMOVED:
                return found[-1]
        return found[0] if found else ([], None)

    def _largest(self, samples: list[int]) -> int:
        """The sample with the largest gradient by halving, first of those in the batch, then of
        those beside it: of n samples, 2n are run."""
        largest = []
        for kind in range(len(self._wholes)):
            left = [n for n in samples if self._kind(n) == kind]
            while len(left) > 1:
                halves = left[: len(left) // 2], left[len(left) // 2 :]
                left = max(halves, key=self._contribution)
            largest += left
        if len(largest) == 1:
            return largest[0]
        return max(largest, key=lambda number: self._contribution([number]))

    def _contribution(self, samples: list[int]) -> float:
        """The norm of what samples of one kind add to the sum of all gradients."""
        norm = self.run(samples).grad_norm
        return len(samples) * norm if math.isfinite(norm) else math.inf

    def _sample(self, number: int, whole: Gradient) -> Sample:
        row, kind = self._row(number), self._kind(number)
        batch = self.batch.beside if kind else self.batch
        assert batch is not None
        loss = whole.sample_losses[kind * len(self.rows) :][: len(self.rows)]
        sizes = self._wholes[kind][1].data.square().flatten(1).mean(1).sqrt().tolist()
        return Sample(
            row=row,
            index=int(batch.indices[row]),
            loss=loss[row],
            unusual=max(_over_median(values, row) for values in (loss, sizes)),
            beside=kind == 1,
        )

    # The trace of App. F

    def not_finite(self) -> dict[str, str | None]:
        """Where the first value that is not finite lies; asks the gradients of the last run."""
        model = self.state.model
        gradients = first_in_gradients(model)
        activations = (
            first_in_activations(model, partial(objective, model, part, self.config))
            for objective, parts in self._passes(self.samples)
            for part in parts
        )
        return {
            "weights": first_in_weights(model),
            "activations": next((place for place in activations if place), None),
            "gradients": gradients,
        }

    def trace(self, whole: Gradient, not_finite: dict[str, str | None]) -> Trace:
        """What the paper's App. F looks at, of the step as it was."""
        split, rms = self._watched()
        share = len(self.rows) // self.flight.world
        ranks = [whole.sample_losses[i : i + share] for i in range(0, len(self.rows), share)]
        worst = sorted(self.rows, key=lambda row: -_size(whole.sample_losses[row]))
        return Trace(
            rank_losses=[sum(losses) / len(losses) for losses in ranks],
            worst_samples=[self._sample(row, whole) for row in worst[:3]],
            output_gradient_rms=rms,
            not_finite=not_finite,
            family_norms=whole.family_norms,
            calm_family_norms=_calm_families(self.flight),
            mode_split=split,
        )

    def _watched(self) -> tuple[dict[str, list[float | None]], float]:
        """The mode split of the piece where it is largest, and the RMS of ∂L/∂v."""
        squares: list[Tensor] = []
        numbers = 0

        def look(_: Any, args: Any, velocity: Tensor) -> None:
            nonlocal numbers
            numbers += velocity.numel()
            velocity.register_hook(lambda grad: squares.append(grad.float().square().sum()))

        splits = []
        self.state.optimizer.zero_grad()
        handle = self.state.model.register_forward_hook(look)
        for objective, parts in self._passes(self.samples):
            for part in parts:
                with LayerProbe(self.state.taps, fields=CHEAP_FIELDS) as probe:
                    measured = objective(self.state.model, part, self.config)
                    losses = measured.view(len(measured), -1)[:, 0]
                    (losses.sum() / len(self.rows)).backward()
                splits.append(probe.arrays())
        handle.remove()
        largest = max(splits, key=lambda s: sum(_size(g) for _, _, g, _ in writers(s)))
        return largest, math.sqrt(sum(read(squares)) / numbers)


def _over_median(values: list[float], at: int) -> float:
    """One of some values over the median of the finite ones; infinite if it is not finite."""
    usual = calm_norm(values)
    return values[at] / usual if usual and math.isfinite(values[at]) else math.inf


def _size(value: float | None) -> float:
    """For sorting: what is not finite is largest."""
    return 0.0 if value is None else value if math.isfinite(value) else math.inf


def _calm_families(flight: Flight) -> dict[str, list[float]]:
    before = [r["family_norms"] for r in flight.records[:-1] if "family_norms" in r]
    if not before:
        return {}
    return {
        family: [median(column) for column in zip(*(r[family] for r in before), strict=True)]
        for family in before[-1]
    }


def writers(
    split: dict[str, list[float | None]],
) -> Iterator[tuple[str, int, float | None, float | None]]:
    """Writer, layer, G_mean and G_ctr of each."""
    for writer, branch in (("W_O", "attn"), ("W_2", "ffn")):
        pairs = zip(split[f"g_mean_{branch}"], split[f"g_ctr_{branch}"], strict=True)
        for layer, (mean, centered) in enumerate(pairs):
            yield writer, layer, mean, centered
