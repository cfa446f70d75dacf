"""Question: what does it cost to leave blocks out of a very deep network while it draws, and is it
worth it beside fewer steps?

The 400-layer MV-Split network on the real digits (`mvsplit train digits-400l-mvsplit`, 5 minutes on
two cores; a finished run is used again) draws 100 digits in 12 Euler steps. Then blocks are left
out in the order of two rankings and at random, and, to compare, steps are left out. Quality is the
distance of the latents to those of the full network from the same noise, and the share of digits
that a classifier of real digits reads as asked.

Gate: leaving out no block changes no bit.

    python benchmarks/depth_on_demand.py --run runs/digits-400l-mvsplit [--json FILE --plot FILE]

Cost: about 12 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvsplit.data import Digits
from mvsplit.evaluation import evaluate_digits
from mvsplit.flow import interpolate
from mvsplit.presets import get_preset
from mvsplit.sampling import SamplingConfig, generate, without_blocks
from mvsplit.sampling.depth import least, mean_changes, skip_effects
from mvsplit.training import LoadedRun, load_run, train

STEPS = 12  # as in the demo
FEWER_STEPS = (10, 8, 6, 5, 4, 3, 2)
SKIPPED = (10, 20, 40, 80, 120, 200)
LABELS = [i % 10 for i in range(100)]
PROMPTS = [Digits.vocabulary[label] for label in LABELS]
TIMES = (0.25, 0.5, 0.75)  # at which the effect of each block is measured
RANKED_ON = 16  # digits
ROUNDS = 5  # of timing
QUANTILES = {"least": 0.0, "median": 0.5, "most": 1.0}


def draw(run: LoadedRun, model: nn.Module, **options: Any) -> Tensor:
    """Latents [100, 1, 8, 8]."""
    config = SamplingConfig(**{"steps": STEPS, "shift": 1.0, "batch_size": 100, **options})
    (made,) = generate(model, run.embedder, PROMPTS, (1, 8, 8), config)
    return made.latents


def seconds_a_step(run: LoadedRun) -> dict[int, float]:
    """Processor seconds of one guided step by the number of blocks left out, the least of several
    rounds, since others may use the machine."""
    depth, best = len(run.model.blocks), {}
    for _ in range(ROUNDS):
        for count in (0, *SKIPPED):
            model = without_blocks(run.model, range(depth - count, depth))
            begun = time.process_time()
            draw(run, model, steps=1)
            best[count] = min(best.get(count, float("inf")), time.process_time() - begun)
    return best


def rankings(run: LoadedRun) -> dict[str, Tensor]:
    """A score for each block [L], low for those to leave out first."""
    changes = mean_changes(run.model, lambda network: draw(run, network, steps=4, guidance=1.0))
    digits = Digits().fetch(range(RANKED_ON))
    text, _ = run.embedder.encode(digits.captions)
    noise = torch.randn(digits.latents.shape, generator=torch.Generator().manual_seed(0))
    points = [interpolate(digits.latents, noise, torch.tensor(t)) for t in TIMES]
    effects = torch.stack([skip_effects(run.model, z, text) for z in points]).mean(0)
    order = list(range(len(changes)))
    random.Random(0).shuffle(order)
    return {"change": changes, "effect": effects, "random": torch.tensor(order)}


def measure(run: LoadedRun, scores: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    reference = draw(run, run.model)
    if not torch.equal(draw(run, without_blocks(run.model, ())), reference):
        raise SystemExit("gate failed: leaving out no block changed the latents")
    seconds = seconds_a_step(run)

    def row(way: str, latents: Tensor, *, blocks: int = 0, steps: int = STEPS) -> dict[str, Any]:
        error = (latents - reference).square().mean() / reference.square().mean()
        found = {
            "way": way,
            "blocks_left_out": blocks,
            "steps": steps,
            "cpu_seconds": steps * seconds[blocks],
            "distance": error.sqrt().item(),
            "digit_accuracy": dict(evaluate_digits(latents, LABELS))["digit_accuracy"],
        }
        print(json.dumps(found), flush=True)
        return found

    yield row("full", reference)
    for steps in FEWER_STEPS:
        yield row("fewer steps", draw(run, run.model, steps=steps), steps=steps)
    for way, score in scores.items():
        for count in SKIPPED:
            latents = draw(run, without_blocks(run.model, least(score, count)))
            yield row(way, latents, blocks=count)


def save_plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    titles = {
        "fewer steps": "fewer steps, all blocks",
        "change": "blocks that change the trunk least left out",
        "effect": "blocks that change the velocity least left out",
        "random": "blocks left out at random",
    }
    full = next(r for r in result["rows"] if r["way"] == "full")
    for way, title in titles.items():
        rows = [r for r in result["rows"] if r["way"] == way]
        share = [r["cpu_seconds"] / full["cpu_seconds"] for r in rows]
        style = "o-" if way == "fewer steps" else ".--"
        left.semilogy(share, [r["distance"] for r in rows], style, label=title)
        right.plot(share, [100 * r["digit_accuracy"] for r in rows], style)
    right.axhline(100 * full["digit_accuracy"], color="grey", linewidth=0.8)
    left.set(xlabel="time, share of the full network's", title="distance to the full network's")
    right.set(xlabel="time, share of the full network's", title="digits recognised, %")
    left.legend(frameon=False, fontsize=8)
    canvas.print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="trained there if it is not yet")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(get_preset("digits-400l-mvsplit"), args.run)  # a finished run is left as it is
    run = load_run(args.run)
    scores = rankings(run)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "blocks": len(run.model.blocks),
        "training_steps": run.step,
        "sampler_steps": STEPS,
        "mean_change": {name: scores["change"].quantile(q).item() for name, q in QUANTILES.items()},
        "mean_effect": {name: scores["effect"].quantile(q).item() for name, q in QUANTILES.items()},
        "rows": list(measure(run, scores)),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        save_plot(result, args.plot)


if __name__ == "__main__":
    main()
