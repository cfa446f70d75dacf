"""The reader of pictures, on what the renderer paints and on what it never would."""

import pytest
import torch

from mvsplit.data import Shapes
from mvsplit.evaluation.reader import blurred, read_pictures

WORSE = {"sharp": (0.0, 0.0), "soft": (0.022, 0.0), "as samples": (0.022, 0.1)}


def rendered(size: int, count: int, quality: str = "sharp"):
    """Pictures and the truth about them, blurred by a part of the side, with noise in [−1, 1]."""
    shapes = Shapes(size, seed=77)
    blur, noise = WORSE[quality]
    pictures = blurred(shapes.fetch(range(count)).latents, blur * size)
    grain = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return pictures + noise * grain, [shapes.scene(index) for index in range(count)]


def truth(scene):
    return sorted((thing.shape, thing.colour) for thing in scene.objects), scene.background


def answer(seen):
    return sorted((str(thing.shape), str(thing.colour)) for thing in seen.objects), seen.background


@pytest.mark.parametrize(("size", "count"), [(32, 200), (64, 40)])
@pytest.mark.parametrize("quality", WORSE)
def test_what_was_rendered_is_read(size, count, quality):
    pictures, scenes = rendered(size, count, quality)
    wrong = [
        (truth(scene), answer(seen))
        for scene, seen in zip(scenes, read_pictures(pictures), strict=True)
        if truth(scene) != answer(seen)
    ]
    assert len(wrong) <= (0.005 * count if quality == "as samples" else 0), wrong


def test_places_and_sizes_are_those_of_the_scene():
    pictures, scenes = rendered(32, 60)
    for scene, seen in zip(scenes, read_pictures(pictures), strict=True):
        for thing in scene.objects:
            near = min(seen.objects, key=lambda o: abs(o.x - thing.x) + abs(o.y - thing.y))
            assert (near.x, near.y) == pytest.approx((thing.x, thing.y), abs=0.003)
            assert near.radius == pytest.approx(thing.radius, abs=0.003)


def painted(inside, colour=(1.0, -0.8, -0.8), size=32):
    """A black picture, one colour where `inside` of x and y, counted in pixels from the centre."""
    place = torch.arange(size) - size / 2 + 0.5
    mask = inside(place[None, :], place[:, None])
    return torch.where(mask, torch.tensor(colour)[:, None, None], torch.tensor(-1.0))[None]


UNKNOWN = {
    "bar": lambda x, y: (x.abs() < 8) & (y.abs() < 2),
    "ellipse": lambda x, y: (x / 8) ** 2 + (y / 3.5) ** 2 < 1,
    "half a disc": lambda x, y: (x**2 + y**2 < 49) & (y > 0),
    "corner": lambda x, y: (x.abs() < 6) & (y.abs() < 6) & ((x < -2) | (y > 2)),
    "two discs that touch": lambda x, y: ((x.abs() - 4) ** 2 + y**2) < 20,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_shape_that_there_is_not_has_no_name(name):
    (seen,) = read_pictures(painted(UNKNOWN[name]))
    assert [thing.shape for thing in seen.objects] == [None]
    assert [thing.colour for thing in seen.objects] == ["red"]


@pytest.mark.parametrize("colour", [(0.2, 0.2, 0.2), (-0.2, -0.5, -0.7), (0.9, 0.9, 0.9)])
def test_a_colour_that_there_is_not_has_no_name(colour):
    (seen,) = read_pictures(painted(lambda x, y: x**2 + y**2 < 36, colour))
    assert [thing.colour for thing in seen.objects] == [None]


def test_nothing_and_specks_are_no_objects():
    empty = painted(lambda x, y: (x > 99) & (y > 99))
    speck = painted(lambda x, y: (x.abs() < 1) & (y.abs() < 1))
    assert [len(seen.objects) for seen in read_pictures(torch.cat([empty, speck]))] == [0, 0]


def test_a_background_that_there_is_not_has_no_name():
    (seen,) = read_pictures(torch.tensor([0.0, 0.9, -0.9]).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert seen.background is None


def test_a_picture_is_read_the_same_in_any_company():
    pictures, _ = rendered(32, 12, "as samples")
    together = [answer(seen) for seen in read_pictures(pictures)]
    assert together == [answer(read_pictures(p[None])[0]) for p in pictures]


def test_blur_is_a_gaussian_in_both_directions():
    dot = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    dot[0, 0, 10, 10] = 1
    soft = blurred(dot, 1.5)[0, 0]
    place = torch.arange(-10, 11, dtype=torch.float64)
    assert float(soft.sum()) == pytest.approx(1)
    for axis in (0, 1):
        assert float(soft.sum(axis) @ place.square()) == pytest.approx(1.5**2, rel=0.03)
