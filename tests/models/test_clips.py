"""The DiT on clips: against a network of a few lines in fp64, and against itself on pictures."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.dit import stream_segments
from mvsplit.models.patching import patchify, unpatchify
from mvsplit.models.rope import rope_tables
from tests.models.test_dit import (
    BASE,
    angles_by_hand,
    attention_by_hand,
    draw,
    ffn_by_hand,
    merge_by_hand,
    normalise,
    trained,
)
from tests.oracles import averaging_matrix

CLIPS = dataclasses.replace(BASE, width=48, heads=3)  # a head width of 16: 2 + 2 pairs of time
VARIANTS = {
    "a mean for the clip": CLIPS,
    "a mean per frame": dataclasses.replace(CLIPS, mean="frame"),
    "a mean for all": dataclasses.replace(CLIPS, mean="sequence"),
    "patches of two frames": dataclasses.replace(CLIPS, patch_frames=2, mean="frame"),
    "narrow heads": dataclasses.replace(CLIPS, width=36, patch=1),  # 12: 1 pair of 3 an axis
}


def clip_angles(frames, rows, columns, text_tokens, head_width, theta):
    """Angles of each token, pair after pair. [T, K/2]."""
    own, axis = head_width // 8, head_width // 4
    table = []
    for frame in range(frames):
        for row in range(rows):
            for column in range(columns):
                angles = []
                for number, place in enumerate((row, column)):
                    for i in range(axis):
                        angle = place * theta ** (-i / axis)
                        if i >= axis - own:  # the slowest ones
                            j = number * own + i - (axis - own)
                            angle += frame * theta ** (-j / (2 * own))
                        angles.append(angle)
                table.append(angles)
    return torch.tensor(table + [[0.0] * 2 * axis] * text_tokens, dtype=torch.float64)


def clip_by_hand(dit, latents, text):
    """One sample, [C, F, H, W] and its real text tokens [T, Dc] → velocity [C, F, H, W]."""
    c, p, q = dit.config, dit.config.patch, dit.config.patch_frames
    kernel = dit.patch_in.weight.reshape(c.width, c.channels, q, p, p)
    grid = functional.conv3d(latents[None], kernel, dit.patch_in.bias, stride=(q, p, p))[0]
    frames, rows, columns = grid.shape[1:]
    total = frames * rows * columns
    x = torch.cat((normalise(grid.flatten(1).T, c.norm_eps), normalise(dit.text_in(text), 1e-5)))
    angles = clip_angles(frames, rows, columns, len(text), c.head_width, c.rope_theta)
    lengths = {
        "clip": (total, len(text)),
        "frame": (rows * columns,) * frames + (len(text),),
        "sequence": (total + len(text),),
    }
    j = averaging_matrix(lengths[c.mean])
    for block in dit.blocks:
        f = attention_by_hand(block.attention, x, angles, c)
        x = merge_by_hand(block.rule_attention, x, f, j)
        x = merge_by_hand(block.rule_ffn, x, ffn_by_hand(block.ffn, x), j)
    values = dit.head(x[:total]).reshape(frames, rows, columns, q, p, p, c.channels)
    clip = torch.einsum("fhwaijc->cfahiwj", values)
    return clip.reshape(c.channels, frames * q, rows * p, columns * p)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_velocity_and_every_gradient_by_hand(config):
    """Only the rotary tables are fp32: an angle below 6 is off by at most 2⁻²², 3e-7."""
    dit = trained(config)
    latents = draw(2, 3, 6, 4, 2, seed=50).requires_grad_()
    text = draw(2, 5, config.text_width, seed=51).requires_grad_()
    lengths, upstream = (5, 2), draw(2, 3, 6, 4, 2, seed=52)
    velocity = dit(latents, text, torch.tensor(lengths))
    expected = torch.stack([clip_by_hand(dit, latents[b], text[b, : lengths[b]]) for b in (0, 1)])
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
    leaves = (latents, text, *dit.parameters())
    ours = torch.autograd.grad(velocity, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for value, wanted in zip(ours, theirs, strict=True):
        assert (value - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", ["clip", "frame", "sequence"])
def test_a_clip_of_one_frame_is_a_picture_bit_for_bit(mean, dtype):
    dit = trained(dataclasses.replace(CLIPS, mean=mean), dtype)
    latents = draw(2, 3, 4, 6, dtype=dtype)
    text = draw(2, 5, 7, seed=1, dtype=dtype)
    for valid in (None, torch.tensor([5, 2])):
        picture = dit(latents, text, valid)
        assert torch.equal(dit(latents[:, :, None], text, valid)[:, :, 0], picture)


@pytest.mark.parametrize("head_width", [4, 8, 12, 16, 64])
def test_rotary_angles_in_fp64(head_width):
    frames = 1 if head_width == 4 else 7  # 4 is too narrow for time
    cos, sin = rope_tables(3, 5, 2, head_width, 10_000.0, torch.device("cpu"), frames)
    angles = clip_angles(frames, 3, 5, 2, head_width, 10_000.0)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=2e-6)
    picture = rope_tables(3, 5, 0, head_width, 10_000.0, torch.device("cpu"))
    assert all(torch.equal(t[:15], p) for t, p in zip((cos, sin), picture, strict=True))
    flat = angles_by_hand(3, 5, 2, head_width, 10_000.0)
    torch.testing.assert_close(picture[0].double(), flat[:15].cos(), rtol=0, atol=1e-6)


def test_attention_depends_on_how_far_apart_frames_are():
    cos, sin = rope_tables(3, 3, 0, 16, 100.0, torch.device("cpu"), 6)
    turn = torch.complex(cos, -sin).unflatten(0, (6, 3, 3))
    q, k = (torch.complex(draw(8, seed=i), draw(8, seed=i + 2)) for i in (0, 1))

    def score(at, other):
        return ((q * turn[at]) * (k * turn[other]).conj()).sum().real

    first, moved = score((0, 1, 2), (3, 0, 1)), score((2, 2, 1), (5, 1, 0))
    torch.testing.assert_close(first, moved, rtol=0, atol=1e-5)
    assert (first - score((0, 1, 2), (2, 0, 1))).abs() > 1e-2


@pytest.mark.parametrize(("patch", "frames"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_patchify_is_a_convolution_and_unpatchify_undoes_it(patch, frames):
    latents = draw(2, 5, 3 * frames, 4 * patch, 2 * patch)
    tokens = patchify(latents, patch, frames)
    weight = draw(7, 5, frames, patch, patch, seed=1)
    convolved = functional.conv3d(latents, weight, stride=(frames, patch, patch))
    expected = convolved.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens @ weight.flatten(1).T, expected)
    head_order = tokens.unflatten(-1, (5, frames, patch, patch)).permute(0, 1, 3, 4, 5, 2)
    back = unpatchify(head_order.flatten(2), patch, latents.shape[2:], frames)
    assert torch.equal(back, latents)


def test_the_mean_of_each_frame_is_that_of_its_tokens():
    """The segments of padded text, through the op itself: with α = 1 and β = 0 what a plain branch
    writes is the mean of each segment."""
    from mvsplit.kernels import split_merge

    x = draw(2, 3 * 4 + 5, 8)
    segments = stream_segments((3, 2, 2), 5, torch.tensor([5, 2]), "frame")
    means = split_merge(x * 0, x, 0.0, 1.0, 0.0, segments, norm=False)
    for sample, words in enumerate((5, 2)):
        for frame in range(3):
            own = slice(4 * frame, 4 * frame + 4)
            expected = x[sample, own].mean(0).expand(4, -1)
            torch.testing.assert_close(means[sample, own], expected)
        torch.testing.assert_close(
            means[sample, 12 : 12 + words], x[sample, 12 : 12 + words].mean(0).expand(words, -1)
        )
    assert not means[1, 14:].any()


def test_shapes_that_do_not_fit_are_named():
    text = draw(1, 2, 7)

    def refused(frames, *words, **changes):
        dit = trained(dataclasses.replace(CLIPS, **changes))
        with pytest.raises(UserError) as error:
            dit(draw(1, 3, frames, 4, 4), text)
        for word in words:
            assert word in str(error.value)

    refused(3, "model.patch_frames=2", "3 frames", "1, 3", patch_frames=2)
    refused(2, "model.patch_frames=4", "the clip has 2", "longer clips", patch_frames=4)
    refused(2, "head width of at least 8", width=12)
    with pytest.raises(UserError, match="a picture has 1 frame, fewer than a patch"):
        trained(dataclasses.replace(CLIPS, patch_frames=2))(draw(1, 3, 4, 4), text)
    with pytest.raises(UserError, match=r"expected \[batch, 3, H, W\], or \[batch, 3, frames, H"):
        trained(CLIPS)(draw(1, 2, 4, 4, 4), text)
    with pytest.raises(UserError, match=r"model\.mean='frames' is unknown: .*'?frame'?"):
        DiTConfig(**{**vars(CLIPS), "mean": "frames"})


def test_two_frames_are_not_one_twice():
    """Time reaches the output: the same picture twice does not move the same way at both times."""
    dit = DiT(CLIPS, torch.Generator().manual_seed(0)).double()
    latents = draw(1, 3, 1, 4, 4).expand(-1, -1, 2, -1, -1)
    velocity = dit(latents, draw(1, 2, 7, seed=1))
    assert (velocity[:, :, 0] - velocity[:, :, 1]).abs().max() > 1e-4
