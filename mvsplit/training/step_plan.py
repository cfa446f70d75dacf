"""What a training step will take, before there is a run: memory and time by part, whether it fits,
and what would make it fit.

The memory is that of `step_memory`, the time that of `step_time`; both say where their constants
come from, and tests compare them with what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mvsplit.data import Cache
from mvsplit.errors import UserError
from mvsplit.models import DiTConfig
from mvsplit.training.builders import (
    UNKNOWN_TEXT,
    build_data,
    check_share,
    largest_sample,
)
from mvsplit.training.config import Experiment, TrainConfig
from mvsplit.training.gpus import GIB, Gpu
from mvsplit.training.layout import Layout, layout_of, with_layout
from mvsplit.training.pieces import padded
from mvsplit.training.step_memory import StepMemory, count_parameters, step_memory
from mvsplit.training.step_time import WAITING, Shape, StepTime, is_rough, step_time

_MOST_GPUS = 64
_OF_A_MACHINE = 8
_MUCH = 0.2  # of a step
_UNKNOWN_IMAGE = 16  # latents a side, of 256×256 pictures in the FLUX.2 autoencoder


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens of a sample.

    Attributes:
        image: latents over the patch.
        text: of the longest caption, padded as a GPU gets it.
        source: where both come from, for people.
    """

    image: int
    text: int
    source: str

    @property
    def length(self) -> int:
        return self.image + self.text


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change with which it fits: the fields it sets and what then follows."""

    changes: dict[str, Any]
    memory: float
    seconds: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The plan of an experiment on `gpus` GPUs of one kind.

    Attributes:
        layout: how the network lies on several GPUs, and why.
        notes: what the figures leave out or take for granted.
        remedies: what would make it fit, or else what comes nearest; none where it fits, or where
            nothing that was tried takes less.
    """

    gpu: Gpu
    gpus: int
    parameters: int
    sample: Sample
    shape: Shape
    batch_size: int
    layout: str | None
    memory: StepMemory
    time: StepTime
    notes: tuple[str, ...]
    remedies: tuple[Remedy, ...]


