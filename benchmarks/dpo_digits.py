"""Claim: Diffusion-DPO makes a small model of the real digits draw at least 10 points more of them
as asked, and its pictures get no further from real ones.

Everything as `mvsplit train`, `mvsplit pairs` and `mvsplit evaluate` do it: the preset `tiny`, with
β = 1, is trained on three quarters of the digits for 100 steps, and for 75 each at two lower rates
(SFT); each of ten captions is drawn twice, 60 times over, and a classifier of real digits judges;
then DPO on the pairs of which one is right, and beside it, for as many steps at the same rate, flow
matching on the digits again and on the preferred pictures alone (no reward, an anchor of 1).
Scored on 500 pictures with noise of their own: the share that the classifier reads as asked, and
the Fréchet distance in its margins; the loss on held-out digits; and TCS, ρ, G_mean and G_ctr of
every layer.

Gate: DPO begins at log 2.

    python benchmarks/dpo_digits.py --json FILE [--seeds 0 1 2]

Cost: about 15 minutes on one CPU core for each seed, three seeds by default.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mvsplit.cli.start import starter
from mvsplit.data import Digits, Loader
from mvsplit.data.digits import NAMES
from mvsplit.data.pairs import write_pairs
from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.diagnostics.taps import taps_for_dit
from mvsplit.evaluation.digits import digit_frechet, evaluate_digits
from mvsplit.evaluation.held_out import validation_loss
from mvsplit.evaluation.preference import draw_pairs, judge_of_digits
from mvsplit.flow import DPOConfig
from mvsplit.presets import get_preset
from mvsplit.sampling import SamplingConfig, generate
from mvsplit.training import (
    DataConfig,
    Experiment,
    LoadedRun,
    Origin,
    TrainConfig,
    load_run,
    train,
)
from mvsplit.training.files import read_lines
from mvsplit.training.objective import Preference, piece_losses
from mvsplit.training.step import pieces

SHAPE = (1, 8, 8)
DRAW = SamplingConfig(steps=12, batch_size=250)
DATA = DataConfig(dataset="digits", split="train")
STEPS, RATE = 100, 3e-4
FIELDS = ("tcs", "rho", "g_mean_attn", "g_ctr_attn", "g_mean_ffn", "g_ctr_ffn")
WAYS: dict[str, dict[str, Any]] = {
    "DPO, β = 100": {"dpo": DPOConfig(beta=100.0)},
    "DPO, β = 100, 200 steps": {"dpo": DPOConfig(beta=100.0), "steps": 200},
    "DPO, β = 30": {"dpo": DPOConfig(beta=30.0)},
    "DPO, β = 30, anchor 10": {"dpo": DPOConfig(beta=30.0, anchor=10.0)},
    "digits again": {},
    "digits again, 200 steps": {"steps": 200},
    "preferred alone": {"dpo": DPOConfig(beta=1e-9, anchor=1.0)},
}


def tiny() -> Experiment:
    """The preset with the β that the results were taken with."""
    preset = get_preset("tiny")
    rule = replace(preset.model.rule, beta=1.0)
    return replace(preset, model=replace(preset.model, rule=rule))


def base(seed: int, folder: Path) -> LoadedRun:
    """The SFT model of a seed: pre-trained, then fine-tuned at lower rates until that gains little,
    so that what comes later is not the lower rate's."""
    preset = tiny()
    whole = folder / "whole"
    config = replace(preset.train, steps=100, seed=seed, device="cpu", probe_every=0)
    experiment = Experiment(model=preset.model, train=config, data=DATA)
    train(experiment, whole)
    for number, rate in enumerate((2e-3, RATE)):
        tuned = folder / f"sft{number}"
        tuning = replace(config, steps=75, lr=rate, seed=seed + 50 + number)
        experiment = replace(experiment, train=tuning, origin=Origin(source=str(whole)))
        train(experiment, tuned, start=starter(experiment))
        whole = tuned
    return load_run(whole)


def pairs_of(run: LoadedRun, seed: int, file: Path) -> dict[str, Any]:
    """Writes the pairs; what they cost."""
    began = time.perf_counter()
    labels = [k % 10 for k in range(600)]
    captions = [NAMES[label] for label in labels]
    found = list(
        draw_pairs(
            run.model,
            run.embedder,
            captions,
            SHAPE,
            replace(DRAW, seed=seed),
            judge_of_digits(labels),
        )
    )
    rows = [
        (captions[place], chosen, rejected)
        for f in found
        for place, chosen, rejected in zip(f.places, f.chosen, f.rejected, strict=True)
    ]
    spent = time.perf_counter() - began
    return {"captions": len(captions), "pairs": write_pairs(file, rows), "seconds": round(spent, 1)}


