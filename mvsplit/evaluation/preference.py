"""Pairs of drawn pictures of which one was preferred: a caption is drawn twice, and a judge that
knows the truth says which picture shows more of it.

Shapes: N pictures, P pairs, C, H, W of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvsplit.data import Embedder, Scene
from mvsplit.evaluation.digits import read_digits
from mvsplit.evaluation.geneval import caption_holds, task_holds
from mvsplit.evaluation.reader import SeenPicture, read_pictures
from mvsplit.sampling import Engine, SamplingConfig, generate
from mvsplit.sampling.generate import OnStep

# The points of pictures [N, C, H, W] that were drawn for the captions at N places.
Judge = Callable[[Tensor, Sequence[int]], list[int]]


@dataclass(frozen=True, kw_only=True)
class DrawnPairs:
    """The pairs among some captions that were drawn twice.

    Attributes:
        asked: how many captions these were.
        places: of the captions with a pair, P of them.
        chosen, rejected: [P, C, H, W].
        points: of each pair, those of both pictures.
    """

    asked: int
    places: list[int]
    chosen: Tensor
    rejected: Tensor
    points: list[tuple[int, int]]


def judge_of_shapes(scenes: Sequence[Scene]) -> Judge:
    """Judges pictures by the truth about the scene of each caption, read exactly."""

    def judge(pictures: Tensor, places: Sequence[int]) -> list[int]:
        seen = read_pictures(pictures)
        return [points_of_shapes(s, scenes[p]) for s, p in zip(seen, places, strict=True)]

    return judge


def points_of_shapes(seen: SeenPicture, scene: Scene) -> int:
    """How much of its caption a picture shows: 2 where all that it says is so and nothing else is
    there, 1 where it does what its task asks for, else 0."""
    if caption_holds(seen, scene.statement):
        return 2
    return 1 if task_holds(seen, scene) else 0


def judge_of_digits(labels: Sequence[int]) -> Judge:
    """1 for a picture that the classifier of real digits reads as the digit asked for, else 0."""

    def judge(pictures: Tensor, places: Sequence[int]) -> list[int]:
        read = read_digits(pictures)
        return [int(digit == labels[p]) for digit, p in zip(read, places, strict=True)]

    return judge


def draw_pairs(
    model: nn.Module | Engine,
    embedder: Embedder,
    captions: Sequence[str],
    shape: Sequence[int],
    config: SamplingConfig,
    judge: Judge,
    decode: Callable[[Tensor], Tensor] = lambda latents: latents,
    on_step: OnStep | None = None,
) -> Iterator[DrawnPairs]:
    """Draws each caption twice and keeps the pairs of which one picture has more points.

    Pictures 2k and 2k + 1 are of caption k and have the noise of their numbers, so that pairs do
    not depend on the batch that they are drawn in.

    Args:
        model, embedder, shape, config, on_step: as in `generate`.
        judge: gives points to pictures.
        decode: latents to pictures in [−1, 1].
    """
    twice = [caption for caption in captions for _ in range(2)]
    left: list[Tensor] = []  # a picture whose twin comes with the next batch
    for batch in generate(model, embedder, twice, shape, config, on_step=on_step):
        first = batch.indices[0] - len(left)
        pictures = torch.cat((*left, decode(batch.latents)))
        whole = len(pictures) // 2 * 2
        left = [pictures[whole:]] if len(pictures) > whole else []
        places = range(first // 2, (first + whole) // 2)
        yield _judged(pictures[:whole], places, judge)


def _judged(pictures: Tensor, places: Sequence[int], judge: Judge) -> DrawnPairs:
    """The pairs among pictures [2·N, C, H, W], two for each of N captions."""
    points = judge(pictures, [place for place in places for _ in range(2)])
    pairs = list(zip(points[::2], points[1::2], strict=True))
    kept = [k for k, (one, other) in enumerate(pairs) if one != other]
    better = [2 * k + (pairs[k][1] > pairs[k][0]) for k in kept]
    worse = [2 * k + (pairs[k][1] < pairs[k][0]) for k in kept]
    return DrawnPairs(
        asked=len(places),
        places=[places[k] for k in kept],
        chosen=pictures[better],
        rejected=pictures[worse],
        points=[(points[b], points[w]) for b, w in zip(better, worse, strict=True)],
    )
