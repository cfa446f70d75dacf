"""Claim: at the same number of evaluations AB2 comes closer to the exact solution of the learned
ODE than Euler's method and the other samplers.

A small network is trained on captioned shapes (about 14 minutes on one core; a finished run is used
again). From the same noise and captions each sampler draws at several budgets of evaluations and
shifts, and its latents are compared with those of a long reference.

Gate: the reference, 200 steps of Heun, agrees with 400 of AB2, another method, within 1 %.

    python benchmarks/samplers.py --run runs/shapes-small [--json FILE]

Cost: about five minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.data import Shapes
from mvsplit.presets import get_preset
from mvsplit.sampling import SAMPLERS, SamplingConfig, generate
from mvsplit.training import Experiment, LoadedRun, load_run, train

BUDGETS = (5, 9, 13, 19, 25, 35)  # evaluations of the velocity; all odd, as Heun's are
SHIFTS = (1.0, 2.0, 4.0)
UNSEEN = 10**9  # samples from here on are not in the training
TOLERANCE = 0.01


def experiment() -> Experiment:
    """The preset shapes-12l, smaller, so that a core trains it in a quarter of an hour; β = 1."""
    preset = get_preset("shapes-12l")
    sizes = {"depth": 6, "width": 96, "heads": 4, "ffn_width": 288, "text_width": 96}
    model = replace(preset.model, **sizes, rule=replace(preset.model.rule, beta=1.0))
    changes = {"steps": 4000, "batch_size": 32, "lr": 2e-3, "warmup": 100, "ema_decay": 0.998}
    return Experiment(
        model=model,
        data=preset.data,
        train=replace(preset.train, **changes, save_every=500, keep=1, probe_every=0),
    )


def draw(run: LoadedRun, captions: list[str], **options: Any) -> Tensor:
    """Latents [N, 3, 32, 32] with guidance 2 from the noise of seed 0."""
    config = SamplingConfig(batch_size=64, guidance=2.0, seed=0, **options)
    made = generate(run.model, run.embedder, captions, (3, 32, 32), config)
    return torch.cat([batch.latents for batch in made])


def distance(latents: Tensor, reference: Tensor) -> float:
    """RMS of the difference over the RMS of the reference."""
    return ((latents - reference).square().mean() / reference.square().mean()).sqrt().item()


def steps_for(name: str, budget: int) -> int:
    """The most steps that cost no more than `budget` evaluations."""
    return max(n for n in range(1, budget + 1) if SAMPLERS[name].evaluations(n) <= budget)


def measure(run: LoadedRun, captions: list[str], reference: Tensor) -> Iterator[dict[str, Any]]:
    for shift in SHIFTS:
        for budget in BUDGETS:
            for name in SAMPLERS:
                steps = steps_for(name, budget)
                latents = draw(run, captions, sampler=name, steps=steps, shift=shift)
                row = {
                    "shift": shift,
                    "sampler": name,
                    "steps": steps,
                    "evaluations": SAMPLERS[name].evaluations(steps),
                    "distance": distance(latents, reference),
                }
                print(json.dumps(row), flush=True)
                yield row


def winners(rows: list[dict[str, Any]], shift: float, budget: int) -> list[str]:
    """The samplers that come closest at a shift within a budget."""
    here = [r for r in rows if r["shift"] == shift and r["evaluations"] == budget]
    best = min(r["distance"] for r in here)
    return [r["sampler"] for r in here if r["distance"] == best]


def table(rows: list[dict[str, Any]]) -> str:
    """docs/samplers.md's: a row for each shift and sampler, a column for each budget; bold is the
    least of a column at a shift."""
    lines = [
        "| shift | sampler | " + " | ".join(f"{budget}" for budget in BUDGETS) + " |",
        "|---|---|" + "---|" * len(BUDGETS),
    ]
    for shift in SHIFTS:
        for name in SAMPLERS:
            of_name = [r for r in rows if r["shift"] == shift and r["sampler"] == name]
            cells = [
                f"**{r['distance']:.4f}**"
                if name in winners(rows, shift, b)
                else f"{r['distance']:.4f}"
                for r, b in zip(of_name, BUDGETS, strict=True)
            ]
            lines.append(f"| {shift:g} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="trained there if it is not yet")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(experiment(), args.run)  # a finished run is left as it is
    run = load_run(args.run)
    captions = Shapes(size=32).fetch(range(UNSEEN, UNSEEN + args.pictures)).captions
    reference = draw(run, captions, sampler="heun", steps=200, shift=1.0)
    gate = distance(draw(run, captions, sampler="ab2", steps=400, shift=1.0), reference)
    print(f"gate: reference and 400 steps of ab2 differ by {gate:.2e}", flush=True)
    if gate > TOLERANCE:
        raise SystemExit(f"gate failed: {gate:.2e} > {TOLERANCE}")
    rows = list(measure(run, captions, reference))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "training_steps": run.step,
        "pictures": args.pictures,
        "guidance": 2.0,
        "reference": "heun, 200 steps, shift 1",
        "gate_distance": gate,
        "rows": rows,
    }
    print(table(rows))
    won = sum("ab2" in winners(rows, shift, budget) for shift in SHIFTS for budget in BUDGETS)
    print(f"ab2 is the closest in {won} of {len(SHIFTS) * len(BUDGETS)} cases")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
