"""Claim: how good a picture is saturates with the evaluations of the velocity, and AB2 gets there
with fewer than Euler: captions drawn right in tasks of GenEval on shapes, read exactly, and the
Fréchet distance to rendered pictures.

A network on captioned shapes is trained (preset shapes-12l, narrower, on a GPU in about a minute),
then every sampler draws the same held-out captions from the same noise at each budget of
evaluations, guidance counted as one. The spread is the standard deviation over seeds of the noise.

Gate: the reader reads rendered pictures of the held-out captions right (99.5 %), and the network
draws more right than the pictures of other captions are, by three standard errors.

    python benchmarks/samplers_quality.py [--tasks …] [--weights FILE] [--json FILE]
    python benchmarks/samplers_quality.py --table FILE [--plot PNG]        # for docs/samplers.md

Where there is no FILE of weights, it trains, from --start or from nothing.

Cost: about two minutes on one H200, training included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from mvsplit.data import TASKS, Batch, Shapes, WordEmbedder
from mvsplit.data.scenes import draw_scenes
from mvsplit.evaluation.frechet import fixed_features, frechet_distance
from mvsplit.evaluation.geneval import (
    GENEVAL,
    evaluate_shapes,
    geneval_indices,
    scenes_at,
    task_holds,
)
from mvsplit.evaluation.held_out import SERIES
from mvsplit.evaluation.reader import read_pictures
from mvsplit.models import DiT, DiTConfig
from mvsplit.presets import get_preset
from mvsplit.sampling import SAMPLERS, Engine, SamplingConfig, generate
from mvsplit.training import Experiment, Origin, Start, build_state, train_step
from mvsplit.training.finetune import begin_from

SIZE, WORDS = 32, 24  # pixels; tokens that every caption is padded to: one shape, one CUDA graph
BUDGETS = (3, 5, 9, 13, 17, 25, 35, 51)  # all odd, as Heun's are
SHIFT, GUIDANCE = 2.0, 2.0  # the preset's
SCORES = ("geneval_mean", "caption_exact", "shapes_frechet")
READ_RIGHT = 0.995
MARGIN = 3.0  # standard errors above the pictures of other captions


def experiment(device: str, batch: int, lr: float) -> Experiment:
    """The preset shapes-12l, narrower, so that its weights are below 3 MB in bf16, with β = 1."""
    preset = get_preset("shapes-12l")
    rule = replace(preset.model.rule, beta=1.0)
    model = replace(preset.model, width=96, heads=3, ffn_width=288, text_width=96, rule=rule)
    changes = {
        "batch_size": batch, "lr": lr, "warmup": 200, "ema_decay": 0.998, "probe_every": 0,
        "precision": "bf16" if device == "cuda" else "fp32", "device": device,
    }  # fmt: skip
    return Experiment(model=model, data=preset.data, train=replace(preset.train, **changes))


class Words:
    """The embedder of shapes, every batch padded to as many tokens, masked."""

    def __init__(self, width: int) -> None:
        shapes = Shapes(size=SIZE)
        self._words = WordEmbedder(shapes.vocabulary, width, 0, max_tokens=shapes.caption_words)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        text, valid = self._words.encode(prompts)
        return pad(text, (0, 0, 0, WORDS - text.shape[1])), valid

    def spec(self) -> dict[str, Any]:
        return self._words.spec()


def of_tasks(series: int, scenes: int, tasks: tuple[str, ...]) -> list[int]:
    """Which of the first `scenes` scenes of a series are of the tasks; all for all of GenEval's,
    the composed ones too."""
    if tasks == GENEVAL:
        return list(range(scenes))
    kinds = draw_scenes(series, np.arange(scenes, dtype=np.uint64)).task
    return np.flatnonzero(np.isin(kinds, [TASKS.index(task) for task in tasks])).tolist()


class Pool:
    """Rendered scenes in the device's memory, in random order, as a loader hands them out."""

    def __init__(
        self, wanted: Experiment, scenes: int, tasks: tuple[str, ...], device: torch.device
    ) -> None:
        shapes = Shapes(size=SIZE, device=device)
        numbers = of_tasks(shapes.seed, scenes, tasks)
        parts = [shapes.fetch(numbers[i : i + 4096]) for i in range(0, len(numbers), 4096)]
        self.embedder = Words(wanted.model.text_width)
        texts = [self.embedder.encode(part.captions) for part in parts] + [
            self.embedder.encode([""])
        ]
        self._data = torch.cat([part.latents for part in parts]).to(device)
        self._text = torch.cat([text for text, _ in texts]).to(device)
        self._valid = torch.cat([valid for _, valid in texts]).to(device)
        self._batch, self._device, self.position = wanted.train.batch_size, device, 0
        self._generator = torch.Generator(device).manual_seed(0)

    def __len__(self) -> int:
        return len(self._data)

    def next_batch(self) -> Batch:
        count, generator, device = len(self._data), self._generator, self._device
        chosen = torch.randint(count, (self._batch,), generator=generator, device=device)
        dropped = torch.rand(self._batch, generator=generator, device=device) < 0.1
        said = torch.where(dropped, count, chosen)
        self.position += self._batch
        return Batch(
            latents=self._data[chosen],
            text=self._text[said],
            text_valid=self._valid[said],
            indices=chosen.cpu(),
        )