def aligned(whole: Path, file: Path, folder: Path, seed: int, way: dict[str, Any]) -> LoadedRun:
    """A run of `STEPS` steps from the SFT model."""
    preset = tiny()
    config: TrainConfig = replace(
        preset.train,
        steps=way.get("steps", STEPS),
        lr=RATE,
        seed=seed + 100,
        device="cpu",
        probe_every=0,
        caption_dropout=0.0 if "dpo" in way else 0.1,
    )
    data = DATA
    if "dpo" in way:
        config = replace(config, objective="dpo", dpo=way["dpo"])
        data = replace(data, pairs=str(file))
    experiment = Experiment(
        model=preset.model, train=config, data=data, origin=Origin(source=str(whole))
    )
    train(experiment, folder, start=starter(experiment))
    return load_run(folder)


def scores(run: LoadedRun, seed: int) -> dict[str, float]:
    """Of 500 pictures, ten captions in turn."""
    labels = [k % 10 for k in range(500)]
    prompts = [NAMES[label] for label in labels]
    config = replace(DRAW, seed=1000 + seed)
    drawn = torch.cat(
        [b.latents for b in generate(run.model, run.embedder, prompts, SHAPE, config)]
    )
    found = dict(evaluate_digits(drawn, labels)) | dict(digit_frechet(drawn))
    losses = validation_loss(run.model, run.embedder, Digits("held-out"), samples=128)
    found["validation_loss"] = dict(losses)["validation_loss"]
    return {name: round(value, 5) for name, value in found.items()}


def layers(run: LoadedRun) -> dict[str, list[float | None]]:
    """The mean mode on held-out digits, always with the same noise and times."""
    config = TrainConfig(steps=1, batch_size=256, seed=77)
    loader = Loader(Digits("held-out"), run.embedder, batch_size=256, seed=0)
    (piece,) = pieces(loader.next_batch(), 0, config, torch.device("cpu"))
    run.model.requires_grad_(True)
    with LayerProbe(taps_for_dit(run.model), fields=FIELDS) as probe:
        piece_losses(run.model, piece, config).mean().backward()
    run.model.requires_grad_(False)
    return {
        name: [None if v is None else float(f"{v:.4g}") for v in values]
        for name, values in probe.arrays().items()
    }


def rows_of(seed: int) -> Iterator[dict[str, Any]]:
    """All that is measured of a seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        sft = base(seed, folder)
        spent = round(time.perf_counter() - began, 1)
        seen = layers(sft)
        yield {"way": "SFT", "seconds": spent, "scores": scores(sft, seed), "layers": seen}
        yield {"way": "SFT, other noise", "scores": scores(sft, seed + 7), "layers": seen}
        yield {"way": "pairs", **pairs_of(sft, seed, folder / "pairs.parquet")}
        for number, (title, way) in enumerate(WAYS.items()):
            began = time.perf_counter()
            pairs, place = folder / "pairs.parquet", folder / str(number)
            run = aligned(folder / "sft1", pairs, place, seed, way)
            spent = round(time.perf_counter() - began, 1)
            log = list(read_lines(place / "metrics.jsonl"))
            if "dpo" in way:
                start = log[0]["loss"] - way["dpo"].anchor * log[0]["loss_chosen"]
                if abs(start - math.log(2)) > 1e-5:
                    raise SystemExit(f"gate failed: {title} begins at {start}, not at log 2")
            last = {
                field: round(statistics.mean(line[field] for line in log[-20:]), 4)
                for field in (*Preference.names, "grad_norm")
                if field in log[0]
            }
            found = {"scores": scores(run, seed), "layers": layers(run)}
            yield {"way": title, "seconds": spent, "last": last, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="seeds that it holds are kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "steps": STEPS,
        "lr": RATE,
        "rows": [],
    }
    if options.json.exists():
        result["rows"] = json.loads(options.json.read_text())["rows"]
    for seed in options.seeds:
        result["rows"] = [row for row in result["rows"] if row["seed"] != seed]
        for row in rows_of(seed):
            result["rows"].append({"seed": seed, **row})
            print(json.dumps({k: v for k, v in result["rows"][-1].items() if k != "layers"}))
        options.json.write_text(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
