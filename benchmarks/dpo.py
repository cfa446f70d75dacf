"""Claim: Diffusion-DPO on pairs that the exact reader of shapes has judged makes a model draw at
least 10 points more of its held-out captions right, and its pictures get no further from real ones.

A model of 24 layers is pre-trained on captioned shapes and fine-tuned at a tenth of the rate on
other scenes (SFT). Then, for each seed: two pictures of each of many further captions, DPO on the
pairs of which one shows more of its caption, and beside it, for as many steps, SFT on real pictures
and on the preferred ones. Scored before and after on captions of a series that nobody trains on:
the share of prompts drawn right in GenEval's six tasks, the Fréchet distance, and TCS, ρ, G_mean
and G_ctr of every layer.

Gate: DPO begins at log 2; the reader sees the same on the device as on the CPU.

    python benchmarks/dpo.py base --save BASE [--lr 3e-3 --seconds 120 --sft-seconds 20]
    python benchmarks/dpo.py align --base BASE --json FILE [--seed 0] [--ways dpo:beta=1000 …]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mvsplit.data import Batch, Shapes, WordEmbedder
from mvsplit.data.scenes import COMPOSITION, draw_scenes
from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.diagnostics.taps import taps_for_dit
from mvsplit.evaluation.geneval import evaluate_shapes, geneval_indices, scenes_at
from mvsplit.evaluation.held_out import SERIES
from mvsplit.evaluation.preference import draw_pairs, judge_of_shapes
from mvsplit.evaluation.reader import read_pictures
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.lora import LoRAConfig, merge_lora
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, generate
from mvsplit.training import (
    DataConfig,
    Experiment,
    Origin,
    Start,
    TrainConfig,
    TrainState,
    TuneConfig,
    build_state,
    train_step,
)
from mvsplit.training.config import DPOConfig
from mvsplit.training.finetune import begin_from
from mvsplit.training.objective import Preference, piece_losses
from mvsplit.training.optimizer import global_norm
from mvsplit.training.step import accumulate_gradients, pieces

SIZE = 32
WORDS = 16  # tokens that every caption is padded to, so that there is one shape, and one graph
LAYER_FIELDS = ("tcs", "rho", "g_mean_attn", "g_ctr_attn", "g_mean_ffn", "g_ctr_ffn")
MODEL = DiTConfig(
    depth=24,
    width=64,
    heads=2,
    ffn_width=192,
    channels=3,
    patch=4,
    text_width=64,
    rule=RuleConfig(name="mvsplit", beta=0.2),
)
DRAW = SamplingConfig(steps=20, sampler="ab2", guidance=2.0, shift=2.0, batch_size=1024)


@dataclass(frozen=True)
class Drawn:
    """Pairs in memory."""

    captions: list[str]
    chosen: Tensor
    rejected: Tensor


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Words:
    """The embedder of shapes, every caption with as many tokens: those past its end are zero and
    count as its own, which attention without a mask is faster for."""

    def __init__(self) -> None:
        shapes = Shapes(size=SIZE)
        self._words = WordEmbedder(
            shapes.vocabulary, MODEL.text_width, 0, max_tokens=shapes.caption_words
        )

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
        *,
        batch_size: int,
        seed: int,
        dropout: float,
        device: torch.device,
    ) -> None:
        self.data = data.to(device)
        self.rejected = None if rejected is None else rejected.to(device)
        self.text = Words().encode([*captions, ""])[0].to(device)
        self.batch_size, self.dropout, self.position = batch_size, dropout, 0
        self.embedder = Words()
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
        drop = torch.rand(size, generator=self._generator, device=device) < self.dropout
        captions = torch.where(drop, len(self.data), chosen)
        self.position += size
        return Batch(
            latents=self.data[chosen],
            text=self.text[captions],
            text_valid=None,
            indices=self._nowhere,  # to ask the device for them would wait for it
            rejected=None if self.rejected is None else self.rejected[chosen],
        )


def experiment(options: argparse.Namespace, **changes: Any) -> Experiment:
    """A run of the model; the data are put into its state."""
    gpu = options.device == "cuda"
    train = TrainConfig(
        steps=1,
        batch_size=options.batch,
        lr=options.lr,
        warmup=100,
        ema_decay=0.999,
        precision="bf16" if gpu else "fp32",
        seed=options.seed,
        device=options.device,
        probe_every=0,
    )
    model = replace(MODEL, depth=options.depth)
    return Experiment(
        model=model, train=replace(train, **changes), data=DataConfig(dataset="shapes", size=SIZE)
    )


def numbers_of(series: int, first: int, count: int) -> list[int]:
    """Places of `count` scenes of a series that are of the six tasks, from `first` on."""
    numbers = np.arange(first, first + 2 * count, dtype=np.uint64)
    return numbers[draw_scenes(series, numbers).task != COMPOSITION][:count].tolist()


def real_store(options: argparse.Namespace, first: int, *, series: int | None = None) -> Store:
    """Rendered scenes of the training's series, from a place on."""
    series = options.series if series is None else series
    shapes = Shapes(size=SIZE, seed=series)
    numbers = numbers_of(series, first, options.scenes)
    parts = [shapes.fetch(numbers[i : i + 4096]) for i in range(0, len(numbers), 4096)]
    return Store(
        torch.cat([part.latents for part in parts]),
        [caption for part in parts for caption in part.captions],
        batch_size=options.batch,
        seed=options.seed,
        dropout=0.1,
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
        if number % 2000 == 0:
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


def drawing(model: DiT) -> DiT:
    """The network as it draws: in bf16 on a GPU."""
    model = copy.deepcopy(model)
    return model.bfloat16() if next(model.parameters()).is_cuda else model


def draw(model: DiT, prompts: list[str], seed: int) -> Tensor:
    made = generate(drawing(model), Words(), prompts, (3, SIZE, SIZE), replace(DRAW, seed=seed))
    return torch.cat([batch.latents for batch in made])


def score(model: DiT, options: argparse.Namespace) -> dict[str, float]:
    """On held-out captions, the six tasks in turn; always the same noise for a seed."""
    shapes = Shapes(size=SIZE, seed=SERIES)
    scenes = scenes_at(shapes, geneval_indices(shapes, options.pictures))
    pictures = draw(model, [scene.caption for scene in scenes], seed=10_000 + options.seed)
    real = Shapes(size=SIZE, seed=SERIES + 2).fetch(range(len(scenes))).latents
    return {name: round(v, 5) for name, v in evaluate_shapes(pictures, scenes, real)}


def check_reader(device: torch.device) -> None:
    """Exits if the reader sees on the device what it does not see on the CPU."""
    shapes = Shapes(size=SIZE, seed=5)
    pictures = shapes.fetch(range(256)).latents
    pictures = pictures + 0.05 * torch.randn(pictures.shape, generator=torch.Generator())
    names = [
        [sorted((str(o.shape), str(o.colour), round(o.x, 2)) for o in p.objects) for p in seen]
        for seen in (read_pictures(pictures), read_pictures(pictures.to(device)))
    ]
    differ = sum(a != b for a, b in zip(*names, strict=True))
    say(gate="reader", pictures=len(pictures), differ=differ)
    if differ > 2:  # x at the edge of a hundredth may round to either side
        raise SystemExit("gate failed: the reader sees other things on the device")


def look(model: DiT, options: argparse.Namespace) -> dict[str, list[float | None]]:
    """The fields of every layer on held-out scenes, always at the same noise and times."""
    wanted = experiment(replace_options(options, batch=256), seed=77)
    store = real_store(replace_options(options, scenes=256, batch=256), 0, series=SERIES)
    model = model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    (piece,) = pieces(store.next_batch(), 0, wanted.train, torch.device(options.device))
    with LayerProbe(taps_for_dit(model), fields=LAYER_FIELDS) as probe:
        piece_losses(model, piece, wanted.train).mean().backward()
    model.requires_grad_(False)
    return {
        name: [None if v is None else float(f"{v:.4g}") for v in values]
        for name, values in probe.arrays().items()
    }


def replace_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def save(model: DiT, path: Path) -> None:
    torch.save({n: p.detach().bfloat16().cpu() for n, p in model.state_dict().items()}, path)


def load(options: argparse.Namespace) -> DiT:
    device = torch.device(options.device)
    model = DiT(replace(MODEL, depth=options.depth)).to(device)
    model.load_state_dict({n: p.float() for n, p in torch.load(options.base).items()})
    return model.requires_grad_(False).eval()


def pairs_of(model: DiT, options: argparse.Namespace) -> tuple[Drawn, dict[str, Any]]:
    """Pairs on captions of the training's series, and what they cost."""
    began = time.perf_counter()
    shapes = Shapes(size=SIZE, seed=options.series)
    scenes = scenes_at(shapes, numbers_of(options.series, 8 * options.scenes, options.captions))
    captions = [scene.caption for scene in scenes]
    config = replace(DRAW, seed=options.seed)
    shape, judge = (3, SIZE, SIZE), judge_of_shapes(scenes)
    found = list(draw_pairs(drawing(model), Words(), captions, shape, config, judge))
    pairs = Drawn(
        captions=[captions[place] for f in found for place in f.places],
        chosen=torch.cat([f.chosen for f in found]),
        rejected=torch.cat([f.rejected for f in found]),
    )
    kinds = Counter(f"{best} over {worst}" for f in found for best, worst in f.points)
    spent = round(time.perf_counter() - began, 1)
    return pairs, {"captions": len(captions), "pairs": kinds.total(), **kinds, "seconds": spent}


def base(options: argparse.Namespace) -> DiT:
    """Pre-training, or going on with --base, then SFT on other scenes at a low rate."""
    began = time.perf_counter()
    store = real_store(options, 0)
    other = real_store(options, 4 * options.scenes)
    say(stage="data", seconds=round(time.perf_counter() - began, 1), samples=len(store.data))
    stages = (
        ("pre-training", store, options.lr, options.steps, options.seconds, 0.1),
        ("sft", other, options.lr / 10, options.sft_steps, options.sft_seconds, 0.1),
    )
    model, until = load(options) if options.base else None, began
    for number, (name, samples, rate, steps, seconds, floor) in enumerate(stages):
        until += seconds
        wanted = experiment(options, lr=rate, seed=options.seed + 1000 * number)
        state = begin(wanted, samples, model)
        taken = learn_unwatched(state, wanted.train, steps, until, floor)
        model = averaged(state)
        spent = round(time.perf_counter() - began, 1)
        say(stage=name, seconds=spent, steps=taken, scores=score(model, options))
        if options.save:
            save(model, options.save)
    assert model is not None
    return model


def ways(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is tried: `NAME:beta=…,lr=…,steps=…,what=lora|all,anchor=…`."""
    for given in options.ways:
        name, _, fields = given.partition(":")
        yield name, dict(field.split("=") for field in fields.split(",") if field)


def align(start: DiT, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each way from the same weights; first what they score."""
    before = score(start, options)
    yield {"way": "sft", "scores": before, "layers": look(start, options)}
    drawn, cost = pairs_of(start, options)
    yield {"way": "pairs", **cost}
    for name, fields in ways(options):
        yield {"way": name, **fields, **aligned(start, drawn, name, fields, options)}


def aligned(
    start: DiT, drawn: Drawn, name: str, fields: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """One way: DPO, or flow matching on the preferred pictures or on real ones."""
    began = time.perf_counter()
    device, batch = torch.device(options.device), int(fields.get("batch", options.pairs_batch))
    common = {"batch_size": batch, "seed": options.seed, "device": device}
    dpo = name.startswith("dpo")
    if name.startswith("real"):
        store = real_store(replace_options(options, batch=batch, scenes=16384), 10**7)
    else:
        rejected = drawn.rejected if dpo else None
        store = Store(drawn.chosen, drawn.captions, rejected, **common, dropout=0.0 if dpo else 0.1)
    tune = TuneConfig(what=fields.get("what", "all"), lora=LoRAConfig(rank=16, alpha=32.0))
    wanted = experiment(
        options,
        batch_size=batch,
        lr=float(fields.get("lr", 1e-4)),
        warmup=20,
        weight_decay=0.0,
        ema_decay=0.99,
        tune=tune,
    )
    preference = DPOConfig(
        beta=float(fields.get("beta", 1000.0)), anchor=float(fields.get("anchor", 0.0))
    )
    state = begin(wanted, store, start, preference if dpo else None)
    kept = learn(state, wanted.train, int(fields.get("steps", 400)))
    if (
        dpo
        and abs(kept[0]["loss"] - math.log(2) - kept[0]["loss_chosen"] * preference.anchor) > 0.02
    ):
        raise SystemExit(f"gate failed: DPO begins at {kept[0]['loss']}, not at log 2")
    spent = round(time.perf_counter() - began, 1)
    model = averaged(state)
    return {
        "seconds": spent,
        "curve": [{k: float(f"{v:.4g}") for k, v in line.items()} for line in kept],
        "scores": score(model, options),
        "layers": look(model, options),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("base", "align", "all"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=int, default=MODEL.depth)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=131_072, help="of the training, in memory")
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--sft-steps", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of pre-training, at most")
    parser.add_argument("--sft-seconds", type=float, default=math.inf)
    parser.add_argument("--series", type=int, default=0, help="of the scenes that are trained on")
    parser.add_argument("--pictures", type=int, default=1536, help="that are scored")
    parser.add_argument("--captions", type=int, default=8192, help="that are drawn twice")
    parser.add_argument("--pairs-batch", type=int, default=256)
    parser.add_argument("--ways", nargs="*", default=["dpo"])
    parser.add_argument("--base", type=Path, help="weights that `base` has saved")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", type=Path, help="a line for each way")
    options = parser.parse_args()
    torch.set_num_threads(4 if options.device == "cuda" else 1)
    check_reader(torch.device(options.device))
    model = load(options) if options.stage == "align" else base(options)
    if options.stage == "base":
        return
    for row in align(model, options):
        row |= {"seed": options.seed}
        say(
            **{k: v for k, v in row.items() if k not in ("layers", "curve")},
            last=row.get("curve", [None])[-1],
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
