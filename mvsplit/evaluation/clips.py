"""Scores of drawn clips: what their captions say, read exactly (`clip_reader`).

| score | of the clips | right where |
|---|---|---|
| clip_objects | all | the objects are those of the caption, of shape and colour, in most frames |
| clip_direction | all | the objects are there, and each goes where the caption says |
| clip_speed | that say one | the same, as slowly or quickly as said |
| clip_bounce | that say so | the same, and it turns back |
| clip_occlusion | that pass | the same, and what is said to be in front is |
| clip_move, … | of one motion | all that the caption says is so, the background too, and no more |
| clip_exact | all | the same |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mvsplit.data.motions import MOTIONS, ClipScene, MotionClaim, MotionStatement
from mvsplit.evaluation.clip_reader import SeenClip, SeenMover, read_clips
from mvsplit.evaluation.scores import share


def evaluate_clips(clips: Tensor, scenes: Sequence[ClipScene]) -> Iterator[tuple[str, float]]:
    """Scores of drawn clips.

    Args:
        clips: [N, 3, F, S, S] in [−1, 1].
        scenes: what each was to show.

    Yields:
        The scores of the table above and their standard errors; those of which no clip is, not.

    Raises:
        UserError: too few frames to see a motion.
    """
    pairs = [(s, q.statement) for s, q in zip(read_clips(clips), scenes, strict=True)]
    yield from share("clip_objects", [objects_hold(s, q) for s, q in pairs])
    yield from share("clip_direction", [directions_hold(s, q) for s, q in pairs])
    parts = {
        "clip_speed": (lambda q: q.claims[0].speed is not None, speed_holds),
        "clip_bounce": (lambda q: q.claims[0].bounces, bounce_holds),
        "clip_occlusion": (lambda q: q.passes is not None, passing_holds),
    }
    for name, (belongs, holds) in parts.items():
        right = [directions_hold(s, q) and holds(s, q) for s, q in pairs if belongs(q)]
        if right:
            yield from share(name, right)
    exact = [motion_holds(s, q) for s, q in pairs]
    for motion in MOTIONS:
        right = [e for e, scene in zip(exact, scenes, strict=True) if scene.motion == motion]
        if right:
            yield from share(f"clip_{motion}", right)
    yield from share("clip_exact", exact)


def motion_holds(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether all that a caption says is so, and nothing else is there or happens."""
    return (
        directions_hold(seen, statement)
        and speed_holds(seen, statement)
        and bounce_holds(seen, statement)
        and passing_holds(seen, statement)
        and statement.background in (None, seen.background)
    )


def objects_hold(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether just the objects of the caption are there, in most frames."""
    asked = sorted((claim.shape, claim.colour) for claim in statement.claims)
    return seen.steady and asked == sorted((thing.shape, thing.colour) for thing in seen.objects)


def directions_hold(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether the objects are there, and each goes as said, or stands."""
    return objects_hold(seen, statement) and all(
        _of(seen, claim).direction == claim.direction for claim in statement.claims
    )


def speed_holds(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether each object is as fast as said, where that is said. Needs the objects."""
    return all(claim.speed in (None, _of(seen, claim).speed) for claim in statement.claims)


def bounce_holds(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether just those turn back that should. Needs the objects."""
    return all(_of(seen, claim).bounces == claim.bounces for claim in statement.claims)


def passing_holds(seen: SeenClip, statement: MotionStatement) -> bool:
    """Whether the first object is in front of the second, or behind it, if so said. Needs them."""
    if statement.passes is None:
        return True
    first, second = (_of(seen, claim) for claim in statement.claims)
    return seen.front is (first if statement.passes == "in front of" else second)


def _of(seen: SeenClip, claim: MotionClaim) -> SeenMover:
    """The object that a claim is about; a colour belongs to one object."""
    return next(thing for thing in seen.objects if thing.colour == claim.colour)
