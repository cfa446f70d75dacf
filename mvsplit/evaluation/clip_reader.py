"""Reads clips of moving shapes: what is there, where it goes, how fast, whether it turns back, and
what passes in front of what.

Nothing learned. Every frame is read as a picture (`reader`); then

1. What has one colour in several frames, the first or the last among them, is one object; its
   shape is the one that most frames show, if any shows one.
2. Its way is the best of a straight line and of a line that turns back once along one axis, by
   least squares; frames in which two objects come too near to be read apart do not count.
3. Where the ways of two objects cross, the frames are painted both ways, either in front, and the
   painting with the smaller error says which it is.

Shapes: B clips, F frames, S pixels a side, n frames in which an object is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvsplit.data.captions import SHAPES
from mvsplit.data.motions import DIRECTIONS, SPEEDS, WAYS
from mvsplit.data.render import RGB, coverage
from mvsplit.errors import UserError
from mvsplit.evaluation.reader import SeenObject, SeenPicture, read_pictures

FEWEST_FRAMES = 4
STILL = WAYS[0, 0] / 2.5  # the way in a clip from which an object moves
BETWEEN = (WAYS[0, 1] + WAYS[1, 0]) / 2  # from one speed to the next
ARM = 0.06  # a way that turns back is at least so long before and after
_NEAR = 0.08  # of the side: objects with less between them are not read apart
_STEADY = 0.75  # of the frames that count show what the clip shows
_BENT = 0.02  # mean distance of a straight way from what was seen, from which it may be none
_TURNS = 48  # times at which a way may turn back, that are tried
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SeenMover:
    """One object of a clip. Lengths are fractions of the side.

    Attributes:
        shape, colour: names, as of a `SeenObject`; a shape of None is none that there is.
        radius: the median.
        way: dx, dy of its first direction, as far as it goes in the whole clip.
        bounces: whether it turns back.
        places: where it is in every frame by the fitted way, [F, 2].
        residual: root of the mean square of its distance from there, in frames that count.
    """

    shape: str | None
    colour: str
    radius: float
    way: tuple[float, float]
    bounces: bool
    places: Floats
    residual: float

    @property
    def direction(self) -> str | None:
        """One of `DIRECTIONS`; None: it stands still."""
        dx, dy = self.way
        if max(abs(dx), abs(dy)) < STILL:
            return None
        sideways = abs(dx) > abs(dy)
        return DIRECTIONS[(0 if sideways else 2) + ((dx if sideways else dy) > 0)]

    @property
    def speed(self) -> str:
        """One of `SPEEDS`."""
        return SPEEDS[int(np.hypot(*self.way) > BETWEEN)]


@dataclass(frozen=True, kw_only=True)
class SeenClip:
    """What a clip shows.

    Attributes:
        objects: in no order that means anything.
        background: its name.
        front: of two objects whose ways cross the one that is painted over the other.
        steady: whether most frames in which all objects can be told apart show just these.
    """

    objects: tuple[SeenMover, ...]
    background: str | None
    front: SeenMover | None
    steady: bool


def read_clips(clips: Tensor) -> list[SeenClip]:
    """What [B, 3, F, S, S] in [−1, 1] shows; S is 32 or more.

    Raises:
        UserError: too few frames to see a motion.
    """
    frames = clips.shape[2]
    require_frames(frames)
    seen = read_pictures(clips.transpose(1, 2).flatten(0, 1))
    return [
        _read_clip(clip, seen[start : start + frames])
        for clip, start in zip(clips, range(0, len(seen), frames), strict=True)
    ]


def require_frames(frames: int) -> None:
    """Raises UserError where clips of so many frames are too short to be read."""
    if frames < FEWEST_FRAMES:
        raise UserError(
            f"clips of {frames} frames are too short to see a motion: the reader needs at least "
            f"{FEWEST_FRAMES}; for the loss alone give --num-images 0"
        )


def _read_clip(clip: Tensor, frames: Sequence[SeenPicture]) -> SeenClip:
    colours = Counter(
        name for f in (frames[0], frames[-1]) for name in {thing.colour for thing in f.objects}
    )
    tracks = {name: _observed(frames, name) for name in colours if name is not None}
    tracks = {name: track for name, track in tracks.items() if len(track) >= 2}
    near = np.zeros(len(frames), dtype=bool)
    if len(tracks) == 2:  # from their ends alone, for in between one may hide a part of the other
        ends = ({f: track[f] for f in (min(track), max(track))} for track in tracks.values())
        near = _too_near(*(_mover("", track, len(frames)) for track in ends))
        clear = {n: {f: t for f, t in track.items() if not near[f]} for n, track in tracks.items()}
        tracks = {n: clear[n] if len(clear[n]) >= 2 else track for n, track in tracks.items()}
    objects = tuple(_mover(name, track, len(frames)) for name, track in tracks.items())
    background = Counter(frame.background for frame in frames).most_common(1)[0][0]
    expected = sorted((str(thing.shape), thing.colour) for thing in objects)
    agree = [
        sorted((str(t.shape), str(t.colour)) for t in frame.objects) == expected
        for frame, hidden in zip(frames, near, strict=True)
        if not hidden
    ]
    return SeenClip(
        objects=objects,
        background=background,
        front=_front(clip, objects, background, near),
        steady=sum(agree) >= _STEADY * max(len(agree), 1),
    )


def _observed(frames: Sequence[SeenPicture], colour: str) -> dict[int, SeenObject]:
    """The frames that show one object of a colour."""
    found = {}
    for number, frame in enumerate(frames):
        things = [thing for thing in frame.objects if thing.colour == colour]
        if len(things) == 1:
            found[number] = things[0]
    return found


def _mover(colour: str, track: dict[int, SeenObject], frames: int) -> SeenMover:
    times = np.array(list(track)) / (frames - 1)
    seen = np.array([(thing.x, thing.y) for thing in track.values()])
    every = np.arange(frames) / (frames - 1)
    straight = _fit(times, seen, every)
    way, bounces = straight, False
    if straight.error > len(track) * _BENT**2:
        turned = _fit_turning(times, seen, every)
        if turned is not None and turned.error < straight.error / 4:
            way, bounces = turned, True
    shapes = Counter(thing.shape for thing in track.values() if thing.shape is not None)
    return SeenMover(
        shape=shapes.most_common(1)[0][0] if shapes else None,
        colour=colour,
        radius=float(np.median([thing.radius for thing in track.values()])),
        way=(float(way.velocity[0]), float(way.velocity[1])),
        bounces=bounces,
        places=way.places,
        residual=float(np.sqrt(way.error / len(track))),
    )


@dataclass(frozen=True)
class _Way:
    """A fitted way: its first velocity [2] a clip, where it is in every frame [F, 2], and Σ of the
    squared distances from what was seen."""

    velocity: Floats
    places: Floats
    error: float


def _fit(times: Floats, seen: Floats, every: Floats) -> _Way:
    """The straight way at constant speed closest to `seen` [n, 2]."""
    basis = np.stack([np.ones_like(times), times], axis=1)
    found = np.linalg.lstsq(basis, seen, rcond=None)[0]  # [2, 2]
    error = float(np.square(basis @ found - seen).sum())
    return _Way(found[1], found[0] + every[:, None] * found[1], error)


def _fit_turning(times: Floats, seen: Floats, every: Floats) -> _Way | None:
    """The closest way that runs back along one axis from a time on, at the same speed:
    p = a + b·|t − c|, and stays where it is across; None where none has two arms, each of them seen
    twice."""
    best: _Way | None = None
    for turn in np.linspace(times[0], times[-1], _TURNS + 2)[1:-1]:
        far = np.abs(times - turn)
        basis = np.stack([np.ones_like(far), far], axis=1)
        along, *_ = np.linalg.lstsq(basis, seen, rcond=None)  # of either axis
        errors = np.square(basis @ along - seen).sum(0)
        few = min((times < turn).sum(), (times > turn).sum()) < 2
        rest = np.square(seen - seen.mean(0)).sum(0)
        for axis in (0, 1):
            slope = along[1, axis]
            arms = abs(slope) * min(turn - times[0], times[-1] - turn)
            error = float(errors[axis] + rest[1 - axis])
            if few or arms < ARM or (best is not None and error >= best.error):
                continue
            places = np.tile(seen.mean(0), (len(every), 1))
            places[:, axis] = along[0, axis] + slope * np.abs(every - turn)
            best = _Way(np.where(np.arange(2) == axis, -slope, 0.0), places, error)
    return best


def _too_near(first: SeenMover, second: SeenMover) -> NDArray[np.bool_]:
    """The frames in which two objects cannot be read apart, [F]."""
    apart = np.hypot(*(first.places - second.places).T)
    return apart < first.radius + second.radius + _NEAR


def _front(
    clip: Tensor, objects: tuple[SeenMover, ...], background: str | None, near: NDArray[np.bool_]
) -> SeenMover | None:
    """Which of two objects that cross is painted over the other, by painting both."""
    unnamed = background is None or any(thing.shape is None for thing in objects)
    if len(objects) != 2 or unnamed or not near.any():
        return None
    shown = torch.from_numpy(np.flatnonzero(near))
    real = clip[:, shown.to(clip.device)]
    errors = [
        float((_painted(clip, shown, pair, background) - real).square().sum())
        for pair in (objects, objects[::-1])
    ]
    if errors[0] == errors[1]:  # they come near, but neither hides any of the other
        return None
    return objects[1] if errors[0] < errors[1] else objects[0]


def _painted(
    clip: Tensor, shown: Tensor, objects: Sequence[SeenMover], background: str | None
) -> Tensor:
    """Frames `shown` [n] as the renderer paints them, the last object in front. → [3, n, S, S]"""
    size = clip.shape[-1]

    def colour(name: str | None) -> Tensor:
        return (torch.tensor(RGB[str(name)], device=clip.device) * 2 - 1)[:, None, None, None]

    picture = colour(background).expand(-1, len(shown), size, size)
    for thing in objects:
        place = torch.from_numpy(thing.places)[shown].float()
        radius = torch.full((len(shown), 1), thing.radius)
        kinds = np.array([len(shown) * (name == thing.shape) for name in SHAPES])
        geometry = torch.cat([place, radius], dim=1).to(clip.device) * size
        cover = coverage(kinds, geometry, size)
        picture = picture + cover * (colour(thing.colour) - picture)
    return picture
