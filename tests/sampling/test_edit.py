"""Image-to-image and inpainting: what they must give at their limits, and the path between."""

from __future__ import annotations

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.sampling import (
    SAMPLERS,
    Edit,
    SamplingConfig,
    classifier_free,
    euler,
    generate,
    get_sampler,
    sample_edit,
    sample_noise,
)

SHAPE = (1, 4, 6)
PICTURE = torch.linspace(-1, 1, 24).reshape(SHAPE)
KNOWN = torch.zeros(4, 6, dtype=torch.bool)
KNOWN[:, :3] = True


def draw(model, embedder, edit=None, **options):
    config = SamplingConfig(**{"steps": 5, "batch_size": 2, **options})
    batches = generate(model, embedder, ["one", "two", "red"], SHAPE, config, edit=edit)
    return torch.cat([batch.latents for batch in batches])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [0.7, 3.0])
def test_at_strength_1_it_is_plain_sampling_to_the_bit(model, embedder, name, shift):
    options = {"sampler": name, "shift": shift}
    edit = Edit(picture=PICTURE, strength=1.0)
    assert torch.equal(draw(model, embedder, edit, **options), draw(model, embedder, **options))


@pytest.mark.parametrize("name", SAMPLERS)
def test_towards_strength_0_the_picture_comes_out(model, embedder, name):
    distances = []
    for strength in (1e-1, 1e-3, 1e-5):
        drawn = draw(model, embedder, Edit(picture=PICTURE, strength=strength), sampler=name)
        distances.append((drawn - PICTURE).abs().max().item())
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 2e-4  # the velocity is of the order of 10


def test_it_begins_on_the_path_and_walks_below_its_start(model, embedder):
    text, valid = embedder.encode(["one"])
    null, null_valid = embedder.encode([""])
    velocity = classifier_free(model, text, null, 2.0, text_valid=valid, null_valid=null_valid)
    noise = sample_noise([0], SHAPE, seed=7)
    z = 0.4 * PICTURE + 0.6 * noise
    expected = euler(velocity, z, steps=5, shift=4.0, start=0.6)
    actual = draw(model, embedder, Edit(picture=PICTURE, strength=0.6), seed=7)[:1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - draw(model, embedder, seed=7)[:1]).abs().max() > 0.01


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_known_part_is_the_picture_to_the_bit(model, embedder, name, strength):
    edit = Edit(picture=PICTURE, strength=strength, known=KNOWN)
    drawn = draw(model, embedder, edit, sampler=name)
    assert torch.equal(drawn[:, :, KNOWN], PICTURE[:, KNOWN].expand(3, -1, -1))
    assert (drawn[:, :, ~KNOWN] - PICTURE[:, ~KNOWN]).abs().amin((1, 2)).max() > 0
    assert (drawn[0] - drawn[1])[:, ~KNOWN].abs().max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_sees_the_known_part_on_the_path_whenever_it_is_asked(name):
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    seen = []

    def velocity(z, t):
        seen.append(t)
        on_path = (1 - t) * PICTURE + t * noise
        assert torch.equal(z[:, :, KNOWN], on_path[:, :, KNOWN])
        assert (z - on_path)[:, :, ~KNOWN].abs().max() > 0.01 or t == 1
        return torch.sin(5 * z)

    states = []
    sample_edit(
        get_sampler(name).sample,
        velocity,
        noise,
        Edit(picture=PICTURE, known=KNOWN),
        steps=6,
        shift=2.0,
        callback=lambda done, z: states.append(z),
    )
    assert len(seen) == SAMPLERS[name].evaluations(6)
    # Between the evaluations it moves along the path, so that previews show it there as well.
    torch.testing.assert_close(states[-1][:, :, KNOWN], PICTURE[:, KNOWN].expand(2, -1, -1))


def test_the_unknown_part_depends_on_the_known(model, embedder):
    other = PICTURE.clone()
    other[:, KNOWN] += 1
    first, second = (
        draw(model, embedder, Edit(picture=picture, known=KNOWN)) for picture in (PICTURE, other)
    )
    assert (first - second)[:, :, ~KNOWN].abs().max() > 1e-3


def test_all_known_is_the_picture_and_nothing_known_is_plain(model, embedder):
    whole = draw(model, embedder, Edit(picture=PICTURE, known=torch.ones(4, 6, dtype=torch.bool)))
    assert torch.equal(whole, PICTURE.expand(3, -1, -1, -1))
    nothing = Edit(picture=PICTURE, known=torch.zeros(4, 6, dtype=torch.bool))
    assert torch.equal(draw(model, embedder, nothing), draw(model, embedder))


def test_what_does_not_fit_is_refused(model, embedder):
    for strength in (0.0, 1.01, float("nan")):
        with pytest.raises(UserError, match=r"strength=.*greater than 0 and at most 1"):
            Edit(picture=PICTURE, strength=strength)
    with pytest.raises(UserError, match=r"mask of \[4, 5\] latents for a picture of \[4, 6\]"):
        Edit(picture=PICTURE, known=KNOWN[:, 1:])
    with pytest.raises(UserError, match=r"picture of shape \[1, 4, 4\] for latents of \[1, 4, 6\]"):
        draw(model, embedder, Edit(picture=PICTURE[:, :, :4]))
