"""Captioned shapes: the fast renderer against fp64, captions against the pixels, determinism."""

from __future__ import annotations

import itertools
import math
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from mvsplit.data import TASKS, Shapes, WordEmbedder
from mvsplit.data.captions import PLURALS, RELATIONS, SHAPES
from mvsplit.data.render import RGB, render
from mvsplit.data.scenes import draw_scenes
from mvsplit.data.text import split_words
from mvsplit.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
paint_scene = runpy.run_path(str(BENCHMARKS / "shapes_reference.py"))["paint_scene"]
SCENES = 400
LARGE = 128  # pixels a side at which shapes are recognised from a few probes


@dataclass
class Blob:
    """One connected object, as measured from a picture; lengths are fractions of its side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@pytest.mark.parametrize(("size", "scenes"), [(32, 24), (64, 6)])
def test_renderer_agrees_with_fp64_reference(size, scenes):
    shapes = Shapes(size=size, seed=3)
    pictures = shapes.fetch(range(scenes)).latents
    truth = [shapes.scene(index) for index in range(scenes)]
    if size == 32:
        assert {thing.shape for scene in truth for thing in scene.objects} == set(SHAPES)
    painted = torch.stack([paint_scene(scene, size) for scene in truth])
    # Positions reach 64 in fp32, so distances in pixels are off by a few 2⁻¹⁸ = 4e-6.
    torch.testing.assert_close(pictures.double(), painted, rtol=0, atol=1e-5)


def test_anti_aliasing_keeps_the_area():
    """What a picture differs from its background is contrast × the object's area, in any shape."""
    hole, arm = 0.55, 0.34
    area = {
        "circle": math.pi,
        "square": 1.8**2,
        "triangle": 1.8,
        "diamond": 2.0,
        "cross": 8 * arm - 4 * arm**2,
        "ring": math.pi * (1 - hole**2),
    }
    shapes = Shapes(size=32)
    seen = set()
    for index in range(200):
        scene = shapes.scene(index)
        if scene.task not in ("single_object", "colors"):
            continue
        (thing,) = scene.objects
        seen.add(thing.shape)
        ground, ink = (2 * torch.tensor(RGB[name]) - 1 for name in (scene.background, thing.colour))
        inked = (shapes.fetch([index]).latents[0] - ground[:, None, None]).sum((1, 2))
        expected = (ink - ground) * area[thing.shape] * (thing.radius * 32) ** 2
        # Blurred over a pixel, corners gain (perimeter² / 4 area) / 12 of a pixel: 2.4 % of the
        # smallest triangle. The rest is that pixels sample the blur only at their centres.
        torch.testing.assert_close(inked, expected, rtol=0.07, atol=1e-3)
    assert seen == set(SHAPES)


@pytest.fixture(scope="module")
def measured():
    """[(caption, background, blobs)] of the first scenes, the last two read off the pixels."""
    indices = np.arange(SCENES, dtype=np.uint64)
    pictures = render(draw_scenes(0, indices), LARGE).numpy()
    captions = Shapes().fetch(range(SCENES)).captions
    return [
        (caption, *_measure(picture)) for caption, picture in zip(captions, pictures, strict=True)
    ]


def test_captions_are_true_of_the_pixels(measured):
    for caption, background, blobs in measured:
        assert _is_true(caption, background, blobs), (caption, background, blobs)


def test_the_truth_check_can_fail(measured):
    """The check above notices a wrong colour, shape, count, relation, size, place, background."""
    swaps = {
        "red": "blue",
        "circle": "square",
        "three": "two",
        "left of": "right of",
        "above": "below",
        "left of ": "above ",
        "small": "large",
        "top left": "top right",
        "in the center": "in the bottom right",
        "on a black": "on a white",
    }
    for old, new in swaps.items():
        changed = [
            (c.replace(old, new), *rest) for c, *rest in measured if re.search(rf"\b{old}", c)
        ]
        assert changed, old
        for caption, background, blobs in changed:
            assert not _is_true(caption, background, blobs), (caption, blobs)


