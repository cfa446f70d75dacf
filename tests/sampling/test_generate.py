"""Picture k is its own: the same noise to the bit, the same latents up to matrix rounding."""

from __future__ import annotations

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.sampling import SamplingConfig, classifier_free, euler, generate, sample_noise

PROMPTS = ["one", "red circle", "", "two", "red circle left of two", "zero", "one"]
SHAPE = (1, 4, 6)


def latents(model, embedder, batch_size, prompts=PROMPTS, **options) -> torch.Tensor:
    config = SamplingConfig(steps=4, batch_size=batch_size, **options)
    batches = list(generate(model, embedder, prompts, SHAPE, config))
    assert [i for batch in batches for i in batch.indices] == list(range(len(prompts)))
    return torch.cat([batch.latents for batch in batches])


def test_noise_belongs_to_the_index_to_the_bit():
    together = sample_noise(range(8), (3, 5, 7), seed=11)
    for index in (7, 0, 3):
        assert torch.equal(sample_noise([index], (3, 5, 7), seed=11)[0], together[index])
    assert torch.equal(sample_noise([5, 2], (3, 5, 7), seed=11), together[[5, 2]])


def test_noise_is_standard_normal_and_independent_of_its_neighbours():
    rows = torch.cat([sample_noise(range(40), (1000,), seed=seed) for seed in (0, 1)]).double()
    assert abs(rows.mean().item()) < 5 / 80_000**0.5
    assert abs(rows.var().item() - 1) < 5 * (2 / 80_000) ** 0.5
    correlation = torch.corrcoef(rows) - torch.eye(80)
    assert correlation.abs().max() < 6 / 1000**0.5  # 3160 pairs, standard error 1/√1000 each


def test_negative_seeds_and_indices_are_refused():
    for indices, seed in (([0], -1), ([-1], 0)):
        with pytest.raises(UserError, match="negative"):
            sample_noise(indices, (2,), seed=seed)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_picture_k_is_the_same_in_any_batch_size(model, embedder, guidance):
    expected = latents(model, embedder, len(PROMPTS), guidance=guidance)
    assert (expected[0] - expected[6]).abs().max() > 0.1  # the same prompt, other noise
    for batch_size in (1, 2, 5, 64):
        # A matrix product rounds by its size. Four steps of fp32 through three blocks: 1e-5.
        torch.testing.assert_close(
            latents(model, embedder, batch_size, guidance=guidance), expected, rtol=0, atol=1e-5
        )


def test_the_same_batch_size_gives_the_same_bits(model, embedder):
    assert torch.equal(latents(model, embedder, 3), latents(model, embedder, 3))


def test_it_is_euler_with_guidance_on_the_encoded_prompt(model, embedder):
    text, valid = embedder.encode(["red circle left of two"])
    null, null_valid = embedder.encode([""])
    velocity = classifier_free(model, text, null, 3.0, text_valid=valid, null_valid=null_valid)
    noise = sample_noise([4], SHAPE, seed=9)
    expected = euler(velocity, noise, steps=4, shift=2.0)
    actual = latents(model, embedder, 7, guidance=3.0, shift=2.0, seed=9)[4:5]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_prompt_and_seed_both_matter(model, embedder):
    base = latents(model, embedder, 4, ["one", "one"])
    assert (latents(model, embedder, 4, ["two", "one"])[0] - base[0]).abs().max() > 0.01
    assert (latents(model, embedder, 4, ["one", "one"], seed=1)[0] - base[0]).abs().max() > 0.1


def test_bf16_weights_run_in_bf16_and_integrate_in_fp32(model, embedder):
    half = DiT(model.config).bfloat16().requires_grad_(False)
    half.load_state_dict(model.state_dict())
    actual = latents(half, embedder, 4)
    assert actual.dtype == torch.float32
    difference = (actual - latents(model, embedder, 4)).abs().max()
    assert 0 < difference < 0.2  # 8 bits of mantissa, values up to about 4


