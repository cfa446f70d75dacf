"""Scenes of clips, drawn by index: one or two objects that move, and what the caption says of them.

A clip lasts one unit of time, whatever its number of frames: frame f of F shows the time
f / (F − 1), so that a clip of more frames is the same clip in smaller steps. Lengths are fractions
of the side, x grows to the right, y downwards. An object goes straight ahead at a constant speed
and turns back where it comes as close to the border as `MARGIN`.

| motion | objects |
|---|---|
| move | one, slowly or quickly |
| bounce | one, that turns back at the border once |
| pair | two, each in a lane of its own, on parallel ways |
| pass | one that passes in front of another that stands still, or behind it |

caption    := body [background]
body       := mover | mover "and" mover | mover ("behind" | "in front of") thing
mover      := thing [speed] "moving" direction ["and bouncing back"]
thing      := article colour shape
speed      := "slowly" | "quickly"
direction  := "left" | "right" | "up" | "down"
background := "on a" colour "background"

Shapes: B clips, 2 slots for objects (the first `count` of a clip are used).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvsplit.data.captions import BACKGROUNDS, COLOURS, SHAPES
from mvsplit.data.counter import stream_key
from mvsplit.data.scenes import MARGIN, Booleans, Draws, Floats, Integers, rows_of

SLOTS = 2
MOTIONS = ("move", "bounce", "pair", "pass")
MOVE, BOUNCE, PAIR, PASS = range(len(MOTIONS))
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
PASSES = ("behind", "in front of")

WAYS = np.array([(0.15, 0.22), (0.40, 0.52)])  # of SPEEDS: shortest and longest, in a clip
_BOUNCE_WAY = (0.5, 0.65)
_RADII = np.array([(0.10, 0.14), (0.10, 0.14), (0.10, 0.13), (0.10, 0.11)])  # of MOTIONS
_STANDING = (0.105, 0.12)  # radii of what stands still
_SHAKE = 0.01  # of the two ends of a passing way, and of what is passed


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionClaim:
    """One object of a caption; what the caption does not say is None."""

    shape: str
    colour: str
    direction: str | None = None  # None: it stands still
    speed: str | None = None
    bounces: bool = False

    def text(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        words = [article, self.colour, self.shape]
        if self.direction is not None:
            words += [self.speed or "", "moving", self.direction]
        if self.bounces:
            words += ["and bouncing back"]
        return " ".join(word for word in words if word)


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionStatement:
    """All that a caption of a clip says, in the order in which it says it."""

    claims: tuple[MotionClaim, ...]
    passes: str | None = None  # how the first object passes the second
    background: str | None = None

    def text(self) -> str:
        """The caption."""
        caption = f" {self.passes or 'and'} ".join(claim.text() for claim in self.claims)
        return f"{caption} on a {self.background} background" if self.background else caption


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingObject:
    """One object. `x`, `y`: where it is at the start; `dx`, `dy`: the way it goes in the clip, were
    there no border."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float
    dx: float
    dy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipScene:
    """The truth about one clip. `objects` are in the order in which the caption names them."""

    motion: str
    objects: tuple[MovingObject, ...]
    background: str
    statement: MotionStatement

    @property
    def caption(self) -> str:
        return self.statement.text()


@dataclass(frozen=True, kw_only=True)
class ClipTable:
    """Many clips, a column for each property; names are stored as places in their tuples."""

    motion: Integers  # [B]
    count: Integers  # [B]
    background: Integers  # [B]
    shape: Integers  # [B, 2]
    colour: Integers  # [B, 2]
    radius: Floats  # [B, 2]
    direction: Integers  # [B, 2]; -1: it stands still
    speed: Integers  # [B, 2]
    start: Floats  # [B, 2, 2] x, y
    way: Floats  # [B, 2, 2] x, y
    front: Integers  # [B], which object is painted last
    say_speed: Booleans  # [B]
    say_background: Booleans  # [B]

    def scenes(self) -> list[ClipScene]:
        """The rows as objects with names."""
        return [_scene(row) for row in rows_of(self)]


def draw_clips(seed: int, indices: np.ndarray, motions: Sequence[str] = MOTIONS) -> ClipTable:
    """Clip number `index` of the endless series `seed`, for every index of `indices` [B]."""
    draws = Draws(stream_key("clips", seed), indices, 48)
    known = np.array([MOTIONS.index(motion) for motion in motions])
    motion = known[draws.choice(len(known))[:, 0]]
    shape = draws.order(len(SHAPES))[:, :SLOTS]
    colour = draws.order(len(COLOURS))[:, :SLOTS]
    low, high = _RADII[motion].T
    radius = low[:, None] + (high - low)[:, None] * draws.uniform(SLOTS)
    still = _STANDING[0] + (_STANDING[1] - _STANDING[0]) * draws.uniform()[:, 0]
    radius[:, 1] = np.where(motion == PASS, still, radius[:, 1])
    direction = _directions(motion, draws)
    speed = draws.choice(len(SPEEDS), SLOTS)
    start, way = _ways(motion, direction, speed, radius, draws)
    return ClipTable(
        motion=motion,
        count=np.where(motion >= PAIR, 2, 1),
        background=draws.choice(len(BACKGROUNDS))[:, 0],
        shape=shape,
        colour=colour,
        radius=radius,
        direction=direction,
        speed=speed,
        start=start,
        way=way,
        front=draws.choice(2)[:, 0],
        say_speed=draws.coin()[:, 0] & (motion == MOVE),
        say_background=draws.coin()[:, 0],
    )


