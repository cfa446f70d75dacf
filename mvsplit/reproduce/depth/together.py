"""Runs of the bench trained as one ensemble: the same data, start, schedule and update as alone.

Shapes: E members, B samples, N numbers of a network, S seeds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mvsplit.flow import interpolate
from mvsplit.kernels.capture import capture
from mvsplit.models import DiT, DiTConfig
from mvsplit.reproduce.depth.ensemble import Ensemble
from mvsplit.reproduce.depth.ensemble_scores import score
from mvsplit.reproduce.depth.plan import BenchRun, BenchSize
from mvsplit.reproduce.depth.run import (
    FINISHED,
    WINDOW,
    collapse,
    head,
    now,
    six_digits,
    windows,
    write_row,
)
from mvsplit.reproduce.runlog import LIVING_LOSS, Array
from mvsplit.reproduce.trial import token_floor
from mvsplit.training import Experiment, TrainConfig
from mvsplit.training.builders import build_loader, build_model, resolve_device
from mvsplit.training.memory_plan import allowed_bytes
from mvsplit.training.optimizer import peak_learning_rate, warmup_then_constant
from mvsplit.training.step import pieces

_logger = logging.getLogger(__name__)
TOKENS = 88  # of a sample of shapes at a patch of 4: 64 of the picture, captions padded to 24
WORDS = 8  # captions are padded to a multiple of so many tokens, one length for the whole training
# Of the memory that may be allocated: the first step, which has no graph yet, leaves pieces that
# nothing fits into. 15 members of 1000 layers, 92 % of it, had no room on an H200.
_FILLED = 0.8
CLOCK = 20  # steps between looks at the clock, each of which waits for the device


@dataclass
class Batches:
    """All batches of some seeds, on the device.

    Attributes:
        noisy, target: [S, steps, B, C, H, W], z_t and x0 − x1.
        text: [S, steps, B, T, Dc].
        valid: [S, steps, B], its real tokens.
    """

    noisy: Tensor
    target: Tensor
    text: Tensor
    valid: Tensor

    @classmethod
    def of(cls, experiments: Sequence[Experiment], device: torch.device) -> Batches:
        """The batches that `mvsplit.training` gives a run of each experiment."""
        each = [list(_batches(experiment, device)) for experiment in experiments]
        columns = [[torch.stack(c) for c in zip(*steps, strict=True)] for steps in each]
        return cls(*(torch.stack(column) for column in zip(*columns, strict=True)))


def _batches(experiment: Experiment, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    loader, config = build_loader(experiment), experiment.train
    length = -(-loader.dataset.caption_words // WORDS) * WORDS  # type: ignore[attr-defined]
    for step in range(1, config.steps + 1):
        (piece,) = pieces(loader.next_batch(), step, config, device)
        text, valid = piece.text[:, :length], piece.text_valid
        if valid is None:
            valid = torch.full((len(text),), text.shape[1], device=device)
        text = pad(text, (0, 0, 0, length - text.shape[1]))
        noisy = interpolate(piece.data, piece.noise, piece.times)
        yield noisy, piece.data - piece.noise, text, valid


class Training:
    """Networks of one shape and family of rules from their start to their last step.

    Args:
        experiments: alike but for the rule, the learning rate and its warm-up, clipping and seed.
        factors: for each, what the learning rate of a step is multiplied by; 1 if not given.
        looks: steps at whose batches the similarity of tokens is taken, before their updates.
        recompute: whether backward computes every block again instead of keeping it; None where
            memory is too short for what they keep.
        graph_or_nothing: whether a recording that fails is an error: deep networks take minutes a
            hundred steps without one.

    Attributes:
        losses, norms: [steps, E], of each step; the gradient norms are those before clipping.
        similarity: by step, the token cosine similarity [E, L].
        step: steps that were taken.
        starting: seconds until the second step was through: compiling, choosing, recording.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        *,
        factors: Sequence[Callable[[int], float]] = (),
        looks: Collection[int] = (),
        recompute: bool | None = None,
        graph_or_nothing: bool = False,
    ) -> None:
        self.graph_or_nothing = graph_or_nothing
        self.experiment, self.looks = experiments[0], looks
        self.config = self.experiment.train
        self.device = resolve_device(self.config.device)
        if recompute is None:
            recompute = room_for(self.experiment, self.device) < len(experiments)
        self.recompute = recompute
        self.ensemble = Ensemble(_models(experiments, self.device), _dtype(self.config))
        by_seed = {e.train.seed: e for e in reversed(experiments)}
        self.batches = Batches.of([*by_seed.values()], self.device)
        seeds = [*by_seed]
        whose = [seeds.index(e.train.seed) for e in experiments]
        self._whose = torch.tensor(whose, device=self.device)
        self._update = Update(self.ensemble, experiments, factors, self.device)
        self.losses = torch.full((self.config.steps, len(whose)), math.nan, device=self.device)
        self.norms = torch.full_like(self.losses, math.nan)
        self._now = tuple(torch.empty_like(c[:, 0]) for c in vars(self.batches).values())
        self._found = self.losses.new_zeros(2, len(whose))
        self.similarity: dict[int, Tensor] = {}
        self._graph: Any = None
        self.step = 0
        self.starting = math.nan

    def run(self, end: float = math.inf) -> bool:
        """Takes all steps, unless the clock says `end` before, or will by the steps so far: then it
        stops at once, so that no minute is spent on what leaves nothing. Whether it took them."""
        began = time.perf_counter()
        while self.step < self.config.steps:
            self._read(self.step)
            if self.step + 1 in self.looks:
                self.similarity[self.step + 1] = self._look()
            if self.step == 1:
                self._record()
            if self._graph is None:  # in the first step kernels are compiled and choices made
                self._take()
            else:
                self._graph.replay()
            self.losses[self.step], self.norms[self.step] = self._found
            self.step += 1
            if self.step == 2 or self.step % CLOCK == 0:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if self.step == 2:
                    self.starting = time.perf_counter() - began
                if time.time() + self._seconds_left(began) > end:
                    return False
        return True

    def _seconds_left(self, began: float) -> float:
        """By the steps after the second one; said where these are minutes."""
        if self.step <= 2:
            return 0.0
        pace = (time.perf_counter() - began - self.starting) / (self.step - 2)
        left = pace * (self.config.steps - self.step)
        if self.step == CLOCK and left > 60:
            members = len(self._whose)
            _logger.warning("%d as one: %.2f s a step, %.0f s to go", members, pace, left)
        return left

    def let_go(self) -> int:
        """Lets go of the graph and the moments, so that scores have their memory; gives how many
        graphs there were. No step can be taken after it."""
        graphs = int(self._graph is not None)
        del self._graph, self._update
        return graphs

    def course(self, member: int) -> tuple[Array, Array, str]:
        """Losses and gradient norms of the steps up to the first that is not finite, and how the
        run of a member ended."""
        losses, norms = (t[:, member].double().cpu().numpy() for t in (self.losses, self.norms))
        broken = np.flatnonzero(~(np.isfinite(losses) & np.isfinite(norms)))
        taken = int(broken[0]) if len(broken) else len(losses)
        ended = f"non-finite: step {taken + 1}" if len(broken) else FINISHED
        return losses[:taken], norms[:taken], ended

    @torch.no_grad()
    def _look(self) -> Tensor:
        """The similarity of tokens [E, L] at the batch that was read."""
        noisy, _, text, valid = (column[self._whose] for column in self._now)
        found: list[Tensor] = []
        self.ensemble.refresh()
        self.ensemble.forward(noisy, text, valid, similarity=found)
        return torch.stack(found, 1).cpu()

    def _read(self, step: int) -> None:
        for target, column in zip(self._now, vars(self.batches).values(), strict=True):
            target.copy_(column[:, step])
        self._update.read(step + 1)

    def _record(self) -> None:
        """Has a CUDA graph for the steps from now on; where it cannot be recorded, they are taken
        operation by operation, and that is said."""
        if self.device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        try:
            with capture(graph):
                self._take()
            self._graph = graph
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or self.graph_or_nothing:
                raise
            _logger.warning("an ensemble steps without a CUDA graph, and slower: %s", error)

    def _take(self) -> None:
        """One step on what was read, by the device's own numbers alone."""
        ensemble = self.ensemble
        noisy, target, text, valid = (column[self._whose] for column in self._now)
        ensemble.refresh()
        velocity = ensemble.forward(noisy, text, valid, recompute=self.recompute)
        errors = velocity.to(target.dtype) - target
        losses = errors.square().flatten(1).mean(1)
        ensemble.backward(losses.sum())
        norms = self._update.take()
        self._found.copy_(torch.stack((losses.detach(), norms)))