def test_ground_truth_is_what_the_pixels_show(measured):
    shapes = Shapes()
    for index, (_, background, blobs) in enumerate(measured):
        scene = shapes.scene(index)
        assert scene.background == background
        assert len(blobs) == len(scene.objects)
        for thing in scene.objects:
            blob = min(blobs, key=lambda b, o=thing: math.dist((b.x, b.y), (o.x, o.y)))
            assert (blob.shape, blob.colour, blob.size) == (thing.shape, thing.colour, thing.size)
            assert math.dist((blob.x, blob.y), (thing.x, thing.y)) < 1.5 / LARGE


@pytest.mark.parametrize("size", [32, 64])
def test_one_blob_for_each_object(size):
    shapes = Shapes(size=size, seed=5)
    pictures = shapes.fetch(range(SCENES)).latents.numpy()
    for index, picture in enumerate(pictures):
        assert ndimage.label(_ink(picture)[0])[1] == len(shapes.scene(index).objects)


def test_every_kind_of_task_is_drawn_and_labelled():
    scenes = [Shapes().scene(index) for index in range(SCENES)]
    shares = {task: sum(s.task == task for s in scenes) / SCENES for task in TASKS}
    for task, share in shares.items():
        assert share == pytest.approx(1 / len(TASKS), abs=0.06), task  # 3.4 standard deviations
    for scene in scenes:
        claims, told = scene.statement.claims, scene.statement
        assert (told.relation in RELATIONS) == (scene.task == "position")
        assert (claims[0].count > 1) == (scene.task == "counting")
        assert sum(claim.count for claim in claims) == len(scene.objects)
        if scene.task in ("colors", "color_attr"):
            assert all(claim.colour for claim in claims)
        if scene.task == "color_attr":
            assert claims[0].colour != claims[1].colour


def test_a_sample_does_not_depend_on_its_batch():
    shapes = Shapes(seed=7)
    whole = shapes.fetch(range(100, 230))  # more than the renderer paints at a time
    for cut in ([229], [100, 150], [171, 120, 171]):
        part = shapes.fetch(cut)
        places = [index - 100 for index in cut]
        assert torch.equal(part.latents, whole.latents[places])
        assert part.captions == [whole.captions[place] for place in places]
        assert part.captions == [shapes.scene(index).caption for index in cut]


def test_seeds_and_sizes():
    small, large, other = Shapes(), Shapes(size=64), Shapes(seed=1)
    assert [small.scene(i) for i in range(9)] == [large.scene(i) for i in range(9)]
    assert [small.scene(i) for i in range(9)] != [other.scene(i) for i in range(9)]
    halved = torch.nn.functional.avg_pool2d(large.fetch(range(9)).latents, 2)
    assert (halved - small.fetch(range(9)).latents).abs().mean() < 0.01


def test_the_series_never_changes():
    """Stored values: a change here changes what every saved run was trained on."""
    scene = Shapes(seed=0).scene(2**40 + 1)
    assert Shapes(seed=0).fetch(range(4)).captions == GOLDEN_CAPTIONS
    assert scene.caption == GOLDEN_FAR_CAPTION
    assert [(o.x, o.y, o.radius) for o in scene.objects] == GOLDEN_FAR_OBJECTS


def test_grammar_uses_only_the_vocabulary():
    captions = Shapes(seed=2).fetch(range(3000)).captions
    words = [split_words(caption) for caption in captions]
    assert {word for caption in words for word in caption} == set(Shapes.vocabulary)
    assert max(len(caption) for caption in words) <= Shapes.caption_words
    WordEmbedder(Shapes.vocabulary, 64, max_tokens=Shapes.caption_words).encode(captions)
    for caption in captions:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def test_latents_stay_in_range():
    latents = Shapes(seed=4).fetch(range(256)).latents
    assert latents.dtype == torch.float32
    assert latents.min() >= -1
    assert latents.max() <= 1


def test_bad_input():
    with pytest.raises(UserError, match=r"^data.size=48 is not possible for shapes; choose 32 or"):
        Shapes(size=48)
    for index in (-1, 2**58):
        with pytest.raises(IndexError):
            Shapes().fetch([index])


# Reading pictures, with nothing of the package but the palette ------------------------------------


def _nearest_colour(rgb):
    return min(RGB, key=lambda name: np.abs(np.array(RGB[name]) * 2 - 1 - rgb).sum())