def places(table: ClipTable, frames: int) -> Floats:
    """Centres [B, 2, F, 2] of the objects in every frame."""
    times = np.arange(frames) / max(frames - 1, 1)
    ahead = table.start[:, :, None] + times[:, None] * table.way[:, :, None]
    return reflected(ahead, (table.radius + MARGIN)[:, :, None, None])


def reflected(place: Floats, reach: Floats) -> Floats:
    """Where a way goes on that would leave [reach, 1 − reach]: it turns back at the border."""
    room = 1 - 2 * reach
    ahead = np.mod(place - reach, 2 * room)
    return reach + np.minimum(ahead, 2 * room - ahead)


def _directions(motion: Integers, draws: Draws) -> Integers:
    """[B, 2]; those of a pair share an axis, what is passed stands still."""
    first = draws.choice(len(DIRECTIONS))[:, 0]
    second = np.where(draws.coin()[:, 0], first, first ^ 1)  # the same, or against it
    return np.stack([first, np.where(motion == PASS, -1, second)], axis=1)


def _ways(
    motion: Integers, direction: Integers, speed: Integers, radius: Floats, draws: Draws
) -> tuple[Floats, Floats]:
    """Starts and ways, [B, 2, 2] each: along the direction by motion, across it in a lane."""
    reach = radius + MARGIN
    shake = 2 * np.stack([draws.uniform(SLOTS), draws.uniform(SLOTS)], axis=2) - 1  # in [-1, 1)
    low, high = WAYS[speed].transpose(2, 0, 1)
    length = low + (high - low) * draws.uniform(SLOTS)  # [B, 2]
    begin = reach + (1 - 2 * reach - length) * (0.5 + shake[:, :, 0] / 2)
    share = draws.uniform()  # of a bouncing way before it turns back: 0.4 … 0.6
    bounce = _BOUNCE_WAY[0] + (_BOUNCE_WAY[1] - _BOUNCE_WAY[0]) * draws.uniform()
    turns = (motion == BOUNCE)[:, None]
    length = np.where(turns, bounce, length)
    begin = np.where(turns, 1 - reach - (0.4 + 0.2 * share) * bounce, begin)
    passing, ends = (motion == PASS)[:, None], _SHAKE * (1 + shake[:, :, 0]) / 2
    begin = np.where(passing, reach + ends, begin)
    length = np.where(passing, 1 - 2 * reach - 2 * ends, length)
    backwards = direction % 2 == 0  # left and up
    along = np.where(backwards, 1 - begin, begin)
    step = np.where(backwards, -length, length)
    across = _lanes(motion, reach, shake[:, :, 1], draws)
    standing = direction < 0
    along = np.where(standing, 0.5 + _SHAKE * shake[:, :, 0], along)
    step = np.where(standing, 0.0, step)
    sideways = (direction[:, :1] < 2)[..., None]  # the axis is that of the first
    zero = np.zeros_like(step)
    start = np.where(sideways, np.stack([along, across], 2), np.stack([across, along], 2))
    way = np.where(sideways, np.stack([step, zero], 2), np.stack([zero, step], 2))
    return start, way


def _lanes(motion: Integers, reach: Floats, shake: Floats, draws: Draws) -> Floats:
    """Places across the way, [B, 2]: anywhere, in the halves of the picture, or nearly the same."""
    half = np.where(draws.coin(), 0.25, 0.75)
    apart = np.concatenate([half, 1 - half], axis=1) + shake * (0.25 - reach)
    together = 0.5 + shake[:, :1] * (0.45 - reach.max(axis=1, keepdims=True)) + _SHAKE * shake
    alone = 0.5 + shake * (0.5 - reach)
    kind = motion[:, None]
    return np.where(kind == PAIR, apart, np.where(kind == PASS, together, alone))


def _scene(row: dict[str, Any]) -> ClipScene:
    objects = tuple(
        MovingObject(
            shape=SHAPES[row["shape"][slot]],
            colour=COLOURS[row["colour"][slot]],
            radius=row["radius"][slot],
            **dict(zip("xy", row["start"][slot], strict=True)),
            **dict(zip(("dx", "dy"), row["way"][slot], strict=True)),
        )
        for slot in range(row["count"])
    )
    background = BACKGROUNDS[row["background"]]
    claims = tuple(_claim(row, slot, thing) for slot, thing in enumerate(objects))
    statement = MotionStatement(
        claims=claims,
        passes=PASSES[row["front"] == 0] if row["motion"] == PASS else None,
        background=background if row["say_background"] else None,
    )
    return ClipScene(
        motion=MOTIONS[row["motion"]], objects=objects, background=background, statement=statement
    )


def _claim(row: dict[str, Any], slot: int, thing: MovingObject) -> MotionClaim:
    direction = row["direction"][slot]
    return MotionClaim(
        shape=thing.shape,
        colour=thing.colour,
        direction=None if direction < 0 else DIRECTIONS[direction],
        speed=SPEEDS[row["speed"][slot]] if row["say_speed"] else None,
        bounces=row["motion"] == BOUNCE,
    )


def _vocabulary() -> tuple[str, ...]:
    phrases = [*SHAPES, *COLOURS, *BACKGROUNDS, *DIRECTIONS, *SPEEDS, *PASSES]
    phrases += ["a an", "moving", "and bouncing back", "on a background"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY = _vocabulary()
# "a red circle moving left in front of a blue square on a gray background"
CAPTION_WORDS = 15
