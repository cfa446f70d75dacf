"""Pairs of drawn shapes of which one was preferred: a caption is drawn twice, and the truth about
its scene says which picture shows more of it.

Shapes: P pairs, C, S, S of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvsplit.data import Embedder, Scene
from mvsplit.evaluation.geneval import caption_holds, task_holds
from mvsplit.evaluation.reader import SeenPicture, read_pictures
from mvsplit.sampling import Engine, SamplingConfig, generate
from mvsplit.sampling.generate import OnStep


@dataclass(frozen=True, kw_only=True)
class DrawnPairs:
    """The pairs among the captions of a batch.

    Attributes:
        asked: captions that were drawn twice for them.
        captions: P of them.
        chosen, rejected: [P, 3, S, S] in about [−1, 1].
        points: of each pair, those of both pictures.
    """

    asked: int
    captions: list[str]
    chosen: Tensor
    rejected: Tensor
    points: list[tuple[int, int]]


def points(seen: SeenPicture, scene: Scene) -> int:
    """How much of its caption a picture shows: 2 where all that it says is so and nothing else is
    there, 1 where it does what its task asks for, else 0."""
    if caption_holds(seen, scene.statement):
        return 2
    return 1 if task_holds(seen, scene) else 0


def draw_pairs(
    model: nn.Module | Engine,
    embedder: Embedder,
    scenes: Sequence[Scene],
    size: int,
    config: SamplingConfig,
    on_step: OnStep | None = None,
) -> Iterator[DrawnPairs]:
    """Draws the caption of each scene twice and keeps the pairs of which one has more points.

    Picture 2k and 2k + 1 are of scene k and have the noise of their numbers, so that pairs do not
    depend on the batch they are drawn in.

    Args:
        model, embedder, config, on_step: as in `generate`.
        size: pixels a side.
    """
    prompts = [scene.caption for scene in scenes for _ in range(2)]
    last: Tensor | None = None  # a picture whose twin comes with the next batch
    for batch in generate(model, embedder, prompts, (3, size, size), config, on_step=on_step):
        pictures = batch.latents if last is None else torch.cat((last, batch.latents))
        first = batch.indices[0] - (last is not None)
        whole = len(pictures) // 2 * 2
        last = pictures[whole:] if len(pictures) > whole else None
        yield judged(pictures[:whole], scenes[first // 2 : (first + whole) // 2])


def judged(pictures: Tensor, scenes: Sequence[Scene]) -> DrawnPairs:
    """The pairs among pictures [2·N, 3, S, S], two of each of N scenes."""
    seen = read_pictures(pictures)
    found = [points(picture, scenes[k // 2]) for k, picture in enumerate(seen)]
    kept = [k for k in range(len(scenes)) if found[2 * k] != found[2 * k + 1]]
    better = [2 * k + (found[2 * k + 1] > found[2 * k]) for k in kept]
    worse = [4 * k + 1 - b for k, b in zip(kept, better, strict=True)]
    return DrawnPairs(
        asked=len(scenes),
        captions=[scenes[k].caption for k in kept],
        chosen=pictures[better],
        rejected=pictures[worse],
        points=[(found[b], found[w]) for b, w in zip(better, worse, strict=True)],
    )
