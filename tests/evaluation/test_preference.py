"""Pairs of drawn pictures: which are kept, and who won."""

from __future__ import annotations

import torch
from torch import Tensor

from mvsplit.data import Shapes, WordEmbedder
from mvsplit.data.render import RGB
from mvsplit.data.scenes import TASKS
from mvsplit.evaluation.preference import draw_pairs, judge_of_digits, judge_of_shapes
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, generate

MODEL = DiTConfig(
    depth=1, width=16, heads=2, ffn_width=24, channels=1, patch=2, text_width=16,
    rule=RuleConfig(name="mvsplit"),
)  # fmt: skip
CAPTIONS = ["one", "two", "one", "two", "two", "one", "one"]


def brightness(pictures: Tensor, places: list[int]) -> list[int]:
    """A judge of its own: thirds of the mean, and never a point for caption 3."""
    return [
        0 if place == 3 else int(p.mean() > 0) + int(p.mean() > 0.02)
        for p, place in zip(pictures, places, strict=True)
    ]


def test_pairs_are_the_twins_of_a_caption_and_do_not_depend_on_batches() -> None:
    model = DiT(MODEL, torch.Generator().manual_seed(0)).requires_grad_(False)
    words = WordEmbedder(["one", "two"], 16)
    config = SamplingConfig(steps=2, batch_size=14)
    twice = [caption for caption in CAPTIONS for _ in range(2)]
    drawn = torch.cat([b.latents for b in generate(model, words, twice, (1, 8, 8), config)])
    expected = []
    for k in range(len(CAPTIONS)):
        points = brightness(drawn[2 * k : 2 * k + 2], [k, k])
        if points[0] != points[1]:
            win = 2 * k + (points[1] > points[0])
            expected.append((k, win, 4 * k + 1 - win, (max(points), min(points))))
    assert {win % 2 for _, win, _, _ in expected} == {0, 1}  # either twin has won
    for size in (14, 5, 1):
        found = list(
            draw_pairs(
                model, words, CAPTIONS, (1, 8, 8), SamplingConfig(steps=2, batch_size=size),
                brightness,
            )
        )  # fmt: skip
        assert sum(f.asked for f in found) == len(CAPTIONS)
        assert [p for f in found for p in f.places] == [k for k, *_ in expected]
        assert [p for f in found for p in f.points] == [p for *_, p in expected]
        chosen, rejected = (
            torch.cat([getattr(f, side) for f in found]) for side in ("chosen", "rejected")
        )
        torch.testing.assert_close(chosen, drawn[[win for _, win, _, _ in expected]])
        torch.testing.assert_close(rejected, drawn[[lose for _, _, lose, _ in expected]])


def test_shapes_are_judged_by_the_truth() -> None:
    """Of each task's scene: as rendered it has 2 points, empty 0, and with what nobody asked for
    1 where the task asks for single things."""
    shapes = Shapes(size=32, seed=11)
    found = {shapes.scene(index).task: index for index in range(200)}
    places = [found[task] for task in TASKS[:6]]
    scenes = [shapes.scene(place) for place in places]
    rendered = shapes.fetch(places).latents
    empty = rendered[:, :, :1, :1].expand_as(rendered).contiguous()
    judge = judge_of_shapes(scenes)
    assert judge(rendered, range(6)) == [2] * 6
    assert judge(empty, range(6)) == [0] * 6
    # A pure blue or yellow disc more, where there is room for it.
    more = rendered.clone()
    more[:, :, 1:8, 1:8] = rendered[:, :, :1, :1]
    disc = (torch.arange(7) - 3).square()[:, None] + (torch.arange(7) - 3).square() <= 9
    shade = torch.tensor(RGB["yellow"]) * 2 - 1
    more[:, :, 1:8, 1:8] = torch.where(disc, shade[:, None, None], more[:, :, 1:8, 1:8])
    points = dict(zip(TASKS, judge(more, range(6)), strict=False))
    assert points["counting"] in (0, 1)
    assert max(points.values()) == 1


def test_digits_are_judged_by_their_labels() -> None:
    from mvsplit.data import Digits

    digits = Digits()
    judge = judge_of_digits([7, int(digits.labels[12])])
    pictures = digits.fetch([12, 12]).latents
    assert int(digits.labels[12]) != 7
    assert judge(pictures, [0, 1]) == [0, 1]
