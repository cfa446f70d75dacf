"""Claim: the reader of shapes is exact: at least 99.5 % of rendered pictures are read without any
mistake, sharp or as blurred and noisy as samples, and what is not there is not read.

Right is a picture whose background is named, and in which exactly the objects of its scene are
found, each with its shape, colour and place (to 2 % of the side). Known-wrong pictures are those of
another scene of the same task: of them the reader must not say that the caption holds (by accident
it may: the captions of some tasks say little).

Gate: every quality but the last reaches 99.5 % at both sizes. The last, twice the noise, is only
reported: it shows where the reader ends.

    python benchmarks/shapes_reader.py [--pictures 5000] [--json FILE]

Cost: about five minutes on one core.
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

NEEDED = 0.995
SERIES = 424_242  # one that neither trains nor scores
NEAR = 0.02  # of the side
# Blur: standard deviation in parts of the side (0.022 is 0.7 pixels of 32). Noise: standard
# deviation in pictures of [−1, 1]; samples of a small network have 0.04, the worst tenth 0.12.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=5000)
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
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