def _ink(picture):
    """[S, S] mask of the pixels covered by half or more, and the background's colour [3]."""
    codes = np.tensordot(np.array([1.0, 300.0, 90000.0]), picture, axes=1).ravel()
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    ground = picture.reshape(3, -1)[:, first[counts.argmax()]]
    away = np.abs(picture - ground[:, None, None]).sum(0)
    parts, number = ndimage.label(away > 0)
    strongest = ndimage.maximum(away, parts, np.arange(number + 1))  # of each part's full colour
    return away > 0.5 * strongest[parts], ground


def _measure(picture):
    mask, ground = _ink(picture)
    parts, number = ndimage.label(mask)
    boxes = ndimage.find_objects(parts)
    blobs = [_blob(picture, parts == n + 1, boxes[n]) for n in range(number)]
    return _nearest_colour(ground), blobs


def _blob(picture, mask, box):
    rows, columns = box
    half = (columns.stop - columns.start) / 2
    x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    height = (rows.stop - rows.start) / 2

    def inside(u, v):  # in the bounding box, from -1 to 1
        return mask[int(y + v * height), int(x + u * half)]

    shape = _shape(inside)
    radius = half / len(mask) / (0.9 if shape == "square" else 1)
    centre = y + height / 9 if shape == "triangle" else y  # its box reaches 1 up and 0.8 down
    return Blob(
        shape=shape,
        colour=_nearest_colour(np.median(picture[:, mask], axis=1)),
        size="small" if radius < 0.1275 else "large" if radius > 0.1625 else "medium",
        x=x / len(mask),
        y=centre / len(mask),
    )


def _shape(inside):
    if not inside(0, 0):
        return "ring"
    if inside(0.85, -0.85):
        return "square"
    if inside(0.75, 0.85):
        return "triangle"
    if inside(0.6, 0.6):
        return "circle"
    return "diamond" if inside(0.42, 0.42) else "cross"


def _is_true(caption, background, blobs):
    rest, told_background = _cut(caption, r" on a (\w+) background$")
    rest, place = _cut(rest, r" in the ([a-z ]+)$")
    if told_background not in (None, background):
        return False
    if place and not _in_place(blobs[0], place):
        return False
    counted = re.match(r"(two|three|four) (.*)$", rest)
    if counted:
        *colour, plural = counted[2].split()
        phrase = [*colour, dict(zip(PLURALS, SHAPES, strict=True))[plural]]
        number = {"two": 2, "three": 3, "four": 4}[counted[1]]
        return len(blobs) == number and all(_matches(blob, phrase) for blob in blobs)
    pieces = re.split(r", | and | (left of|right of|above|below) ", rest)
    relation = next((piece for piece in pieces if piece in RELATIONS), None)
    phrases = [piece.split()[1:] for piece in pieces if piece and piece not in RELATIONS]
    return len(blobs) == len(phrases) and any(
        all(map(_matches, order, phrases)) and (not relation or _related(*order, relation))
        for order in itertools.permutations(blobs)
    )


def _cut(text, pattern):
    found = re.search(pattern, text)
    return (text[: found.start()], found[1]) if found else (text, None)


def _matches(blob, words):
    return set(words) <= {blob.shape, blob.colour, blob.size}


def _related(first, second, relation):
    dx, dy = first.x - second.x, first.y - second.y
    ahead = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    aside = dy if relation in ("left of", "right of") else dx
    return ahead > abs(aside)


def _in_place(blob, place):
    if place == "center":
        return abs(blob.x - 0.5) < 0.11 and abs(blob.y - 0.5) < 0.11
    vertical, horizontal = place.split()
    high, left = blob.y < 0.4, blob.x < 0.4
    low, right = blob.y > 0.6, blob.x > 0.6
    return {"top": high, "bottom": low}[vertical] and {"left": left, "right": right}[horizontal]


GOLDEN_CAPTIONS = [
    "a pink cross left of a yellow diamond",
    "a small triangle on a black background",
    "four circles",
    "a small red triangle",
]
GOLDEN_FAR_CAPTION = "three diamonds on a brown background"
GOLDEN_FAR_OBJECTS = [
    (0.7925566472617454, 0.2741457932342788, 0.1508038376396416),
    (0.75426700755491, 0.7423862991122052, 0.19396020618466442),
    (0.2949906935683863, 0.7060148479319973, 0.14572090866708973),
]
