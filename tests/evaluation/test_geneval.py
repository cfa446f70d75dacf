"""GenEval's tasks on shapes: right pictures are right, and each kind of wrong one is wrong."""

from dataclasses import replace

import pytest
import torch

from mvsplit.data import Shapes
from mvsplit.data.captions import Claim, Statement
from mvsplit.data.scenes import Scene
from mvsplit.evaluation.geneval import (
    GENEVAL,
    caption_holds,
    evaluate_shapes,
    geneval_indices,
    scenes_at,
    task_holds,
)
from mvsplit.evaluation.reader import SeenObject, SeenPicture, blurred

COUNT = 90


@pytest.fixture(scope="module")
def asked():
    shapes = Shapes(32, seed=5)
    indices = geneval_indices(shapes, COUNT)
    return shapes.fetch(indices).latents, scenes_at(shapes, indices)


@pytest.fixture(scope="module")
def real():
    return Shapes(32, seed=6).fetch(range(300)).latents


def test_tasks_take_turns_and_a_shorter_list_is_the_beginning(asked):
    _, scenes = asked
    assert [scene.task for scene in scenes] == [GENEVAL[k % 6] for k in range(COUNT)]
    shapes = Shapes(32, seed=5)
    assert geneval_indices(shapes, 17) == geneval_indices(shapes, COUNT)[:17]
    assert scenes == [shapes.scene(index) for index in geneval_indices(shapes, COUNT)]


def test_what_was_asked_for_scores_one(asked, real):
    scores = dict(evaluate_shapes(*asked, real))
    for name in (*(f"geneval_{task}" for task in GENEVAL), "geneval_mean", "caption_exact"):
        assert scores[name] == 1, name
    assert scores["unnamed_objects"] == 0


def test_the_mean_is_of_the_tasks_and_errors_are_binomial(asked, real):
    pictures, scenes = asked
    half = pictures.clone()
    half[0::12] = -1  # black: nothing there, in every other picture of the first task
    scores = dict(evaluate_shapes(half, scenes, real))
    share = 7 / 15
    assert scores["geneval_single_object"] == pytest.approx(share)
    assert scores["geneval_single_object_stderr"] == pytest.approx(
        (share * (1 - share) / 15) ** 0.5
    )
    assert scores["geneval_mean"] == pytest.approx((share + 5) / 6)
    assert scores["caption_exact"] == pytest.approx((COUNT - 8) / COUNT)


def test_another_picture_is_not_what_the_caption_says(asked, real):
    pictures, scenes = asked
    scores = dict(evaluate_shapes(pictures.roll(6, 0), scenes, real))  # of the same task
    assert scores["caption_exact"] < 0.05
    assert scores["geneval_two_object"] < 0.3


def test_mirrored_positions_are_wrong(asked, real):
    pictures, scenes = asked
    flips = {"left of": [2], "right of": [2], "above": [1], "below": [1]}
    mirrored = [
        picture.flip(flips[str(scene.statement.relation)])
        for picture, scene in zip(pictures, scenes, strict=True)
        if scene.task == "position"
    ]
    kept = [scene for scene in scenes if scene.task == "position"]
    assert dict(evaluate_shapes(torch.stack(mirrored), kept, real))["geneval_position"] == 0


def test_the_distance_grows_with_the_blur(asked, real):
    scenes = asked[1][:1] * 60
    distances = [
        dict(evaluate_shapes(blurred(real[:60], sigma), scenes, real[:60]))["shapes_frechet"]
        for sigma in (0.0, 0.5, 1.0)
    ]
    assert abs(distances[0]) < 0.01 * distances[1] < 0.005 * distances[2]


def thing(shape="circle", colour="red", x=0.25, y=0.5, radius=0.11):
    return SeenObject(shape=shape, colour=colour, x=x, y=y, radius=radius, misfit=0.0)


def picture(*objects, background="black"):
    return SeenPicture(objects=objects, background=background)


def scene(task, *claims, **said):
    return Scene(
        task=task, objects=(), background="black", statement=Statement(claims=claims, **said)
    )


RED, BLUE = Claim(shape="circle", colour="red"), Claim(shape="square", colour="blue")
SQUARE = thing("square", "blue", x=0.75)

CASES = [
    ("single_object", [Claim(shape="circle")], {}, [thing()], True, True),
    ("single_object", [Claim(shape="circle")], {}, [thing(), SQUARE], True, False),
    ("single_object", [Claim(shape="circle")], {}, [thing("ring")], False, False),
    ("single_object", [Claim(shape="circle")], {}, [thing(None)], False, False),
    ("single_object", [replace(RED, size="large")], {}, [thing(radius=0.18)], True, True),
    ("single_object", [replace(RED, size="large")], {}, [thing(radius=0.15)], True, False),
    ("single_object", [RED], {"place": "top left"}, [thing(x=0.2, y=0.3)], True, True),
    ("single_object", [RED], {"place": "top left"}, [thing(x=0.2, y=0.7)], True, False),
    ("single_object", [RED], {"place": "center"}, [thing(x=0.55, y=0.42)], True, True),
    ("single_object", [RED], {"background": "white"}, [thing()], True, False),
    ("two_object", [RED, BLUE], {}, [thing(), SQUARE], True, True),
    ("two_object", [RED, BLUE], {}, [thing()], False, False),
    ("counting", [replace(RED, count=3)], {}, [thing()] * 3, True, True),
    ("counting", [replace(RED, count=3)], {}, [thing()] * 4, False, False),
    ("counting", [replace(RED, count=3)], {}, [thing()] * 2, False, False),
    ("counting", [replace(RED, count=2)], {}, [thing()] * 2 + [SQUARE], True, False),
    ("colors", [RED], {}, [thing(colour="pink")], False, False),
    ("color_attr", [RED, BLUE], {}, [thing(colour="blue"), thing("square")], False, False),
    ("position", [RED, BLUE], {"relation": "left of"}, [thing(), SQUARE], True, True),
    ("position", [RED, BLUE], {"relation": "right of"}, [thing(), SQUARE], False, False),
    ("position", [RED, BLUE], {"relation": "above"}, [thing(y=0.4), SQUARE], False, False),
]


@pytest.mark.parametrize(("task", "claims", "said", "objects", "done", "exact"), CASES)
def test_verdicts_by_hand(task, claims, said, objects, done, exact):
    asked = scene(task, *claims, **said)
    assert task_holds(picture(*objects), asked) is done
    assert caption_holds(picture(*objects), asked.statement) is exact
