"""The reader of clips on what the renderer paints and on what it never would, and the scores."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvsplit.data import Clips
from mvsplit.data.motions import MOTIONS, MotionClaim, MotionStatement
from mvsplit.errors import UserError
from mvsplit.evaluation.clip_reader import read_clips
from mvsplit.evaluation.clips import (
    bounces_hold,
    directions_hold,
    evaluate_clips,
    motion_holds,
    objects_hold,
    passing_holds,
    speeds_hold,
)
from mvsplit.evaluation.drawn import DrawnPictures

BENCHMARK = runpy.run_path(
    str(Path(__file__).parents[2] / "benchmarks" / "clips_reader.py"), run_name="benchmark"
)


@pytest.mark.parametrize(
    ("quality", "frames", "size", "count"),
    [("sharp", 8, 32, 24), ("blur and noise", 8, 32, 24), ("sharp", 4, 32, 16), ("blur", 5, 64, 6)],
)
def test_what_was_rendered_is_read(quality, frames, size, count):
    clips = Clips(frames, size, seed=77)
    scenes = clips.scenes(range(count))
    latents = BENCHMARK["worsened_clips"](
        clips.fetch(range(count)).latents, *BENCHMARK["QUALITIES"][quality]
    )
    seen = read_clips(latents)
    wrong = [m for s, q in zip(seen, scenes, strict=True) if (m := BENCHMARK["mistake"](s, q))]
    assert wrong == []


def of(motion, number=0):
    """The `number`-th clip of a motion that says all it can, and its statement."""
    clips = Clips(motions=(motion,), seed=1)
    found = [
        index
        for index, scene in enumerate(clips.scenes(range(60)))
        if scene.statement.background and (motion != "move" or scene.statement.claims[0].speed)
    ]
    return clips.fetch([found[number]]).latents, clips.scenes([found[number]])[0].statement


def read(clip):
    (seen,) = read_clips(clip)
    return seen


def claims(statement, **changes):
    """The statement with its first claim changed."""
    first, *rest = statement.claims
    return replace(statement, claims=(replace(first, **changes), *rest))


def other(value, values):
    return next(v for v in values if v != value)


def test_what_is_said_otherwise_does_not_hold():
    """Each part of a caption is changed on its own; just what it concerns fails."""
    clip, said = of("move")
    seen, (claim,) = read(clip), said.claims
    assert motion_holds(seen, said)
    wrong = {
        objects_hold: claims(said, shape=other(claim.shape, ("ring", "cross"))),
        directions_hold: claims(said, direction=other(claim.direction, ("left", "up"))),
        speeds_hold: claims(said, speed=other(claim.speed, ("slowly", "quickly"))),
        bounces_hold: claims(said, bounces=True),
    }
    for holds, statement in wrong.items():
        assert holds(seen, said)
        assert not holds(seen, statement)
        assert not motion_holds(seen, statement)
    assert objects_hold(seen, wrong[directions_hold])
    assert directions_hold(seen, wrong[speeds_hold])
    assert directions_hold(seen, wrong[objects_hold])  # whatever the shape
    unseen = claims(said, colour=other(claim.colour, ("red", "blue")))
    assert not any(holds(seen, unseen) for holds in (*wrong, motion_holds))
    ground = replace(said, background=other(said.background, ("black", "white")))
    assert not motion_holds(seen, ground)
    assert not motion_holds(seen, replace(said, claims=said.claims * 2))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_played_backwards_goes_the_other_way(motion):
    """But what turns back half-way goes where it went, and what is in front stays there."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", None: None}
    clip, said = of(motion)
    seen = read(clip.flip(2))
    back = replace(
        said,
        claims=tuple(
            c if c.bounces else replace(c, direction=opposite[c.direction]) for c in said.claims
        ),
    )
    assert motion_holds(seen, back)
    assert motion_holds(seen, said) == (motion == "bounce")


@pytest.mark.parametrize("number", range(6))
def test_what_passes_in_front_is_told_from_what_passes_behind(number):
    clip, said = of("pass", number)
    seen = read(clip)
    assert passing_holds(seen, said)
    way = other(said.passes, ("behind", "in front of"))
    assert not passing_holds(seen, replace(said, passes=way))
    assert not passing_holds(read(of("pair")[0]), replace(of("pair")[1], passes="behind"))


def test_a_clip_that_stands_still_does_not_move():
    clip, said = of("move")
    seen = read(clip[:, :, :1].expand(-1, -1, 8, -1, -1))
    assert objects_hold(seen, said)
    assert not directions_hold(seen, said)
    assert [thing.direction for thing in seen.objects] == [None]


def test_an_object_that_changes_or_goes_away_is_not_steady():
    clip, said = of("move")
    empty = clip[:, :, :, :1, :1].expand_as(clip)
    gone = torch.where((torch.arange(8) >= 4)[:, None, None], empty, clip)
    assert not objects_hold(read(gone), said)
    flicker = torch.where((torch.arange(8) % 2 == 1)[:, None, None], empty, clip)
    assert not objects_hold(read(flicker), said)
    one_frame = torch.where((torch.arange(8) == 3)[:, None, None], empty, clip)
    assert motion_holds(read(one_frame), said)
    assert not objects_hold(read(empty), said)


def test_nothing_moves_in_noise():
    noise = torch.randn(4, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    said = MotionStatement(claims=(MotionClaim(shape="ring", colour="red", direction="up"),))
    assert not any(motion_holds(seen, said) for seen in read_clips(noise))


def test_scores_of_clips():
    clips = Clips(seed=2)
    scenes = clips.scenes(range(24))
    latents = clips.fetch(range(24)).latents
    right = dict(evaluate_clips(latents, scenes))
    assert {f"clip_{m}" for m in MOTIONS} < set(right)
    shares = {name: value for name, value in right.items() if not name.endswith("_stderr")}
    assert set(shares.values()) == {1.0}
    stopped = latents.clone()
    stopped[:12] = latents[:12, :, :1]  # half of them stand still
    scores = dict(evaluate_clips(stopped, scenes))
    assert scores["clip_exact"] == scores["clip_direction"] == 0.5
    assert scores["clip_exact_stderr"] == pytest.approx(0.5 / 24**0.5)
    moves = [n for n, scene in enumerate(scenes) if scene.motion == "move"]
    assert scores["clip_move"] == sum(n >= 12 for n in moves) / len(moves)
    only = dict(evaluate_clips(latents[moves], [scenes[n] for n in moves]))
    assert not {"clip_bounce", "clip_occlusion", "clip_pass", "clip_pair"} & set(only)


def test_clips_wait_on_the_disk(tmp_path):
    latents = Clips(5, seed=4).fetch(range(3)).latents
    folder = DrawnPictures(tmp_path, {"a": 1}, frames=5)
    folder.add([0, 1, 2], latents)
    assert folder.done == 3
    torch.testing.assert_close(folder.read(3), latents, rtol=0, atol=0.5 / 127.5 + 1e-6)


def test_too_few_frames_are_refused():
    with pytest.raises(UserError, match="clips of 3 frames are too short"):
        read_clips(torch.zeros(1, 3, 3, 32, 32))