def room_for(experiment: Experiment, device: torch.device, *, recompute: bool = False) -> float:
    """Members of an ensemble that the device has memory for, where they keep all that their
    backward needs, or with `recompute` only what enters their blocks."""
    if device.type != "cuda":
        return math.inf
    tokens = experiment.train.batch_size * TOKENS
    each = member_bytes(experiment.model, tokens, recompute=recompute)
    return _FILLED * allowed_bytes(device) // each


def member_bytes(config: DiTConfig, tokens: int, *, recompute: bool) -> int:
    """Bytes that a member takes on the device: 18 for a parameter, and what its blocks keep of
    `tokens` tokens."""
    matrices = 4 * config.width**2 + 3 * config.width * config.ffn_width
    kept = 2 * config.width if recompute else 24 * config.width + 6 * config.ffn_width
    return config.depth * (18 * matrices + tokens * kept)


class Update:
    """Clipping and AdamW as in `mvsplit.training.optimizer`, each member by its own learning rate,
    norm and limit. Nothing is read back, so that a graph can hold it."""

    def __init__(
        self,
        ensemble: Ensemble,
        experiments: Sequence[Experiment],
        factors: Sequence[Callable[[int], float]],
        device: torch.device,
    ) -> None:
        self.config = experiments[0].train
        self._parts = [
            (ensemble.values, ensemble.grads, ensemble.decays),
            (ensemble.gains, ensemble.gain_grads, None),
        ]
        self._moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v, _, _ in self._parts]
        self._schedules = [
            warmup_then_constant(peak_learning_rate(e.train, e.model.width), e.train.warmup)
            for e in experiments
        ]
        self._factors = factors or [lambda step: 1.0] * len(experiments)
        self._of_gains = [e.train.gain_lr for e in experiments]
        dtype = ensemble.values.dtype
        self._rates = torch.zeros(2, len(experiments), dtype=dtype, device=device)
        limits = [e.train.clip for e in experiments]
        self._limits = torch.tensor(limits, dtype=dtype, device=device)
        self._corrections = torch.zeros(2, dtype=dtype, device=device)
        self._adamw = torch.compile(adamw, dynamic=True) if device.type == "cuda" else adamw

    def read(self, step: int) -> None:
        """The learning rates of a step, and how far the moments are from their start."""
        pairs = zip(self._schedules, self._factors, strict=True)
        rates = [schedule(step) * factor(step) for schedule, factor in pairs]
        of_gains = [rate * own for rate, own in zip(rates, self._of_gains, strict=True)]
        self._rates.copy_(torch.tensor([rates, of_gains], dtype=torch.float64))
        self._corrections.copy_(
            torch.tensor([1 - beta**step for beta in self.config.betas], dtype=torch.float64)
        )

    @torch.no_grad()
    def take(self) -> Tensor:
        """Updates all members; gives the norms of their gradients before clipping, [E]."""
        squares = [
            torch.linalg.vector_norm(grads.flatten(1), dim=1).square()
            for _, grads, _ in self._parts
        ]
        norms = torch.stack(squares).sum(0).sqrt()
        scale = self._limits / torch.maximum(norms, self._limits)
        for part, moments, rates in zip(self._parts, self._moments, self._rates, strict=True):
            values, grads, decays = part
            decay = 0.0 if decays is None else self.config.weight_decay * decays
            shape = (-1, *[1] * (values.ndim - 1))
            self._adamw(
                values,
                grads,
                *moments,
                rates.view(shape),
                scale.view(shape),
                decay,
                self._corrections,
                self.config.betas,
                self.config.eps,
            )
        return norms