def test_every_step_of_every_batch_is_told(model, embedder):
    told = []
    config = SamplingConfig(steps=3, batch_size=4)
    list(
        generate(
            model,
            embedder,
            PROMPTS,
            SHAPE,
            config,
            on_step=lambda *, pictures: told.append(pictures),
        )
    )
    assert told == [4, 4, 4, 3, 3, 3]


def test_batches_come_one_after_the_other(model, embedder):
    stream = generate(model, embedder, PROMPTS, SHAPE, SamplingConfig(steps=1, batch_size=2))
    assert next(stream).indices == [0, 1]
    with pytest.raises(UserError, match="unknown word 'seven'"):
        next(generate(model, embedder, ["seven"], SHAPE, SamplingConfig(steps=1)))


def test_diverged_weights_are_named_and_not_drawn(model, embedder):
    broken = DiT(model.config).requires_grad_(False)
    broken.load_state_dict(model.state_dict())
    broken.blocks[1].ffn.w2.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"picture 0 .* not finite; blocks\.1\.ffn\.w2\.weight of"):
        latents(broken, embedder, 4)


def test_an_overflow_is_told_from_diverged_weights(model, embedder):
    broken = DiT(model.config).requires_grad_(False)
    broken.head.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"picture 0 .* not finite; all weights are finite, so"):
        latents(broken, embedder, 4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"shift": 0.0}, "shift=0.0: must be greater than 0"),
        ({"guidance": float("nan")}, "guidance=nan: must be a number"),
        ({"seed": -1}, "seed=-1: must not be negative"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**option)


def test_only_the_prompts_of_a_batch_are_encoded_with_it(model, embedder):
    asked = []

    class Recording:
        def encode(self, prompts):
            asked.append(list(prompts))
            return embedder.encode(prompts)

    list(generate(model, Recording(), PROMPTS, SHAPE, SamplingConfig(steps=1, batch_size=3)))
    assert asked == [[*PROMPTS[:3], ""], [*PROMPTS[3:6], ""], [*PROMPTS[6:], ""]]


class Small:
    """A network on a device whose memory holds `most` samples."""

    def __init__(self, model, most):
        self.model, self.most, self.parameters = model, most, model.parameters

    def __call__(self, latents, text, valid=None):
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 …")
        return self.model(latents, text, valid)


def test_a_batch_that_does_not_fit_is_halved_and_says_so(model, embedder):
    config = SamplingConfig(steps=4, batch_size=7)
    with pytest.warns(UserWarning, match="does not fit") as said:
        batches = list(generate(Small(model, 5), embedder, PROMPTS, SHAPE, config))
    assert [batch.indices for batch in batches] == [[i] for i in range(7)]
    made = torch.cat([batch.latents for batch in batches])
    torch.testing.assert_close(made, latents(model, embedder, 7), rtol=0, atol=1e-5)
    assert [str(w.message) for w in said] == [
        "batch_size=7 does not fit into the device's memory (CUDA out of memory); going on with 3",
        "batch_size=3 does not fit into the device's memory (CUDA out of memory); going on with 1",
    ]


def test_one_picture_too_large_for_the_memory_is_an_error_with_advice(model, embedder):
    stream = generate(Small(model, 1), embedder, ["one"], SHAPE, SamplingConfig(steps=4))
    with pytest.raises(UserError, match=r"one picture does not fit .*out of memory\); use --dtype"):
        next(stream)


def test_previews_are_the_states_on_the_way(model, embedder):
    seen = []
    config = SamplingConfig(steps=3, batch_size=4)
    batches = list(
        generate(
            model,
            embedder,
            PROMPTS,
            SHAPE,
            config,
            preview=lambda indices, done, z: seen.append((indices, done, z)),
        )
    )
    assert [(indices[0], done) for indices, done, _ in seen] == [
        (0, 1), (0, 2), (0, 3), (4, 1), (4, 2), (4, 3),
    ]  # fmt: skip
    assert torch.equal(seen[2][2], batches[0].latents)
    assert (seen[1][2] - seen[2][2]).abs().max() > 0.01
