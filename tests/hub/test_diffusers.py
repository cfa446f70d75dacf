"""The model and pipeline of diffusers draw what our own sampler draws."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.sampling import classifier_free, euler, sample_noise
from mvsplit.training import load_run
from tests.hub.tiny import (
    TEXT_WIDTH,
    library,
    tiny_dit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)

library("diffusers")
library("transformers")

from mvsplit.data.text_encoder import QwenEncoder  # noqa: E402
from mvsplit.data.vae import Flux2Autoencoder  # noqa: E402
from mvsplit.hub import MVSplitDiTTransformer2DModel, MVSplitPipeline  # noqa: E402

PROMPTS = ["seven", "three"]
STEPS = 5


@pytest.fixture(scope="module")
def digits(digits_run):
    return load_run(digits_run)


@pytest.fixture(scope="module")
def full() -> MVSplitPipeline:
    """All parts, tiny and random."""
    return quiet(
        MVSplitPipeline.from_dit(
            tiny_dit(),
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
        )
    )


def quiet(pipeline: MVSplitPipeline) -> MVSplitPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeds(digits) -> dict[str, Tensor]:
    text, valid = digits.embedder.encode([*PROMPTS, ""])
    return {
        "prompt_embeds": text[:-1],
        "prompt_valid": valid[:-1],
        "negative_prompt_embeds": text[-1:],
        "negative_prompt_valid": valid[-1:],
    }


def ours(model, given: dict[str, Tensor], noise: Tensor, guidance: float) -> Tensor:
    velocity = classifier_free(
        model,
        given["prompt_embeds"],
        given["negative_prompt_embeds"],
        guidance,
        text_valid=given["prompt_valid"],
        null_valid=given["negative_prompt_valid"],
    )
    return euler(velocity, noise, steps=STEPS, shift=4.0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_trained_digits_are_drawn_as_by_our_own_sampler(digits, guidance):
    pipeline = quiet(MVSplitPipeline.from_dit(digits.model))
    noise, given = sample_noise([0, 1], (1, 8, 8), seed=3), embeds(digits)
    drawn = pipeline(
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=8,
        width=8,
        output_type="latent",
        **given,
    ).images
    expected = ours(digits.model, given, noise, guidance)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    assert (expected - noise).abs().mean() > 0.3  # the network has moved it, and not by rounding
    assert (expected[0] - expected[1]).abs().mean() > 0.1


def test_the_model_points_from_data_to_noise(digits):
    """At t = 1 − 0 the output must lead from the latents to noise, as diffusers trains models."""
    model = MVSplitDiTTransformer2DModel.from_dit(digits.model)
    z, text = sample_noise([0], (1, 8, 8), seed=1), embeds(digits)["prompt_embeds"][:1]
    assert torch.equal(model(z, text).sample, -digits.model(z, text))
    assert torch.equal(model(z, text, return_dict=False)[0], model(z, text).sample)
    times = torch.tensor([500.0])
    assert torch.equal(model(z, text, timestep=times).sample, model(z, text).sample)


@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_prompts_to_pictures_is_our_own_path(full, padding):
    noise = sample_noise([0, 1], (128, 2, 3), seed=5)
    prompts = ["a red circle", "b"]
    options = {"num_inference_steps": STEPS, "padding": padding, "latents": noise}
    drawn = full(prompts, height=32, width=48, output_type="pt", **options).images
    text, valid = QwenEncoder(full.tokenizer, full.text_encoder).encode([*prompts, ""])
    counts = {"text_valid": valid[:-1], "null_valid": valid[-1:]} if padding == "mask" else {}
    velocity = classifier_free(full.transformer.dit, text[:-1], text[-1:], 2.0, **counts)
    latents = euler(velocity, noise, steps=STEPS, shift=4.0)
    pixels = Flux2Autoencoder(full.vae).decode(latents)
    expected = (pixels / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert drawn.std() > 0.01


def test_padding_makes_a_picture_depend_on_its_neighbour_only_where_asked(full):
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    noise = sample_noise([0, 1], (128, 2, 2), seed=5)
    for padding, same in (("mask", True), ("attend", False)):
        alone = full("b", latents=noise[:1], padding=padding, **options).images
        beside = full(["b", "b c d e f"], latents=noise, padding=padding, **options).images[:1]
        assert torch.allclose(alone, beside, rtol=0, atol=1e-4) == same


def test_all_parts_come_back_from_a_folder(full, tmp_path):
    full.save_pretrained(tmp_path, max_shard_size="20KB")
    back = quiet(MVSplitPipeline.from_pretrained(tmp_path))
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert back.scheduler.config.shift == 4.0
    assert back.transformer.config.sample_size == 16
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    pictures = [
        pipeline("a", generator=torch.Generator().manual_seed(1), **options).images
        for pipeline in (full, back)
    ]
    for name in ("transformer", "text_encoder", "vae"):
        before, after = (getattr(p, name).state_dict() for p in (full, back))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    # Weights of a file lie elsewhere in memory, for which a CPU's products may add up otherwise.
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-5)
    assert pictures[0].std() > 0.01


def test_the_transformer_alone_comes_back_in_the_dtype_asked_for(tmp_path):
    model = MVSplitDiTTransformer2DModel.from_dit(tiny_dit(kv_heads=1, ffn_bias=True))
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        back = MVSplitDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
        assert back.dit.config == model.dit.config
        held = back.dit.state_dict()
        for name, value in model.dit.state_dict().items():
            assert torch.equal(held[name], value.to(dtype)), name


def test_the_card_is_written_and_one_that_is_there_stays(full, tmp_path):
    full.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: diffusers" in card
    weights = sum(p.numel() for p in full.transformer.parameters())
    assert f"| parameters | {weights:,} |" in card
    (tmp_path / "README.md").write_text("mine")
    full.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_shows_only_calls_that_its_folder_can_answer(full, tmp_path):
    full.save_pretrained(tmp_path / "full")
    assert 'pipeline("a red circle"' in (tmp_path / "full" / "README.md").read_text()
    MVSplitPipeline.from_dit(tiny_dit()).save_pretrained(tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "a red circle" not in card
    (usage,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(usage.replace("…", "None"))
    assert "prompt_embeds=text[0]" in usage


def test_generators_decide_the_noise(full):
    options = {
        "num_inference_steps": 1,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "num_images_per_prompt": 2,
    }

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    first = full("a", generator=generator(0), **options).images
    assert torch.equal(first, full("a", generator=generator(0), **options).images)
    assert not torch.equal(first[0], first[1])
    each = full("a", generator=[generator(0), generator(7)], **options).images
    swapped = full("a", generator=[generator(7), generator(0)], **options).images
    torch.testing.assert_close(each, swapped.flip(0))


def test_callbacks_see_change_and_stop(full):
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, round(float(timestep)), tensors["latents"].clone()))
        if step == 2:
            pipeline._interrupt = True
        return {"latents": tensors["latents"] * 0} if step == 1 else {}

    options = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}
    drawn = full("a", callback_on_step_end=watch, **options).images
    # i/4 for i = 4, 3, 2 with shift 4, of 1000
    assert [(step, time) for step, time, _ in seen] == [(0, 1000), (1, 923), (2, 800)]
    assert torch.equal(drawn, seen[2][2])
    assert not full("a", **options).images.isnan().any()
    assert not full.interrupt


def test_output_types(full):
    options = {"height": 32, "width": 48, "num_inference_steps": 1}
    made = {
        kind: full(
            "a", output_type=kind, generator=torch.Generator().manual_seed(2), **options
        ).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert made["pil"][0].size == (48, 32)
    assert np.array_equal(np.asarray(made["pil"][0]), (made["np"][0] * 255).round().astype("uint8"))
    assert np.array_equal(made["pt"].permute(0, 2, 3, 1).numpy(), made["np"])
    decoded = Flux2Autoencoder(full.vae).decode(made["latent"])
    assert torch.equal((decoded * 0.5 + 0.5).clamp(0, 1), made["pt"])
    options["generator"] = torch.Generator().manual_seed(2)
    assert np.array_equal(full("a", output_type="np", return_dict=False, **options)[0], made["np"])


def test_low_precision_integrates_in_fp32():
    parts = {"vae": tiny_vae(), "text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    pipeline = quiet(MVSplitPipeline.from_dit(tiny_dit(), **parts)).to(torch.bfloat16)
    types = []
    pipeline(
        "a",
        height=32,
        width=32,
        num_inference_steps=2,
        callback_on_step_end=lambda p, i, t, held: types.append(held["latents"].dtype),
    )
    assert types == [torch.float32] * 2
    assert pipeline.transformer.dtype == torch.bfloat16


def test_lora_through_peft(tmp_path):
    peft = library("peft")
    model = MVSplitDiTTransformer2DModel.from_dit(tiny_dit())
    z, text = torch.randn(1, 128, 2, 2), torch.randn(1, 3, TEXT_WIDTH)
    before = model(z, text).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False))
    assert not torch.allclose(model(z, text).sample, before, rtol=0, atol=1e-3)
    adapted = [name for name, p in model.named_parameters() if p.requires_grad]
    assert adapted
    assert all("lora" in name and "attention" in name for name in adapted)
    model(z, text).sample.sum().backward()
    model.disable_adapters()
    torch.testing.assert_close(model(z, text).sample, before)


def test_the_repeated_block_is_named_for_compilation(monkeypatch):
    model = MVSplitDiTTransformer2DModel.from_dit(tiny_dit())
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    model.compile_repeated_blocks(fullgraph=True)
    assert compiled == list(model.dit.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "height=40: must be a multiple of 16"),
        ({"output_type": "jpeg"}, "output_type='jpeg' is unknown"),
        ({"prompt": None}, "give either a prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 2, TEXT_WIDTH)}, "give either a prompt"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise is not among latents"),
        ({"latents": torch.zeros(2, 128, 2, 2)}, r"latents have shape \[2, 128, 2, 2\]"),
        ({"padding": "none"}, "padding='none' is unknown"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 2, TEXT_WIDTH)},
            "prompt_embeds need negative_prompt_embeds",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_line(full, options, message):
    with pytest.raises(UserError, match=message) as caught:
        full(**{"prompt": "a", "height": 32, "width": 32, "num_inference_steps": 1, **options})
    assert "\n" not in str(caught.value)


def test_without_a_text_encoder_or_a_size_it_says_so(digits, tmp_path):
    pipeline = quiet(MVSplitPipeline.from_dit(digits.model))
    with pytest.raises(UserError, match="this pipeline has no text encoder"):
        pipeline("seven", height=8, width=8)
    with pytest.raises(UserError, match="height: give it"):
        pipeline(**embeds(digits))
    pipeline.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "model_index.json").read_text())
    assert held["transformer"][1] == "MVSplitDiTTransformer2DModel"
    assert MVSplitPipeline.from_pretrained(tmp_path).vae is None


def test_gains_that_an_older_surgery_wrote_are_read_aloud_and_the_weights_keep_theirs(tmp_path):
    model = MVSplitDiTTransformer2DModel.from_dit(tiny_dit())
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    tree = json.loads(config.read_text())
    tree["rule"]["alpha"] = -0.25
    config.write_text(json.dumps(tree))
    with pytest.warns(
        UserWarning, match=r"rule\.alpha=-0\.25: no network starts with it; 0 is taken"
    ):
        back = MVSplitDiTTransformer2DModel.from_pretrained(tmp_path)
    theirs = back.dit.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in model.dit.state_dict().items())