def adamw(
    values: Tensor,
    grads: Tensor,
    first: Tensor,
    second: Tensor,
    rate: Tensor,
    scale: Tensor,
    decay: Tensor | float,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """AdamW in place; `rate`, `scale` and `decay` are broadcast."""
    grads = grads * scale
    first.lerp_(grads, 1 - betas[0])
    second.mul_(betas[1]).add_(grads.square() * (1 - betas[1]))
    values.mul_(1 - rate * decay)
    denominator = (second.sqrt() / corrections[1].sqrt()).add_(eps)
    values.sub_(rate / corrections[0] * first / denominator)


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _models(experiments: Sequence[Experiment], device: torch.device) -> list[DiT]:
    """Each run's network as it starts; runs that differ in how they train share one."""
    found: dict[tuple[DiTConfig, int], DiT] = {}
    for experiment in experiments:
        key = experiment.model, experiment.train.seed
        if key not in found:
            found[key] = build_model(experiment.model, experiment.train, device)
    return [found[experiment.model, experiment.train.seed] for experiment in experiments]


def run_together(
    runs: Sequence[BenchRun],
    size: BenchSize,
    out: Path,
    end: float = math.inf,
    *,
    recompute: bool | None = None,
    graph_or_nothing: bool = False,
) -> bool:
    """Trains and scores runs of one shape and family of rules, a row for each, and says whether
    they came to their end; the time `end`, in seconds of the clock, stops them before.

    A row has no peak memory, seconds a step or word of the watch, for these are of a network that
    runs alone."""
    began = time.perf_counter()
    if size.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    experiments = [run.experiment(size) for run in runs]
    training = Training(
        experiments,
        looks=(size.steps,),
        recompute=recompute,
        graph_or_nothing=graph_or_nothing,
    )
    built = time.perf_counter() - began
    if not training.run(end):
        return False
    trained, graphs = time.perf_counter() - began - built, training.let_go()
    scores = score(training.ensemble, build_loader(training.experiment).embedder, size)
    deepest = training.similarity[size.steps][:, -math.ceil(runs[0].depth / 4) :]
    similarity = deepest.double().mean(1).tolist()
    floors = {r.seed: token_floor(r.experiment(size)) for r in runs}
    on_gpu = training.device.type == "cuda"
    common = {
        "date": now(),
        "together": len(runs),
        "graphs": graphs,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "seconds_built": built,
        "seconds_starting": six_digits(training.starting),
        "seconds_trained": trained,
        "seconds": time.perf_counter() - began,
        "peak_gib_together": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }
    for member, run in enumerate(runs):
        row = head(run, size) | _of_curve(training, member, floors[run.seed])
        row |= scores[member] | {"similarity": six_digits(similarity[member])}
        row |= {"watch": None, "looks": 0, "peak_gib": None}
        row |= {"seconds_a_step": None, "collapse_seconds": None} | common
        loss = row["validation_loss"]
        finished = row["ended"] == FINISHED and loss is not None
        row["lives"] = finished and loss < LIVING_LOSS * row["floor"]
        write_row(row, out)
    return True


def _of_curve(training: Training, member: int, floor: float) -> dict[str, Any]:
    """What the steps say of a run, as `run.from_logs` does."""
    losses, _, ended = training.course(member)
    curve = windows(losses)
    at = collapse(curve / floor, dead_at_end=ended != FINISHED)
    return {
        "ended": ended,
        "floor": floor,
        "steps_taken": len(losses),
        "curve": [six_digits(v) for v in curve],
        "collapse_step": None if at is None else at * WINDOW,
    }
