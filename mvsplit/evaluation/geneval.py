"""The six tasks of GenEval (Ghosh et al., arXiv 2310.11513) on captioned shapes.

A picture is read exactly (`reader`) and compared with what its caption says. As in GenEval each
task asks for one thing, and further objects do no harm but where they are counted:

| task | right where |
|---|---|
| single_object, colors | there is an object as named |
| two_object, color_attr | there is one object as named for each of the two |
| counting | there are exactly as many as said |
| position | one as named first lies as said of one as named second |

"As named" is of the shape and, where the caption says one, of the colour. `caption_exact` is
stricter than GenEval: all that the caption says is so, size, place and background too, and there
is nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from mvsplit.data.captions import SIZES, Claim, Statement
from mvsplit.data.scenes import RADII, TASKS, Scene, draw_scenes
from mvsplit.data.shapes import Shapes
from mvsplit.evaluation.frechet import fixed_features, frechet_distance
from mvsplit.evaluation.reader import SeenObject, SeenPicture, read_pictures
from mvsplit.evaluation.scores import share

GENEVAL = TASKS[:6]
_MIDDLE = 0.125  # from the centre, in sides: half way between where scenes say "center" and corners
_BETWEEN = (RADII[:-1, 1] + RADII[1:, 0]) / 2  # radii half way from one size to the next
_AXES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def geneval_indices(shapes: Shapes, count: int) -> list[int]:
    """Where in a series the first scenes of the six tasks lie, the tasks in turn: number k is of
    task k modulo 6, and a shorter list is the beginning of a longer one."""
    found: list[list[int]] = [[] for _ in GENEVAL]
    each, start = -(-count // len(GENEVAL)), 0
    while min(map(len, found)) < each:
        indices = np.arange(start, start := start + 256, dtype=np.uint64)
        tasks = draw_scenes(shapes.seed, indices).task
        for number, places in enumerate(found):
            places += indices[tasks == number].tolist()
    return [found[k % len(GENEVAL)][k // len(GENEVAL)] for k in range(count)]


def scenes_at(shapes: Shapes, indices: Sequence[int]) -> list[Scene]:
    """The truth about samples of a series."""
    return draw_scenes(shapes.seed, np.asarray(indices, dtype=np.uint64)).scenes()


def evaluate_shapes(
    pictures: Tensor,
    scenes: Sequence[Scene],
    real: Tensor,
    *,
    on_each: Callable[[list[float]], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Scores of drawn shapes.

    Args:
        pictures: [N, 3, S, S] in [−1, 1].
        scenes: what each was to show; of the six tasks.
        real: [M, 3, S, S] rendered pictures, for the Fréchet distance.
        on_each: given 1 for each picture that shows its caption exactly, else 0.

    Yields:
        `geneval_TASK` for each task that is among the scenes, `geneval_mean` over these tasks,
        `caption_exact`; the standard error of each share; `unnamed_objects`, the share of all
        objects seen that have no shape or colour; `shapes_frechet`.
    """
    seen = read_pictures(pictures)
    means = []
    for task in GENEVAL:
        pairs = [(s, q) for s, q in zip(seen, scenes, strict=True) if q.task == task]
        if pairs:
            right = [task_holds(picture, scene) for picture, scene in pairs]
            means.append(sum(right) / len(right))
            yield from share(f"geneval_{task}", right)
    yield "geneval_mean", float(np.mean(means))
    exact = [caption_holds(s, q.statement) for s, q in zip(seen, scenes, strict=True)]
    if on_each is not None:
        on_each([float(each) for each in exact])
    yield from share("caption_exact", exact)
    objects = [thing for picture in seen for thing in picture.objects]
    unnamed = [thing.shape is None or thing.colour is None for thing in objects]
    yield "unnamed_objects", sum(unnamed) / max(len(unnamed), 1)
    yield "shapes_frechet", frechet_distance(fixed_features(pictures), fixed_features(real))


def task_holds(seen: SeenPicture, scene: Scene) -> bool:
    """Whether the picture does what its task asks for."""
    statement = scene.statement
    found = [_matching(seen, claim) for claim in statement.claims]
    if scene.task == "counting":
        return len(found[0]) == statement.claims[0].count
    if scene.task == "position":
        return any(_lies(a, b, str(statement.relation)) for a in found[0] for b in found[1])
    return all(found)


def caption_holds(seen: SeenPicture, statement: Statement) -> bool:
    """Whether all that a caption says is so, and nothing else is there."""
    found = [_matching(seen, claim, sized=True) for claim in statement.claims]
    counts = [claim.count for claim in statement.claims]
    return (
        len(seen.objects) == sum(counts)
        and [len(things) for things in found] == counts
        and (statement.relation is None or _lies(found[0][0], found[1][0], statement.relation))
        and (statement.place is None or _place(found[0][0]) == statement.place)
        and (statement.background is None or seen.background == statement.background)
    )


def _matching(seen: SeenPicture, claim: Claim, sized: bool = False) -> list[SeenObject]:
    return [
        thing
        for thing in seen.objects
        if thing.shape == claim.shape
        and (claim.colour is None or thing.colour == claim.colour)
        and (not sized or claim.size is None or _size(thing) == claim.size)
    ]


def _lies(first: SeenObject, second: SeenObject, relation: str) -> bool:
    """Whether the first lies so of the second, and more so than to another side."""
    dx, dy = _AXES[relation]
    x, y = first.x - second.x, first.y - second.y
    along, across = x * dx + y * dy, x * dy + y * dx
    return along > abs(across)


def _size(thing: SeenObject) -> str:
    return SIZES[int(np.searchsorted(_BETWEEN, thing.radius))]


def _place(thing: SeenObject) -> str | None:
    x, y = thing.x - 0.5, thing.y - 0.5
    if max(abs(x), abs(y)) <= _MIDDLE:
        return "center"
    if min(abs(x), abs(y)) < _MIDDLE:
        return None
    return f"{'bottom' if y > 0 else 'top'} {'right' if x > 0 else 'left'}"
