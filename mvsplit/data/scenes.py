"""Scenes of one to four objects, drawn by index: what is there, and what its caption says.

Lengths are fractions of the picture's side, so a scene is the same at every resolution; x grows to
the right, y downwards. Every object keeps to a cell of its own, so objects never touch and a
picture holds exactly as many blobs as its scene has objects.

Shapes: B scenes, 4 slots for objects (the first `count` of a scene are used).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvsplit.data.captions import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Claim,
    Statement,
)
from mvsplit.data.counter import stream_key, uniforms

SLOTS = 4
_PER_SCENE = 64  # random numbers
# The six kinds of GenEval (Ghosh et al., arXiv 2310.11513) under its tags, and scenes of three or
# four objects that are all described.
TASKS = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
    "composition",
)
SINGLE, TWO, COUNTING, COLORS, POSITION, ATTRIBUTION, COMPOSITION = range(len(TASKS))

RADII = np.array([(0.10, 0.12), (0.135, 0.155), (0.17, 0.20)])  # of SIZES: smallest, largest
# Free space between an object and the border of its cell. Two of them are 2.24 pixels at a side of
# 32: less half a pixel of blur on either side, a whole pixel of background always remains.
MARGIN = 0.035

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One object. It lies within x ± radius, y ± radius."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The truth about one picture. `objects` are in the order in which the caption names them."""

    task: str
    objects: tuple[SceneObject, ...]
    background: str
    statement: Statement

    @property
    def caption(self) -> str:
        return self.statement.text()


@dataclass(frozen=True, kw_only=True)
class SceneTable:
    """Many scenes, a column for each property; names are stored as places in their tuples."""

    task: Integers  # [B]
    count: Integers  # [B]
    background: Integers  # [B]
    shape: Integers  # [B, 4]
    colour: Integers  # [B, 4]
    size: Integers  # [B, 4]
    radius: Floats  # [B, 4]
    centre: Floats  # [B, 4, 2] x, y
    relation: Integers  # [B], of the first object to the second
    place: Integers  # [B], of the first object; -1: no place has a name for it
    say_background: Booleans  # [B]
    say_colour: Booleans  # [B]
    say_place: Booleans  # [B]
    say_size: Booleans  # [B, 4]

    def scenes(self) -> list[Scene]:
        """The rows as objects with names."""
        return [_scene(row) for row in rows_of(self)]