def sample_of(
    experiment: Experiment, *, image: int | None = None, text: int | None = None
) -> Sample:
    """Tokens of the largest sample of an experiment's data, but for what is given.

    Raises:
        UserError: the data cannot be read.
    """
    patch, data = experiment.model.patch, experiment.data
    if image is not None and text is not None:
        return Sample(image=image, text=padded(text), source="as given")
    if data.dataset == "cache" and data.path is None:
        found = (_UNKNOWN_IMAGE // patch) ** 2
        source = (
            f"no data.path: latents of {_UNKNOWN_IMAGE}×{_UNKNOWN_IMAGE} and "
            f"{UNKNOWN_TEXT} text tokens assumed"
        )
        words = UNKNOWN_TEXT
    else:
        dataset = build_data(replace(data, verify=False))
        found, words = largest_sample(dataset, experiment.model)
        source = f"data set {data.dataset}, longest captions"
        if isinstance(dataset, Cache):
            source = f"cache {data.path}; {UNKNOWN_TEXT} text tokens assumed"
    return Sample(
        image=found if image is None else image,
        text=padded(words if text is None else text),
        source=source,
    )


def plan_step(experiment: Experiment, gpu: Gpu, gpus: int, sample: Sample) -> StepPlan:
    """The plan of an experiment.

    Args:
        gpu: what each of the GPUs can do.
        gpus: how many share the batch and the network.
        sample: tokens of a sample.

    Raises:
        UserError: the batch or the network cannot be divided so.
    """
    config = experiment.train
    layout, shape, memory, time = _figures(experiment.model, config, gpu, gpus, sample)
    return StepPlan(
        gpu=gpu,
        gpus=gpus,
        parameters=count_parameters(experiment.model).all,
        sample=sample,
        shape=shape,
        batch_size=config.batch_size,
        layout=None if gpus == 1 else layout.reason,
        memory=memory,
        time=time,
        notes=(
            *_notes(experiment, gpus, layout),
            *_larger_pieces(experiment, gpu, gpus, sample, time),
        ),
        remedies=() if memory.fits else _remedies(experiment, gpu, gpus, sample, memory.total),
    )


def _figures(
    model: DiTConfig, config: TrainConfig, gpu: Gpu, gpus: int, sample: Sample
) -> tuple[Layout, Shape, StepMemory, StepTime]:
    shape = _shape(config, gpus, sample)
    layout = layout_of(model, config, shape.tokens, gpu, gpus)
    config = with_layout(config, layout.name)
    memory = step_memory(model, config, shape.tokens, gpu, gpus)
    time = step_time(model, config, shape, memory.levels, gpu, ranks=gpus)
    return layout, shape, memory, time


def _shape(config: TrainConfig, gpus: int, sample: Sample) -> Shape:
    """The share of one GPU, in pieces. Raises UserError as a run would."""
    if gpus < 1:
        raise UserError(f"gpus={gpus}: must be at least 1")
    share = check_share(config, gpus, "GPUs")
    if gpus > 1 and gpus % config.parallel.replicas:  # one alone ignores them
        raise UserError(
            f"train.parallel.replicas={config.parallel.replicas} does not divide {gpus} GPUs"
        )
    return Shape(
        samples=-(-share // config.accumulate),
        length=sample.length,
        pieces=config.accumulate,
        share=share,
    )


def _notes(experiment: Experiment, gpus: int, layout: Layout) -> Iterator[str]:
    rough = is_rough(experiment.model, experiment.train)
    if rough:
        yield f"an order of magnitude only: {rough}"
    if gpus > 1:
        yield "several GPUs: what their links reach is assumed (two H200: docs/performance.md)"
    if gpus > 1 and layout.name == "shard":
        yield "sharded: kernels are launched one by one; a run on two H200 took 1.4 times as long"
    if experiment.train.tune.freezes:
        yield "of training with everything free; what is frozen needs no gradients and no moments"
    if experiment.train.objective == "dpo":
        real = ", and samples of the data set beside them as many again"
        yield (
            "of flow matching; pairs are twice the samples, and the reference a forward pass more"
            + (real if experiment.train.dpo.real else "")
        )
    yield "time is that of the step on a GPU: loading, looks into the layers and saves come on top"


def _larger_pieces(
    experiment: Experiment, gpu: Gpu, gpus: int, sample: Sample, time: StepTime
) -> Iterator[str]:
    """The number of pieces that is fastest, where it is much faster than what was asked for."""
    config = experiment.train
    found = []
    for pieces in range(1, config.accumulate):
        fewer = replace(config, accumulate=pieces)
        *_, memory, faster = _figures(experiment.model, fewer, gpu, gpus, sample)
        if memory.fits:
            found.append((faster.seconds, pieces, memory.total))
    if not found or min(found)[0] > (1 - _MUCH) * time.seconds:
        return
    seconds, pieces, total = min(found)
    share = time.parts.get(WAITING, 0.0) / time.seconds
    why = "small pieces fill the GPUs badly"
    if share >= _MUCH:
        why = f"the GPUs wait for launches {share:.0%} of the time"
    yield f"{why}: --accumulate {pieces} takes {seconds:.3g} s a step and {total / GIB:.1f} GiB"


def _remedies(
    experiment: Experiment, gpu: Gpu, gpus: int, sample: Sample, now: float
) -> tuple[Remedy, ...]:
    """Each single change that makes it fit; where none does, what several together reach."""
    for tried in (_single_changes(experiment.train), _TOGETHER):
        found = [
            remedy
            for changes in tried
            for remedy in (_try(experiment, gpu, gpus, sample, changes),)
            if remedy is not None
        ]
        if fit := [remedy for remedy in found if remedy.fits]:
            return tuple(fit)
    nearest = min(found, key=lambda remedy: remedy.memory, default=None)
    return () if nearest is None or nearest.memory >= now else (nearest,)


def _single_changes(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """In the order of what they cost."""
    if config.ema_decay:
        yield {"ema_decay": 0.0}
    if config.weights == "fp32":
        yield _LOW
        if config.ema_decay:
            yield _LOW | {"ema_decay": 0.0}
    yield {"accumulate": None}
    yield {"gpus": None}


_LOW = {"precision": "bf16", "weights": "bf16"}


_TOGETHER: tuple[dict[str, Any], ...] = (
    {**_LOW, "ema_decay": 0.0, "accumulate": None},
    {"ema_decay": 0.0, "gpus": None},
    {**_LOW, "ema_decay": 0.0, "gpus": None},
)


def _try(
    experiment: Experiment, gpu: Gpu, gpus: int, sample: Sample, changes: dict[str, Any]
) -> Remedy | None:
    """A change and what follows. Of those that are None the first value that fits is taken, that of
    the least memory where none does; None where there is no other value."""
    config = experiment.train
    fixed = {n: v for n, v in changes.items() if v is not None and getattr(config, n, None) != v}
    tried = []
    for numbers in _numbers(config, gpus, changes):
        count = numbers.get("gpus", gpus)
        fields = fixed | {n: v for n, v in numbers.items() if n != "gpus"}
        changed = replace(config, **fields)
        *_, memory, time = _figures(experiment.model, changed, gpu, count, sample)
        remedy = Remedy(
            changes=fixed | numbers,
            memory=memory.total,
            seconds=time.seconds,
            fits=memory.fits,
        )
        if memory.fits:
            return remedy
        tried.append(remedy)
    return min(tried, key=lambda remedy: remedy.memory, default=None)


def _numbers(config: TrainConfig, gpus: int, changes: dict[str, Any]) -> Iterator[dict[str, int]]:
    """Values for what a change leaves open, those that cost least first: more pieces, where they
    get smaller, then fewer, which sharded need no sum of whole gradients; more GPUs."""
    if "accumulate" in changes:
        share = config.batch_size // gpus
        counts = range(config.accumulate + 1, share + 1)
        yield from ({"accumulate": k} for k in counts if -(-share // k) < -(-share // (k - 1)))
        yield from ({"accumulate": k} for k in range(config.accumulate - 1, 0, -1))
    elif "gpus" in changes:
        for n in _more_gpus(config, gpus):
            for k in _pieces(config, gpus, n):
                yield {"gpus": n, "accumulate": k}
    else:
        yield {}


def _more_gpus(config: TrainConfig, gpus: int) -> list[int]:
    """Numbers that divide the batch, of one machine or of whole ones."""
    return [
        n
        for n in range(gpus + 1, _MOST_GPUS + 1)
        if config.batch_size % n == 0
        and n % config.parallel.replicas == 0
        and (n < _OF_A_MACHINE or n % _OF_A_MACHINE == 0)
    ]


def _pieces(config: TrainConfig, gpus: int, more: int) -> list[int]:
    """Pieces of the share of one of `more` GPUs: one, as many samples in each as now, or as many
    pieces as now."""
    same = max(1, config.accumulate * gpus // more)
    return sorted(k for k in {1, same, config.accumulate} if k <= config.batch_size // more)
