"""Clips of moving shapes: every frame against the fp64 painter, the ways, captions, determinism."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from mvsplit.data import Clips, WordEmbedder
from mvsplit.data.motions import (
    DIRECTIONS,
    MOTIONS,
    WAYS,
    MotionClaim,
    MotionStatement,
    draw_clips,
    places,
    reflected,
)
from mvsplit.data.render import RGB
from mvsplit.data.scenes import MARGIN, Scene, SceneObject
from mvsplit.data.types import sample_shape
from mvsplit.errors import UserError
from mvsplit.training import DataConfig
from mvsplit.training.builders import build_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REFERENCE = runpy.run_path(str(BENCHMARKS / "shapes_reference.py"))


def place_by_hand(thing, time):
    """Step by step along the way, turning at the border."""
    found = []
    for start, way in ((thing.x, thing.dx), (thing.y, thing.dy)):
        at, left = start, way * time
        low, high = thing.radius + MARGIN, 1 - thing.radius - MARGIN
        while left:
            wall = high if left > 0 else low
            if abs(left) <= abs(wall - at):
                at, left = at + left, 0.0
            else:
                left, at = -(left - (wall - at)), wall
        found.append(at)
    return found


def still(thing, scene, time):
    x, y = place_by_hand(thing, time)
    there = SceneObject(
        shape=thing.shape, colour=thing.colour, size="small", x=x, y=y, radius=thing.radius
    )
    return Scene(task="", objects=(there,), background=scene.background, statement=None)  # type: ignore[arg-type]


def painted(scene, frame, frames, size):
    """A frame in fp64: each object alone, put over what is there by its coverage."""
    time = frame / max(frames - 1, 1)
    ground = torch.tensor(RGB[scene.background], dtype=torch.float64) * 2 - 1
    picture = ground[:, None, None].expand(3, size, size)
    last = 0 if scene.statement.passes == "in front of" else 1
    order = [scene.objects[1 - last], scene.objects[last]] if len(scene.objects) == 2 else []
    for thing in order or scene.objects:
        colour = torch.tensor(RGB[thing.colour], dtype=torch.float64) * 2 - 1
        alone = REFERENCE["paint_scene"](still(thing, scene, time), size)
        channel = int((colour - ground).abs().argmax())
        cover = (alone[channel] - ground[channel]) / (colour - ground)[channel]
        picture = picture + cover * (colour[:, None, None] - picture)
    return picture


@pytest.mark.parametrize(("size", "frames", "count"), [(32, 8, 24), (64, 3, 6)])
def test_every_frame_agrees_with_the_fp64_reference(size, frames, count):
    clips = Clips(frames, size, seed=3)
    latents, scenes = clips.fetch(range(count)).latents, clips.scenes(range(count))
    if count == 24:
        assert {scene.motion for scene in scenes} == set(MOTIONS)
    expected = torch.stack(
        [
            torch.stack([painted(scene, f, frames, size) for f in range(frames)], 1)
            for scene in scenes
        ]
    )
    # Positions reach 64 in fp32, so distances in pixels are off by a few 2⁻¹⁸ = 4e-6.
    torch.testing.assert_close(latents.double(), expected, rtol=0, atol=2e-5)


def test_objects_do_what_their_captions_say():
    clips = Clips(seed=5)
    table = draw_clips(5, np.arange(400, dtype=np.uint64))
    centres = places(table, 65)
    for row, scene in enumerate(clips.scenes(range(400))):
        for slot, (thing, claim) in enumerate(
            zip(scene.objects, scene.statement.claims, strict=True)
        ):
            way = centres[row, slot]
            step = way[1] - way[0]
            reach = thing.radius + MARGIN - 1e-9
            assert (way >= reach).all()
            assert (way <= 1 - reach).all()
            if claim.direction is None:
                assert scene.motion == "pass"
                assert np.ptp(way, axis=0).max() == 0
                continue
            axis, sign = divmod(DIRECTIONS.index(claim.direction), 2)
            assert np.sign(step[axis]) == 2 * sign - 1
            assert step[1 - axis] == 0
            turns = np.sign(np.diff(way[:, axis])) != np.sign(step[axis])
            assert turns.any() == claim.bounces == (scene.motion == "bounce")
            if claim.bounces:
                assert 0.2 < turns.mean() < 0.8
            length = np.abs(np.diff(way[:, axis])).sum()
            if claim.speed is not None:
                low, high = WAYS[("slowly", "quickly").index(claim.speed)]
                assert low <= length <= high


def test_objects_of_a_pair_keep_apart_and_those_that_pass_meet():
    table = draw_clips(5, np.arange(300, dtype=np.uint64), ("pair", "pass"))
    apart = np.abs(np.diff(places(table, 65), axis=1))[:, 0].max(2)  # [B, F], Chebyshev
    free = apart - table.radius.sum(1)[:, None]
    passing = table.motion == MOTIONS.index("pass")
    assert (free[~passing] >= 2 * MARGIN - 1e-9).all()
    assert (free[passing].min(1) < -0.15).all()
    assert (free[passing][:, [0, -1]] > 2 * MARGIN).all()  # apart at both ends


def test_a_way_turns_at_the_border():
    place = np.array([0.5, 0.85, 0.95, 1.6, 0.1, -0.5])
    expected = [place_by_hand_1d(p) for p in place]
    np.testing.assert_allclose(reflected(place, np.array(0.1)), expected, atol=1e-12)


def place_by_hand_1d(place):
    while not 0.1 <= place <= 0.9:
        place = 1.8 - place if place > 0.9 else 0.2 - place
    return place


def test_a_sample_depends_on_its_index_alone():
    clips = Clips(4, seed=9)
    many, one = clips.fetch([7, 10**12, 3]), Clips(4, seed=9).fetch([10**12])
    assert torch.equal(many.latents[1], one.latents[0])
    assert many.captions[1] == one.captions[0]
    assert not torch.equal(many.latents[0], Clips(4, seed=10).fetch([7]).latents[0])
    longer = Clips(7, seed=9).fetch([7, 10**12, 3])  # the same scenes in steps of half the size
    assert longer.captions == many.captions
    torch.testing.assert_close(longer.latents[:, :, ::2], many.latents, rtol=0, atol=1e-5)
    with pytest.raises(IndexError):
        clips.fetch([-1])


def test_held_out_clips_are_of_another_series():
    from mvsplit.evaluation import held_out

    config = DataConfig(dataset="clips", frames=4, motions=("move", "pass"))
    training, other = build_data(config), held_out(config, 16)
    assert other.name == "clips series 1000003"
    ours, theirs = training.fetch(range(50)), other.dataset.fetch(range(50))
    pixels = {clip.numpy().tobytes() for clip in ours.latents}
    assert pixels.isdisjoint(clip.numpy().tobytes() for clip in theirs.latents)
    assert sample_shape(other.dataset) == (3, 4, 32, 32)


def test_all_motions_are_drawn_and_those_alone_that_are_asked_for():
    motions = [scene.motion for scene in Clips().scenes(range(400))]
    assert all(70 < motions.count(motion) < 130 for motion in MOTIONS)
    asked = {scene.motion for scene in Clips(motions=("bounce", "pair")).scenes(range(50))}
    assert asked == {"bounce", "pair"}


def test_captions_are_read_by_the_embedder():
    captions = Clips().fetch(range(2000)).captions
    embedder = WordEmbedder(Clips.vocabulary, 64, max_tokens=Clips.caption_words)
    _, valid = embedder.encode(captions)
    assert int(valid.max()) == Clips.caption_words
    assert {w for caption in captions for w in caption.split()} == set(Clips.vocabulary)


@pytest.mark.parametrize(
    ("statement", "caption"),
    [
        (
            MotionStatement(claims=(MotionClaim(shape="circle", colour="red", direction="left"),)),
            "a red circle moving left",
        ),
        (
            MotionStatement(
                claims=(
                    MotionClaim(shape="ring", colour="orange", direction="up", speed="slowly"),
                ),
                background="gray",
            ),
            "an orange ring slowly moving up on a gray background",
        ),
        (
            MotionStatement(
                claims=(MotionClaim(shape="cross", colour="red", direction="down", bounces=True),)
            ),
            "a red cross moving down and bouncing back",
        ),
        (
            MotionStatement(
                claims=(
                    MotionClaim(shape="cross", colour="red", direction="down"),
                    MotionClaim(shape="square", colour="blue"),
                ),
                passes="behind",
            ),
            "a red cross moving down behind a blue square",
        ),
    ],
)
def test_what_is_said(statement, caption):
    assert statement.text() == caption


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 0}, ("frames=0", "1 … 64")),
        ({"frames": 65}, ("frames=65", "1 … 64")),
        ({"size": 48}, ("size=48", "32 or 64")),
        ({"motions": ("mvoe",)}, ("motion 'mvoe'", "move")),
        ({"motions": ()}, ("motions=()", "move, bounce, pair, pass")),
    ],
)
def test_options_that_are_not_possible(options, words):
    with pytest.raises(UserError) as error:
        Clips(**options)
    assert all(word in str(error.value) for word in words)


def test_other_data_sets_have_no_frames():
    with pytest.raises(UserError, match="dataset shapes: unknown option 'frames'"):
        build_data(DataConfig(dataset="shapes", frames=8))