def rows_of(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a dataclass of columns [B, …], each as values by the columns' names."""
    columns = (column.tolist() for column in vars(table).values())
    for row in zip(*columns, strict=True):
        yield dict(zip(vars(table), row, strict=True))


def draw_scenes(seed: int, indices: NDArray[np.uint64]) -> SceneTable:
    """Scene number `index` of the endless series `seed`, for every index of `indices` [B]."""
    draws = Draws(stream_key("scenes", seed), indices, _PER_SCENE)
    task = draws.choice(len(TASKS))[:, 0]
    count = _counts(task, draws)
    shape, colour = _shapes(task, draws), _colours(task, draws)
    size = draws.choice(len(SIZES), SLOTS)
    low, high = RADII[size, 0], RADII[size, 1]
    radius = low + (high - low) * draws.uniform(SLOTS)
    relation = draws.choice(len(RELATIONS))[:, 0]
    centre = _centres(count, relation, radius, task, draws)
    place = _places(centre[:, 0])
    say_background, say_colour, say_place = draws.coin(3).T
    single = (task == SINGLE) | (task == COLORS)
    always = (task == COLORS) | (task == ATTRIBUTION) | (task == COMPOSITION)
    sized = (single | (task == COMPOSITION))[:, None] & (size != SIZES.index("medium"))
    return SceneTable(
        task=task,
        count=count,
        background=draws.choice(len(BACKGROUNDS))[:, 0],
        shape=shape,
        colour=colour,
        size=size,
        radius=radius,
        centre=centre,
        relation=relation,
        place=place,
        say_background=say_background,
        say_colour=always | (say_colour & ((task == COUNTING) | (task == POSITION))),
        say_place=say_place & single & (place >= 0),
        say_size=draws.coin(SLOTS) & sized,
    )


class Draws:
    """The random numbers of each scene, `most` of the stream `key`, handed out in a fixed order."""

    def __init__(self, key: int, indices: NDArray[np.uint64], most: int) -> None:
        first = indices * np.uint64(most)
        counters = np.add.outer(first, np.arange(most, dtype=np.uint64))
        self._numbers = uniforms(key, counters)  # [B, most]
        self._most, self._used = most, 0

    def uniform(self, columns: int = 1) -> Floats:
        start, self._used = self._used, self._used + columns
        assert self._used <= self._most
        return self._numbers[:, start : self._used]  # [B, columns] in [0, 1)

    def choice(self, options: int, columns: int = 1) -> Integers:
        return (self.uniform(columns) * options).astype(np.int64)  # [B, columns] in 0 … options - 1

    def coin(self, columns: int = 1) -> Booleans:
        return self.uniform(columns) < 0.5

    def order(self, options: int) -> Integers:
        return np.argsort(self.uniform(options), axis=1)  # [B, options], permutations


def _counts(task: Integers, draws: Draws) -> Integers:
    counting, composition = 2 + draws.choice(3)[:, 0], 3 + draws.choice(2)[:, 0]
    fixed = np.array([1, 2, 0, 1, 2, 2, 0])[task]
    return np.where(
        task == COUNTING, counting, np.where(task == COMPOSITION, composition, fixed)
    )  # [B]


def _shapes(task: Integers, draws: Draws) -> Integers:
    """All different, but the same four times where objects are to be counted."""
    shape = draws.order(len(SHAPES))[:, :SLOTS]
    return np.where((task == COUNTING)[:, None], shape[:, :1], shape)  # [B, 4]


def _colours(task: Integers, draws: Draws) -> Integers:
    """Free; one colour where objects are counted, two different ones where they are told apart."""
    colour, step = draws.choice(len(COLOURS), SLOTS), 1 + draws.choice(len(COLOURS) - 1)[:, 0]
    other = (colour[:, 0] + step) % len(COLOURS)
    colour[:, 1] = np.where(task == ATTRIBUTION, other, colour[:, 1])
    return np.where((task == COUNTING)[:, None], colour[:, :1], colour)  # [B, 4]


def _centres(
    count: Integers, relation: Integers, radius: Floats, task: Integers, draws: Draws
) -> Floats:
    """[B, 4, 2]. One object lies anywhere, a pair side by side, more each in a quadrant."""
    shake = 2 * np.stack([draws.uniform(SLOTS), draws.uniform(SLOTS)], axis=2) - 1  # in [-1, 1)
    reach = (radius + MARGIN)[:, :, None]
    alone = 0.5 + shake * (0.5 - reach)
    quadrant = draws.order(SLOTS)
    corner = 0.25 + 0.5 * np.stack([quadrant % 2, quadrant // 2], axis=2)
    cell = np.where(
        ((count == 2) & (task != COUNTING))[:, None, None], _pair_cells(relation, draws), corner
    )
    return np.where((count == 1)[:, None, None], alone, cell + shake * (0.25 - reach))


def _pair_cells(relation: Integers, draws: Draws) -> Floats:
    """[B, 4, 2], of which two are used: cells of side 1/2, the first `relation` of the second.

    Along the relation centres are at least 0.27 apart and across it at most 0.23, so no pair can
    as well be described by the other axis.
    """
    across = 0.25 + 0.5 * draws.uniform()  # [B, 1]
    ahead = np.where(relation % 2 == 0, 0.25, 0.75)[:, None]  # left and above come first
    along = np.concatenate([ahead, 1 - ahead, ahead, ahead], axis=1)  # [B, 4]
    across = np.broadcast_to(across, along.shape)
    horizontal = (relation < 2)[:, None]
    return np.stack(
        [np.where(horizontal, along, across), np.where(horizontal, across, along)], axis=2
    )


def _places(centre: Floats) -> Integers:
    """[B]: the place of PLACES that holds `centre` [B, 2] beyond doubt, or -1."""
    offset = centre - 0.5
    distance = np.abs(offset)
    corner = 1 + (offset[:, 0] > 0) + 2 * (offset[:, 1] > 0)
    place = np.where(distance.min(axis=1) >= 0.15, corner, -1)
    return np.where(distance.max(axis=1) <= 0.1, PLACES.index("center"), place)


def _scene(row: dict[str, Any]) -> Scene:
    objects = tuple(_object(row, slot) for slot in range(row["count"]))
    return Scene(
        task=TASKS[row["task"]],
        objects=objects,
        background=BACKGROUNDS[row["background"]],
        statement=_statement(row, objects),
    )


def _object(row: dict[str, Any], slot: int) -> SceneObject:
    x, y = row["centre"][slot]
    return SceneObject(
        shape=SHAPES[row["shape"][slot]],
        colour=COLOURS[row["colour"][slot]],
        size=SIZES[row["size"][slot]],
        x=x,
        y=y,
        radius=row["radius"][slot],
    )


def _statement(row: dict[str, Any], objects: tuple[SceneObject, ...]) -> Statement:
    counting = row["task"] == COUNTING
    claims = tuple(
        Claim(
            shape=thing.shape,
            count=row["count"] if counting else 1,
            colour=thing.colour if row["say_colour"] else None,
            size=thing.size if say_size else None,
        )
        for thing, say_size in zip(
            objects[: 1 if counting else None], row["say_size"], strict=False
        )
    )
    return Statement(
        claims=claims,
        relation=RELATIONS[row["relation"]] if row["task"] == POSITION else None,
        place=PLACES[row["place"]] if row["say_place"] else None,
        background=BACKGROUNDS[row["background"]] if row["say_background"] else None,
    )
