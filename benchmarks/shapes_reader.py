"""Claim: the reader of shapes is exact: at least 99.5 % of rendered pictures are read without any
mistake, sharp or as blurred and noisy as samples, and what is not there is not read.

Right is a picture whose background is named, and in which exactly the objects of its scene are
found, each with its shape, colour and place (to 2 % of the side). Known-wrong pictures are those of
another scene of the same task: of them the reader must not say that the caption holds (by accident
it may: the captions of some tasks say little).

Gate: every quality but the last reaches 99.5 % at both sizes. The last, twice the noise, is only
reported: it shows where the reader ends.

    python benchmarks/shapes_reader.py [--pictures 3000] [--run RUN] [--json FILE]

With --run, a run on the shapes, the noise of its samples is measured too: the standard deviation of
the pixels at the border, where there is nothing.

Cost: about ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.data import Scene, Shapes
from mvsplit.evaluation.geneval import GENEVAL, caption_holds, geneval_indices, scenes_at
from mvsplit.evaluation.reader import SeenPicture, blurred, read_pictures
from mvsplit.sampling import SamplingConfig, generate
from mvsplit.training import load_run

NEEDED = 0.995
SERIES = 424_242  # one that neither trains nor scores
NEAR = 0.02  # of the side
# Blur: standard deviation in parts of the side (0.022 is 0.7 pixels of 32). Noise: standard
# deviation in pictures of [−1, 1]; the result holds what samples of a small network have.
QUALITIES = {
    "sharp": (0.0, 0.0),
    "blur": (0.022, 0.0),
    "noise": (0.0, 0.1),
    "blur and noise": (0.022, 0.1),
    "blur and twice the noise": (0.022, 0.2),
}
NOT_GATED = "blur and twice the noise"


def worsened(pictures: Tensor, blur: float, noise: float) -> Tensor:
    grain = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return blurred(pictures, blur * pictures.shape[-1]) + noise * grain


def mistake(seen: SeenPicture, scene: Scene) -> str | None:
    """The first thing that is not as in the scene."""
    if seen.background != scene.background:
        return f"background {scene.background} read as {seen.background}"
    if len(seen.objects) != len(scene.objects):
        return f"{len(scene.objects)} objects read as {len(seen.objects)}"
    for thing in scene.objects:
        near = min(seen.objects, key=lambda o: math.hypot(o.x - thing.x, o.y - thing.y))
        if (near.shape, near.colour) != (thing.shape, thing.colour):
            return f"{thing.colour} {thing.shape} read as {near.colour} {near.shape}"
        if math.hypot(near.x - thing.x, near.y - thing.y) > NEAR:
            return f"{thing.shape} misplaced"
    return None


def measure(size: int, quality: str, count: int) -> dict[str, Any]:
    shapes = Shapes(size, seed=SERIES)
    indices = geneval_indices(shapes, count)
    scenes = scenes_at(shapes, indices)
    seen = read_pictures(worsened(shapes.fetch(indices).latents, *QUALITIES[quality]))
    mistakes = [m for s, q in zip(seen, scenes, strict=True) if (m := mistake(s, q))]
    others = scenes[len(GENEVAL) :] + scenes[: len(GENEVAL)]
    taken = sum(caption_holds(s, q.statement) for s, q in zip(seen, others, strict=True))
    return {
        "size": size,
        "quality": quality,
        "pictures": count,
        "right": 1 - len(mistakes) / count,
        "another_scene_taken_for_right": taken / count,
        "mistakes": Counter(mistakes).most_common(5),
    }


def sample_noise(run: Path, count: int = 96) -> dict[str, Any]:
    """The noise of a run's samples: median and upper tenth over pictures."""
    loaded = load_run(run)
    shapes = Shapes(loaded.experiment.data.size or 32, seed=SERIES)
    prompts = shapes.fetch(range(count)).captions
    config = SamplingConfig(steps=13, sampler="ab2", shift=2.0, batch_size=48)
    shape = (3, shapes.height, shapes.width)
    batches = generate(loaded.model, loaded.embedder, prompts, shape, config)
    pictures = torch.cat([batch.latents for batch in batches]).clamp(-1, 1)
    rows = torch.cat([pictures[:, :, 0], pictures[:, :, -1]], 2)  # [N, 3, 2·S]
    noise = rows.std(2).mean(1)
    return {
        "depth": loaded.experiment.model.depth,
        "step": loaded.step,
        "pictures": count,
        "noise_median": float(noise.median()),
        "noise_upper_tenth": float(noise.quantile(0.9)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for docs/evaluation.md: the share of pictures read right by quality and size."""
    lines = ["| quality | 32×32 | 64×64 |", "|---|---|---|"]
    for quality in QUALITIES:
        right = {row["size"]: row["right"] for row in rows if row["quality"] == quality}
        lines.append(f"| {quality} | {right[32]:.1%} | {right[64]:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for size in (32, 64):
        for quality in QUALITIES:
            rows.append(measure(size, quality, args.pictures))
            row = rows[-1]
            print(
                f"{size}×{size} {quality:26} right {row['right']:.2%}, another scene taken for "
                f"right {row['another_scene_taken_for_right']:.2%}",
                flush=True,
            )
    failed = [r for r in rows if r["quality"] != NOT_GATED and r["right"] < NEEDED]
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "needed": NEEDED,
        "qualities": QUALITIES,
        "passed": not failed,
        "rows": rows,
    }
    if args.run:
        result["samples"] = sample_noise(args.run)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
