"""Scores of drawn clips: what their captions say, read exactly (`clip_reader`).

As in GenEval, each score asks for one thing, of the object that has the colour said, whatever its
shape; `clip_exact` asks for all.

| score | of the clips | right where |
|---|---|---|
| clip_objects | all | the objects are those of the caption, of shape and colour, in most frames |
| clip_direction | all | each object goes where the caption says, or stands |
| clip_speed | that say one | the object moves as slowly or quickly as said |
| clip_bounce | that say so | the object sets out as said, and turns back |
| clip_occlusion | that pass | what is said to be in front is, and both have the shapes said |
| clip_move, … | of one motion | all that the caption says is so, the background too, and no more |
| clip_exact | all | the same |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from mvsplit.data.motions import MOTIONS, ClipScene, MotionClaim, MotionStatement
from mvsplit.evaluation.clip_reader import SeenClip, SeenMover, read_clips
from mvsplit.evaluation.scores import share

Holds = Callable[[SeenClip, MotionStatement], bool]


def evaluate_clips(
    clips: Tensor,
    scenes: Sequence[ClipScene],
    *,
    on_each: Callable[[list[float]], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Scores of drawn clips.

    Args:
        clips: [N, 3, F, S, S] in [−1, 1].
        scenes: what each was to show.
        on_each: given 1 for each clip that shows exactly that, else 0.

    Yields:
        The scores of the table above and their standard errors; those of which no clip is, not.

    Raises:
        UserError: too few frames to see a motion.
    """
    seen = read_clips(clips)
    said = [scene.statement for scene in scenes]
    exact = [motion_holds(s, q) for s, q in zip(seen, said, strict=True)]
    parts: dict[str, tuple[Holds, list[bool]]] = {
        "clip_objects": (objects_hold, [True for _ in said]),
        "clip_direction": (directions_hold, [True for _ in said]),
        "clip_speed": (speeds_hold, [q.claims[0].speed is not None for q in said]),
        "clip_bounce": (bounces_hold, [q.claims[0].bounces for q in said]),
        "clip_occlusion": (passing_holds, [q.passes is not None for q in said]),
    }
    for name, (holds, belongs) in parts.items():
        yield from _share_of(
            name, [holds(s, q) for s, q, b in zip(seen, said, belongs, strict=True) if b]
        )
    for motion in MOTIONS:
        of_it = [scene.motion == motion for scene in scenes]
        yield from _share_of(
            f"clip_{motion}", [e for e, belongs in zip(exact, of_it, strict=True) if belongs]
        )
    if on_each is not None:
        on_each([float(each) for each in exact])
    yield from share("clip_exact", exact)


def _share_of(name: str, right: Sequence[bool]) -> Iterator[tuple[str, float]]:
    if right:
        yield from share(name, right)


def motion_holds(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether all that a caption says is so, and nothing else is there or happens."""
    return (
        objects_hold(seen, statement)
        and directions_hold(seen, statement)
        and speeds_hold(seen, statement)
        and all(_of(seen, c).bounces == c.bounces for c in statement.claims)
        and passing_holds(seen, statement)
        and statement.background in (None, seen.background)
    )


def objects_hold(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether just the objects of the caption are there, in most frames."""
    asked = sorted((claim.shape, claim.colour) for claim in statement.claims)
    shown = sorted((str(thing.shape), thing.colour) for thing in seen.objects)
    return seen.steady and asked == shown


def directions_hold(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether each object goes as said, or stands."""
    return _each(seen, statement, lambda thing, claim: thing.direction == claim.direction)


def speeds_hold(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether each object moves as fast as said, where that is said."""
    return _each(
        seen,
        statement,
        lambda thing, claim: (
            claim.speed is None or (thing.direction is not None and thing.speed == claim.speed)
        ),
    )


def bounces_hold(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether each object sets out as said, and turns back where that is said."""
    return directions_hold(seen, statement) and _each(
        seen, statement, lambda thing, claim: thing.bounces == claim.bounces
    )


def passing_holds(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether the first object is in front of the second, or behind it, if so said."""
    if statement.passes is None:
        return True
    first, second = statement.claims
    front = first if statement.passes == "in front of" else second
    return (
        _each(seen, statement, lambda thing, claim: thing.shape == claim.shape)
        and seen.front is not None
        and seen.front.colour == front.colour
    )


def _each(
    seen: SeenClip, statement: MotionStatement, holds: Callable[[SeenMover, MotionClaim], bool]
) -> bool:
    """Whether there is an object of the colour of every claim, of which `holds` is true."""
    colours = {thing.colour for thing in seen.objects}
    return all(
        claim.colour in colours and holds(_of(seen, claim), claim) for claim in statement.claims
    )


def _of(seen: SeenClip, claim: MotionClaim) -> SeenMover:
    """The object that has a claim's colour, which is there: a colour belongs to one object."""
    return next(thing for thing in seen.objects if thing.colour == claim.colour)