def trained(
    wanted: Experiment, model: DiT | None, pool: Pool, seconds: float
) -> tuple[DiT, dict[str, Any]]:
    """The averaged weights after `seconds`; the rate falls to zero over the last third."""
    if model is not None:
        wanted = replace(wanted, origin=Origin(source="given weights"))
    state = build_state(wanted)
    begin_from(state, wanted, None if model is None else lambda: Start(model=model))
    state.loader = pool  # type: ignore[assignment]
    constant, started, losses = state.schedule, time.perf_counter(), []
    spent = 0.0

    def schedule(step: int) -> float:
        return constant(step) * min(1.0, 3 * max(0.0, 1 - spent / seconds))

    state.schedule = schedule
    while spent < seconds:
        metrics = train_step(state, wanted.train)
        spent = time.perf_counter() - started
        if state.step % 100 == 0:
            losses.append([state.step, round(metrics["loss"], 4)])
            print(f"[{spent:5.1f} s] step {state.step}, loss {metrics['loss']:.4f}", flush=True)
    assert state.ema is not None
    with torch.no_grad():
        weights = dict(state.model.named_parameters())
        for name, average in state.ema.parameters().items():
            weights[name].copy_(average)
    found = {
        "steps": state.step, "seconds": round(spent, 1), "batch": wanted.train.batch_size,
        "scenes": len(pool), "lr": wanted.train.lr, "losses": losses,
    }  # fmt: skip
    return state.model.requires_grad_(False).eval(), found


def read(path: Path, config: DiTConfig, device: torch.device) -> DiT:
    model = DiT(config).to(device)
    model.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return model.requires_grad_(False).eval()


def draw(model: Engine, captions: list[str], sampler: str, steps: int, seed: int) -> Tensor:
    """Pictures [N, 3, 32, 32]."""
    count = len(captions)
    config = SamplingConfig(
        sampler=sampler, steps=steps, shift=SHIFT, guidance=GUIDANCE, seed=seed, batch_size=count
    )
    words = Words(model.model.config.text_width)
    return torch.cat([b.latents for b in generate(model, words, captions, (3, SIZE, SIZE), config)])


def steps_for(name: str, budget: int) -> int:
    """The most steps that cost no more than `budget` evaluations."""
    return max(n for n in range(1, budget + 1) if SAMPLERS[name].evaluations(n) <= budget)


