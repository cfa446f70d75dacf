"""What `dpo.py` is made of: a model of shapes, its data in the device's memory, and its steps."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from mvsplit.data import Batch, Scene, Shapes, WordEmbedder
from mvsplit.data.captions import COLOURS, SHAPES, SIZES
from mvsplit.data.render import render
from mvsplit.data.scenes import COLORS, SLOTS, SceneTable, draw_scenes
from mvsplit.flow import DPOConfig
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.lora import merge_lora
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, generate
from mvsplit.training import (
    DataConfig,
    Experiment,
    Origin,
    Start,
    TrainConfig,
    TrainState,
    build_state,
    train_step,
)
from mvsplit.training.finetune import begin_from
from mvsplit.training.objective import Preference
from mvsplit.training.optimizer import global_norm
from mvsplit.training.step import accumulate_gradients, pieces

SIZE = 32 if torch.cuda.is_available() else 16  # pixels a side
WORDS = 16 if torch.cuda.is_available() else 3  # of each caption, padding included: one shape
KINDS = ("circle", "triangle", "cross", "ring")
DRAW = SamplingConfig(steps=20, sampler="ab2", guidance=1.0, shift=2.0, batch_size=1024)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def network(options: argparse.Namespace) -> DiTConfig:
    """The network of `--depth` and `--width`."""
    width = options.width
    return DiTConfig(
        depth=options.depth,
        width=width,
        heads=width // 32,
        ffn_width=3 * width,
        channels=3,
        patch=4,
        text_width=width,
        rule=RuleConfig(name="mvsplit", beta=0.2),
    )


# The world: one large object of four shapes and eight colours on black, "a red ring".


def part_of(scene: Scene) -> str:
    """A quarter of the captions is `held` out and another is for `valid`ation; pairs are made of
    the rest. Each has all colours and all shapes."""
    thing = scene.objects[0]
    number = COLOURS.index(thing.colour) + 2 * KINDS.index(thing.shape)
    return ("held", "valid", "pairs", "pairs")[number % 4]


def world(series: int, first: int, count: int) -> SceneTable:
    """`count` scenes of a series, from place `first` on: those of one large object of the four
    shapes, its background black, its caption its colour and shape."""
    numbers = np.arange(first, first + 18 * count + 400, dtype=np.uint64)
    table = draw_scenes(series, numbers)
    kinds = [SHAPES.index(name) for name in KINDS]
    large = table.size[:, 0] == SIZES.index("large")
    rows = np.nonzero((table.count == 1) & large & np.isin(table.shape[:, 0], kinds))[0][:count]
    chosen = replace(table, **{name: column[rows] for name, column in vars(table).items()})
    silent = np.zeros(len(rows), dtype=bool)
    return replace(
        chosen,
        task=np.full(len(rows), COLORS),
        background=np.zeros(len(rows), dtype=np.int64),
        say_background=silent,
        say_place=silent,
        say_size=np.zeros((len(rows), SLOTS), dtype=bool),
        say_colour=~silent,
    )


def enlarged(pictures: Tensor) -> Tensor:
    """As the reader wants them, 32 pixels a side."""
    return interpolate(pictures.float(), size=(32, 32), mode="bilinear", align_corners=False)


class Words:
    """The embedder of shapes, every caption with as many tokens: those past its end are zero and
    count as its own, which attention without a mask is faster for."""

    def __init__(self, width: int) -> None:
        shapes = Shapes()
        self._words = WordEmbedder(shapes.vocabulary, width, 0, max_tokens=shapes.caption_words)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        parts = [self._words.encode(prompts[i : i + 4096])[0] for i in range(0, len(prompts), 4096)]
        text = torch.cat([pad(part, (0, 0, 0, WORDS - part.shape[1])) for part in parts])
        return text, torch.full((len(text),), WORDS)

    def spec(self) -> dict[str, Any]:
        return self._words.spec()


class Store:
    """Samples in the device's memory, gone through in random order; `train_step` reads it as it
    reads a loader."""

    def __init__(
        self,
        data: Tensor,
        captions: list[str],
        rejected: Tensor | None = None,
        beside: Store | None = None,
        *,
        width: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.data = data.to(device)
        self.rejected = None if rejected is None else rejected.to(device)
        self.beside = beside
        self.embedder = Words(width)
        self.text = self.embedder.encode(captions)[0].to(device)
        self.batch_size, self.position = batch_size, 0
        self._nowhere = torch.zeros(batch_size, dtype=torch.long)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long, device=device)
        if not len(self.data):
            raise SystemExit("there is no sample to learn from")

    def next_batch(self) -> Batch:
        device, size = self.data.device, self.batch_size
        while len(self._order) < size:
            more = torch.randperm(len(self.data), generator=self._generator, device=device)
            self._order = torch.cat((self._order, more))
        chosen, self._order = self._order.split((size, len(self._order) - size))
        self.position += size
        return Batch(
            latents=self.data[chosen],
            text=self.text[chosen],
            text_valid=None,
            indices=self._nowhere,  # to ask the device for them would wait for it
            rejected=None if self.rejected is None else self.rejected[chosen],
            beside=None if self.beside is None else self.beside.next_batch(),
        )


def experiment(options: argparse.Namespace, **changes: Any) -> Experiment:
    """A run of the model; the data are put into its state."""
    gpu = options.device == "cuda"
    train = TrainConfig(
        steps=1,
        batch_size=options.batch,
        lr=options.lr,
        warmup=100,
        ema_decay=0.995,
        precision="bf16" if gpu else "fp32",
        seed=options.seed,
        device=options.device,
        probe_every=0,
    )
    return Experiment(
        model=network(options),
        train=replace(train, **changes),
        data=DataConfig(dataset="shapes", size=32),
    )


def real_store(options: argparse.Namespace, first: int, *, series: int = 0) -> Store:
    """Rendered scenes of a series, from a place on."""
    table = world(series, first, options.scenes)
    return Store(
        render(table, SIZE),
        [scene.caption for scene in table.scenes()],
        width=options.width,
        batch_size=options.batch,
        seed=options.seed,
        device=torch.device(options.device),
    )


def begin(
    wanted: Experiment, store: Store, base: DiT | None, dpo: DPOConfig | None = None
) -> TrainState:
    """A run on `store`, from the weights of `base` if given; of pairs if there is a `dpo`."""
    if base is not None:
        wanted = replace(wanted, origin=Origin(source="the base"))
    state = build_state(wanted)
    if dpo is not None:
        state.objective = Preference(state.model, dpo)
    begin_from(state, wanted, None if base is None else lambda: Start(model=base))
    state.loader = store  # type: ignore[assignment]
    return state


def learn(state: TrainState, config: TrainConfig, steps: int) -> list[dict[str, Any]]:
    """Takes `steps` steps; the numbers of every 25th."""
    kept = []
    for number in range(1, steps + 1):
        metrics = train_step(state, config)
        if number == 1 or number % 25 == 0:
            kept.append({"step": state.step, **metrics})
    return kept


def learn_unwatched(
    state: TrainState, config: TrainConfig, steps: int, until: float, floor: float
) -> int:
    """Takes `steps` steps as `train_step` does but without looking at them, so that the device
    never waits, or as many as there is time for; over the last 30 % the rate falls to `floor` of
    it. Returns how many."""
    began = time.perf_counter()
    for number in range(1, steps + 1):
        share = max(number / steps, (time.perf_counter() - began) / max(until - began, 1e-9))
        if share > 1:
            return number - 1
        parts = list(pieces(state.loader.next_batch(), state.step + 1, config, state.device))
        losses = accumulate_gradients(state, config, parts)
        groups = state.optimizer.groups
        scale = (config.clip / global_norm(groups)).clamp(max=1)
        for group in groups:
            group.grads.mul_(scale)
        state.step += 1
        falling = 1 - (1 - floor) * max(0.0, share - 0.7) / 0.3
        state.optimizer.step(state.learning_rate(state.step) * falling)
        assert state.ema is not None
        state.ema.update(state.step)
        if number % 250 == 0:
            seconds = round(time.perf_counter() - began, 1)
            say(step=state.step, seconds=seconds, loss=round(float(losses.mean()), 4))
    return steps


def averaged(state: TrainState) -> DiT:
    """A network of its own with the averaged weights, adapters merged."""
    assert state.ema is not None
    model = copy.deepcopy(state.model)
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, average in state.ema.parameters().items():
            weights[name].copy_(average)
    merge_lora(model)
    return model.requires_grad_(False).eval()


def blended(start: DiT, model: DiT, share: float) -> DiT:
    """The network whose weights are start + share·(model − start)."""
    between = copy.deepcopy(start)
    with torch.no_grad():
        for own, aligned in zip(between.parameters(), model.parameters(), strict=True):
            own.lerp_(aligned, share)
    return between


def save(model: DiT, path: Path) -> None:
    torch.save({n: p.detach().bfloat16().cpu() for n, p in model.state_dict().items()}, path)


def load(options: argparse.Namespace) -> DiT:
    device = torch.device(options.device)
    model = DiT(network(options)).to(device)
    model.load_state_dict({n: p.float() for n, p in torch.load(options.base).items()})
    return model.requires_grad_(False).eval()


def replace_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def drawing(model: DiT) -> DiT:
    """The network as it draws: in bf16 on a GPU."""
    model = copy.deepcopy(model)
    return model.bfloat16() if next(model.parameters()).is_cuda else model


def draw(model: DiT, prompts: Sequence[str], seed: int) -> Tensor:
    made = generate(
        drawing(model),
        Words(model.config.width),
        prompts,
        (3, SIZE, SIZE),
        replace(DRAW, seed=seed),
    )
    return torch.cat([batch.latents for batch in made])
