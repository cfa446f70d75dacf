"""Claim: a model of shapes learns a colour that it has never seen from 200 pictures, and what it
forgets of the others is measured, for full fine-tuning, gains only and LoRA.

A small model learns pictures of one object in seven colours; none is purple, nor does any caption
say so. Then it is trained on 200 pictures of purple objects alone, each way at three learning
rates. Measured before and after, on 384 unseen pictures each: the validation loss of purple and of
the old colours, with the same noise and times, and the share of drawn pictures in which the reader
of shapes sees an object of the asked colour. Gate: a network that starts from weights has their
validation loss, bit for bit, before its first step.

Cost: about ten minutes on one CPU core for one seed, the default; with --middle and --device cuda
about 40 seconds on one H200.

    python benchmarks/finetune.py [--json FILE] [--steps 2500] [--tune-steps 200]
    python benchmarks/finetune.py --device cuda --seeds 0 --drawn 192 --json SEED0  (a process each)
    python benchmarks/finetune.py --from SEED0 SEED1 SEED2 --json FILE
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvsplit.data import Loader, Shapes, WordEmbedder
from mvsplit.data.captions import COLOURS, SHAPES
from mvsplit.data.scenes import COLORS, draw_scenes
from mvsplit.data.types import Examples
from mvsplit.evaluation.reader import read_pictures
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.lora import LoRAConfig
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
from mvsplit.training.finetune import begin_from
from mvsplit.training.objective import piece_losses
from mvsplit.training.step import pieces

NEW = "purple"
PICTURES = 200
HELD_OUT = 384
WAYS: dict[str, tuple[TuneConfig, tuple[float, ...]]] = {
    "full": (TuneConfig(), (1e-4, 3e-4, 1e-3)),
    "last quarter": (TuneConfig(only=("blocks.[67].*",)), (3e-4, 1e-3, 3e-3)),
    "gains": (TuneConfig(what="gains"), (3e-3, 1e-2, 3e-2)),
    "lora": (TuneConfig(what="lora", lora=LoRAConfig(rank=8)), (3e-4, 1e-3, 3e-3)),
}
MODEL = DiTConfig(
    depth=8,
    width=64,
    heads=2,
    ffn_width=192,
    channels=3,
    patch=4,
    text_width=64,
    rule=RuleConfig(name="mvsplit", beta=1.0),
)


class OneObject:
    """Shapes of the task "colors", one object with its colour named: of the new colour, or of the
    others."""

    channels, height, width = 3, 32, 32

    def __init__(self, *, new: bool, series: int, size: int | None) -> None:
        self._shapes = Shapes(size=32, seed=series)
        self._new, self._series, self.size = new, series, size
        self._found: list[int] = []
        self._searched = 0
        self.vocabulary, self.caption_words = self._shapes.vocabulary, self._shapes.caption_words

    def fetch(self, indices: Sequence[int]) -> Examples:
        while len(self._found) <= max(indices):
            self._search()
        return self._shapes.fetch([self._found[index] for index in indices])

    def _search(self) -> None:
        numbers = np.arange(self._searched, self._searched + 1024, dtype=np.uint64)
        table = draw_scenes(self._series, numbers)
        is_new = table.colour[:, 0] == COLOURS.index(NEW)
        self._found += numbers[(table.task == COLORS) & (is_new == self._new)].tolist()
        self._searched += 1024


def experiment(steps: int, **changes: Any) -> Experiment:
    """A run of the small model; the data are put into its state."""
    train = TrainConfig(
        steps=steps,
        batch_size=32,
        lr=2e-3,
        warmup=20,
        ema_decay=0.99,
        device="cpu",
        probe_every=0,
    )
    return Experiment(
        model=MODEL, train=replace(train, **changes), data=DataConfig(dataset="shapes", size=32)
    )


def embedder() -> WordEmbedder:
    shapes = Shapes(size=32)
    return WordEmbedder(shapes.vocabulary, MODEL.text_width, 0, max_tokens=shapes.caption_words)


def run(wanted: Experiment, data: OneObject, start: Callable[[], Start] | None) -> TrainState:
    """Takes all steps of a run on `data`; weights to start from lie on the CPU."""
    state = build_state(wanted)
    train = wanted.train
    state.loader = Loader(
        data, embedder(), batch_size=train.batch_size, seed=train.seed, caption_dropout=0.1
    )
    begin_from(state, wanted, start)
    while state.step < train.steps:
        train_step(state, train)
    return state


def averaged(state: TrainState) -> DiT:
    """The network with its averaged weights."""
    assert state.ema is not None
    with torch.no_grad():
        weights = dict(state.model.named_parameters())
        for name, average in state.ema.parameters().items():
            weights[name].copy_(average)
    return state.model.requires_grad_(False)


def scores(model: DiT, drawn: int) -> dict[str, float]:
    """Validation loss, and the share of `drawn` pictures with the colour asked for, new and old."""
    return {name: round(value, 4) for name, value in _scores(model, drawn)}


def _scores(model: DiT, drawn: int) -> Iterator[tuple[str, float]]:
    others = [colour for colour in COLOURS if colour != NEW]
    for kind in ("new", "old"):
        data = OneObject(new=kind == "new", series=77, size=None)
        yield f"loss_{kind}", validation_loss(model, data)
        colours = [NEW] if kind == "new" else others
        wanted = [(colours[k % len(colours)], SHAPES[k % 6]) for k in range(drawn)]
        yield f"drawn_{kind}", drawn_share(model, wanted)


@torch.no_grad()
def validation_loss(model: DiT, data: OneObject) -> float:
    """Mean loss over unseen pictures, always with the same noise and times."""
    config = experiment(1, batch_size=HELD_OUT, accumulate=6).train
    batch = Loader(data, embedder(), batch_size=HELD_OUT, seed=1).next_batch()
    parts = pieces(batch, 0, config, model.head.weight.device)
    return float(torch.cat([piece_losses(model, part, config) for part in parts]).mean())


def drawn_share(model: DiT, wanted: Sequence[tuple[str, str]]) -> float:
    """Share of drawn pictures in which an object of the asked colour is seen."""
    prompts = [f"{'an' if c[0] == 'o' else 'a'} {c} {shape}" for c, shape in wanted]
    config = SamplingConfig(steps=16, guidance=2.0, shift=2.0, batch_size=48)
    parts = generate(model, embedder(), prompts, (3, 32, 32), config)
    seen = [picture for part in parts for picture in read_pictures(part.latents.cpu())]
    right = [
        any(thing.colour == colour for thing in picture.objects)
        for picture, (colour, _) in zip(seen, wanted, strict=True)
    ]
    return sum(right) / len(right)


def on_cpu(model: DiT) -> DiT:
    """A copy, which many runs may start from."""
    return copy.deepcopy(model).cpu()


def tuned(base: DiT, way: str, rate: float, seed: int, options: argparse.Namespace) -> Any:
    """One way at one learning rate, from the weights of `base`, on the CPU."""
    changes = {"lr": rate, "tune": WAYS[way][0], "seed": seed + 1, "device": options.device}
    wanted = replace(experiment(options.tune_steps, **changes), origin=Origin(source="the base"))
    began = time.perf_counter()
    data = OneObject(new=True, series=5 + 10 * seed, size=PICTURES)
    state = run(wanted, data, lambda: Start(model=base))
    spent = time.perf_counter() - began
    learning = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    return {
        "way": way,
        "lr": rate,
        "seed": seed,
        "parameters": learning,
        "optimiser_bytes": sum(m.nbytes for m in state.optimizer.moments().values()),
        "seconds": round(spent, 1),
        **scores(averaged(state), options.drawn),
    }


def gate(base: DiT, device: str) -> None:
    """Exits if starting from weights changes what they compute."""
    wanted = replace(experiment(1, device=device), origin=Origin(source="the base"))
    state = build_state(wanted)
    begin_from(state, wanted, lambda: Start(model=base))
    data = OneObject(new=False, series=77, size=None)
    there = copy.deepcopy(base).to(state.device)
    if validation_loss(state.model, data) != validation_loss(there, data):
        raise SystemExit("gate failed: a run does not begin with the weights that it is given")


def table(result: dict[str, Any]) -> str:
    """The result as docs/fine-tuning.md shows it: the mean over the seeds, and the lowest and the
    highest where there are several."""
    lines = [
        "| learns | parameters | learning rate | loss, purple | loss, old | drawn, purple | "
        "drawn, old |",
        "|---|---|---|---|---|---|---|",
    ]
    before = result["before"] if isinstance(result["before"], list) else [result["before"]]
    groups = {("before", "", ""): before}
    for row in sorted(result["after"], key=lambda r: (list(WAYS).index(r["way"]), r["lr"])):
        way = (row["way"], f"{row['parameters']:,}", f"{row['lr']:g}")
        groups.setdefault(way, []).append(row)
    for way, rows in groups.items():
        cells = [_cell(rows, f"loss_{kind}", ".4f") for kind in ("new", "old")]
        cells += [_cell(rows, f"drawn_{kind}", ".0%") for kind in ("new", "old")]
        lines.append(f"| {' | '.join([*way, *cells])} |")
    return "\n".join(lines)


def forgotten(result: dict[str, Any]) -> str:
    """How much the old colours lose where purple is learned as well as by full fine-tuning at its
    lowest rate, in words: lowest and highest over the seeds."""
    before = [row["loss_old"] for row in result["before"]]
    parts = []
    for way, rate in (("full", 1e-4), ("lora", 1e-3), ("last quarter", 1e-3)):
        rows = [r for r in result["after"] if (r["way"], r["lr"]) == (way, rate)]
        lost = [row["loss_old"] - before[row["seed"]] for row in rows]
        purple = statistics.mean(row["loss_new"] for row in rows)
        parts.append(f"{way} {min(lost):.4f} to {max(lost):.4f} (purple {purple:.4f})")
    return ", ".join(parts)


def drawn(result: dict[str, Any]) -> str:
    """The share of old colours drawn before and after the gentlest rates, and of purple with gains
    alone, in words: means over the seeds, of gains the lowest and highest mean."""

    def share(name: str, rows: Sequence[dict[str, Any]]) -> float:
        return statistics.mean(row[name] for row in rows)

    def rows(way: str, rate: float) -> list[dict[str, Any]]:
        return [r for r in result["after"] if (r["way"], r["lr"]) == (way, rate)]

    gains = [share("drawn_new", rows("gains", rate)) for rate in WAYS["gains"][1]]
    return (
        f"old colours {share('drawn_old', result['before']):.0%} before, "
        f"{share('drawn_old', rows('full', 1e-4)):.0%} after full fine-tuning at 1e-4, "
        f"{share('drawn_old', rows('lora', 3e-4)):.0%} after LoRA at 3e-4; "
        f"purple {min(gains):.0%} to {max(gains):.0%} with gains alone"
    )


def _cell(rows: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in rows]
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(rows) == 1 else f"{mean} ({min(values):{form}}, {max(values):{form}})"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All seeds; the file is written after each way, the middle rates first."""
    result = environment(options)
    for seed in options.seeds:
        began = time.perf_counter()
        wanted = experiment(options.steps, seed=seed, device=options.device)
        base = averaged(run(wanted, OneObject(new=False, series=10 * seed, size=None), None))
        result["base_seconds"].append(round(time.perf_counter() - began, 1))
        result["before"].append(scores(base, options.drawn))
        print(f"base {seed}, {result['base_seconds'][-1]} s: {result['before'][-1]}", flush=True)
        base = on_cpu(base)
        gate(base, options.device)
        for place in (1,) if options.middle else (1, 0, 2):
            for way, (_, rates) in WAYS.items():
                result["after"].append(tuned(base, way, rates[place], seed, options))
                print(result["after"][-1], flush=True)
                keep(result, options.json)
    return result


def environment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": "CPU" if options.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "new_colour": NEW,
        "pictures": PICTURES,
        "drawn": options.drawn,
        "steps": options.steps,
        "tune_steps": options.tune_steps,
        "base_seconds": [],
        "before": [],
        "after": [],
    }


def keep(result: dict[str, Any], place: Path | None) -> None:
    if place:
        place.write_text(json.dumps(result, indent=2) + "\n")


def together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of those of several processes, of other seeds each."""
    first = results[0]
    for name in ("device", "torch", "pictures", "drawn", "steps", "tune_steps"):
        if any(result[name] != first[name] for result in results):
            raise SystemExit(f"these are results of different runs: {name} is not the same")
    lists = ("base_seconds", "before", "after")
    joined = {name: [x for r in results for x in r[name]] for name in lists}
    return {**first, "command": [r["command"] for r in results], **joined}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--tune-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--middle", action="store_true", help="of each way the middle rate only")
    parser.add_argument("--drawn", type=int, default=48, help="pictures drawn of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", help="results, not runs")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.sources:
        result = together([json.loads(path.read_text()) for path in options.sources])
        keep(result, options.json)
    else:
        result = measure(options)
    print(table(result))


if __name__ == "__main__":
    main()
