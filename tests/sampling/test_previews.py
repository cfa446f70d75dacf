"""Previews show where a straight path ends, every few steps, for every batch."""

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.flow import interpolate
from mvsplit.sampling import Previews, SamplingConfig, euler, generate


def test_on_a_straight_path_every_preview_is_the_data():
    noise, data = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    shown = []
    previews = Previews(
        lambda indices, done, z: shown.append((indices, done, z)), every=3, steps=7, shift=4.0
    )
    z = euler(
        lambda z, t: data - noise, noise, steps=7, shift=4.0,
        callback=lambda done, z: previews([4, 5, 6], done, z),
    )  # fmt: skip
    assert [(indices, done) for indices, done, _ in shown] == [([4, 5, 6], 3), ([4, 5, 6], 6)]
    for _, _, latents in shown:
        torch.testing.assert_close(latents, data)
    torch.testing.assert_close(z, interpolate(data, noise, torch.tensor(0.0)))


def test_each_batch_has_its_own(model, embedder):
    shown = []
    config = SamplingConfig(steps=4, batch_size=2)
    previews = Previews(
        lambda indices, done, z: shown.append((indices, done, z)), every=1, steps=4, shift=4.0
    )
    drawn = list(generate(model, embedder, ["one"] * 3, (1, 4, 4), config, preview=previews))
    expected = [([0, 1], d) for d in (2, 3, 4)] + [([2], d) for d in (2, 3, 4)]
    assert [(indices, done) for indices, done, _ in shown] == expected
    torch.testing.assert_close(shown[-1][2], drawn[-1].latents)


def test_less_than_a_step_is_refused():
    with pytest.raises(UserError, match="every=0: must be at least 1"):
        Previews(print, every=0, steps=4, shift=1.0)