class Captions:
    """Held-out captions of the six tasks in turn, what they are to show, and rendered pictures."""

    def __init__(self, count: int, tasks: tuple[str, ...], device: torch.device) -> None:
        shapes = Shapes(size=SIZE, seed=SERIES, device=device)
        numbers = geneval_indices(shapes, count * len(GENEVAL) // len(tasks))
        scenes = scenes_at(shapes, numbers)
        numbers = [n for n, scene in zip(numbers, scenes, strict=True) if scene.task in tasks]
        self.scenes = scenes_at(shapes, numbers)
        self.captions = [scene.caption for scene in self.scenes]
        self.own = shapes.fetch(numbers).latents
        other = of_tasks(SERIES + 2, 16 * count, tasks)[: len(numbers)]
        self.real = Shapes(size=SIZE, seed=SERIES + 2, device=device).fetch(other).latents

    def gate(self) -> dict[str, float]:
        """How often rendered pictures are read right, and by chance those of other captions."""
        seen = read_pictures(self.own)
        shifted = self.scenes[len(GENEVAL) :] + self.scenes[: len(GENEVAL)]
        right = [task_holds(s, q) for s, q in zip(seen, self.scenes, strict=True)]
        other = [task_holds(s, q) for s, q in zip(seen, shifted, strict=True)]
        if sum(right) < READ_RIGHT * len(right):
            raise SystemExit(
                f"gate failed: {sum(right)} of {len(right)} rendered pictures are read right"
            )
        return {
            "rendered_read_right": sum(right) / len(right),
            "other_captions": sum(other) / len(other),
            "rendered_frechet": frechet_distance(
                fixed_features(self.own), fixed_features(self.real)
            ),
        }

    def score(self, pictures: Tensor) -> dict[str, float]:
        found = dict(evaluate_shapes(pictures, self.scenes, self.real))
        return {name: round(value, 5) for name, value in found.items()}


def measure(
    model: Engine, asked: Captions, seeds: int, until: float
) -> Iterator[tuple[int, str, int, int, dict[str, float]]]:
    """(seed, sampler, steps, budget, scores), a seed after the other, as long as there is time."""
    for seed in range(seeds):
        for budget in BUDGETS:
            for name in SAMPLERS:
                if time.perf_counter() > until:
                    return
                steps = steps_for(name, budget)
                pictures = draw(model, asked.captions, name, steps, 1000 + seed)
                yield seed, name, steps, budget, asked.score(pictures)


def summary(
    rows: list[dict[str, Any]], sampler: str, budget: int, score: str
) -> tuple[float, float]:
    """Mean over the seeds and its spread: their standard deviation, and of one seed the standard
    error of its share."""
    here = [r for r in rows if (r["sampler"], r["budget"]) == (sampler, budget)]
    values = [r["scores"][score] for r in here]
    if len(values) > 1:
        return statistics.mean(values), statistics.stdev(values)
    return values[0], math.nan


def draws_right(found: dict[str, Any]) -> bool:
    """Whether the network draws more right than the pictures of other captions are by chance;
    where it does not, the shares say nothing of the samplers."""
    best = max(r["scores"]["geneval_mean"] for r in found["rows"])
    chance = found["gate"]["other_captions"]
    return best >= chance + MARGIN * math.sqrt(chance * (1 - chance) / found["captions"])


def shown(found: dict[str, Any]) -> dict[str, tuple[str, float, int]]:
    """The scores that say something: name, factor and digits of each."""
    share = {"geneval_mean": ("drawn right, %", 100.0, 1)} if draws_right(found) else {}
    return {**share, "shapes_frechet": ("Fréchet", 1.0, 3)}


def table(found: dict[str, Any]) -> str:
    """docs/samplers.md's: a row for each score and sampler, a column for each budget."""
    rows, budgets = found["rows"], complete(found)
    lines = ["| score | sampler | " + " | ".join(map(str, budgets)) + " |"]
    lines += ["|---|---|" + "---|" * len(budgets)]
    for score, (name, factor, digits) in shown(found).items():
        for sampler in SAMPLERS:
            cells = []
            for budget in budgets:
                mean, spread = summary(rows, sampler, budget, score)
                around = "" if math.isnan(spread) else f" ± {factor * spread:.{digits}f}"
                cells.append(f"{factor * mean:.{digits}f}{around}")
            lines.append(f"| {name} | `{sampler}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def complete(found: dict[str, Any]) -> list[int]:
    """The budgets at which every sampler was run."""
    done = {(r["budget"], r["sampler"]) for r in found["rows"]}
    return [b for b in BUDGETS if all((b, sampler) in done for sampler in SAMPLERS)]


def save_plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores, budgets = shown(found), complete(found)
    figure = Figure(figsize=(4.6 * len(scores), 3.6), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots(1, len(scores), squeeze=False)[0]
    for axis, (score, (name, factor, _)) in zip(axes, scores.items(), strict=True):
        for sampler in SAMPLERS:
            points = [summary(found["rows"], sampler, b, score) for b in budgets]
            means, spreads = ([factor * p[i] for p in points] for i in (0, 1))
            axis.errorbar(budgets, means, spreads, label=sampler, marker="o", markersize=3)
        axis.set(xlabel="evaluations of the velocity", ylabel=name, xscale="log", xticks=budgets)
        axis.set_xticklabels(budgets)
        axis.minorticks_off()
    axes[-1].set_yscale("log")
    axes[-1].legend()
    canvas.print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", type=Path, help="read if it is there, else trained and kept")
    parser.add_argument("--start", type=Path, help="weights to train on from")
    parser.add_argument("--tasks", nargs="+", default=GENEVAL, choices=GENEVAL)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=62.0, help="of training")
    parser.add_argument("--budget", type=float, default=130.0, help="seconds of all")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=262_144)
    parser.add_argument("--captions", type=int, default=768)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.table:
        found = json.loads(args.table.read_text(encoding="utf-8"))
        print(table(found), end="")
        if args.plot:
            save_plot(found, args.plot)
        return
    run(args)


def run(args: argparse.Namespace) -> None:
    until = time.perf_counter() + args.budget
    device = torch.device(args.device)
    wanted = experiment(args.device, args.batch, args.lr)
    tasks = tuple(args.tasks)
    asked = Captions(args.captions, tasks, device)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__, "captions": len(asked.captions), "tasks": tasks,
        "shift": SHIFT, "guidance": GUIDANCE,
        "gate": asked.gate(), "rows": [],
    }  # fmt: skip
    print(json.dumps(result["gate"]), flush=True)
    if args.weights and args.weights.is_file():
        model = read(args.weights, wanted.model, device)
    else:
        start = read(args.start, wanted.model, device) if args.start else None
        pool = Pool(wanted, args.scenes, tasks, device)
        model, result["training"] = trained(wanted, start, pool, args.seconds)
        if args.weights:
            kept = {n: w.detach().bfloat16().cpu() for n, w in model.state_dict().items()}
            save_file(kept, args.weights, {"training": json.dumps(result["training"])})
    engine = Engine(model.bfloat16() if device.type == "cuda" else model)
    for seed, name, steps, budget, scores in measure(engine, asked, args.seeds, until):
        row = {"seed": seed, "sampler": name, "steps": steps, "budget": budget, "scores": scores}
        row["evaluations"] = SAMPLERS[name].evaluations(steps)
        result["rows"].append(row)
        print(json.dumps({**row, "scores": {s: scores[s] for s in SCORES}}), flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not draws_right(result):
        raise SystemExit("gate failed: no more is drawn right than by chance; only Fréchet counts")


if __name__ == "__main__":
    main()
