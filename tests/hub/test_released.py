"""The released layout against a tiny model that the released code itself computed."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvsplit.errors import UserError
from mvsplit.flow import advance, flow_loss, schedule
from mvsplit.hub import export_released, load_released
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "released_tiny.safetensors"
RTOL = 1e-5  # relative to the largest value of a tensor; fp32 rounding alone gives about 4e-7


def section(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def weights(golden) -> dict[str, torch.Tensor]:
    return section(golden, "model.")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=RTOL * scale)


def exported_gradients(model: DiT) -> dict[str, torch.Tensor]:
    holder = copy.deepcopy(model)
    for held, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        held.data = parameter.grad
    return export_released(holder)


def test_velocity_loss_and_every_gradient_are_the_released_codes(golden, weights):
    model = load_released(weights, num_heads=2)
    latents = golden["io.latents"].clone().requires_grad_()
    text = golden["io.text"].clone().requires_grad_()
    velocity = model(latents, text)
    assert_close(velocity, golden["io.velocity"])
    loss = flow_loss(velocity, golden["io.target"], torch.zeros(()))
    assert_close(loss.reshape(1), golden["io.loss"])
    loss.backward()
    assert_close(latents.grad, golden["io.grad_latents"])
    assert_close(text.grad, golden["io.grad_text"])
    gradients, expected = exported_gradients(model), section(golden, "grad.")
    assert gradients.keys() - {"norm_img_input.weight", "norm_text_input.weight"} == expected.keys()
    for key, value in expected.items():
        assert_close(gradients[key], value)


def test_six_guided_steps_give_the_released_codes_sample(golden, weights):
    model = load_released(weights, num_heads=2)
    text, null_text = golden["io.text"][1:], golden["io.text"][:1]
    z, times = golden["sample.noise"], schedule(6, 4.0).tolist()
    with torch.no_grad():
        for t, t_next in pairwise(times):
            free = model(z, null_text)
            z = advance(z, free + 2.0 * (model(z, text) - free), t, t_next)
    assert_close(z, golden["sample.latents"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_dict_comes_back_bit_for_bit(weights, dtype):
    weights = {key: value.to(dtype) for key, value in weights.items()}
    exported = export_released(load_released(weights, num_heads=2))
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        assert exported[key].dtype == dtype
        assert torch.equal(exported[key], value), key


CONFIGS = {
    "gqa, biases, patch 2": DiTConfig(
        depth=2, width=32, heads=4, kv_heads=2, ffn_width=24, channels=3, patch=2, text_width=32,
        attention_bias=True, ffn_bias=True,
    ),
    "one kv head": DiTConfig(
        depth=1, width=16, heads=4, kv_heads=1, ffn_width=8, channels=2, text_width=6,
    ),
}  # fmt: skip


def scrambled(config: DiTConfig) -> DiT:
    """A model in which no two parameters, and none of the start values, agree."""
    model = DiT(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_everything_but_the_heads_is_read_from_the_shapes(config):
    model = scrambled(config)
    back = load_released(export_released(model), num_heads=config.heads)
    assert back.config == config
    for (name, expected), actual in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_heads_default_to_128_wide():
    model = scrambled(DiTConfig(depth=1, width=256, heads=2, ffn_width=4, channels=1, text_width=4))
    assert load_released(export_released(model)).config.heads == 2


def test_a_patch_is_read_as_the_convolution_reads_it():
    model = scrambled(CONFIGS["gqa, biases, patch 2"])
    exported = export_released(model)
    latents = torch.randn(2, 3, 4, 6)
    convolved = torch.nn.functional.conv2d(
        latents,
        exported["patch_embed.patch_proj.weight"],
        exported["patch_embed.patch_proj.bias"],
        stride=2,
    )
    tokens, _ = model.embed(latents, torch.randn(2, 1, 32), None)
    expected = torch.nn.functional.rms_norm(convolved.flatten(2).transpose(1, 2), (32,), eps=1e-5)
    torch.testing.assert_close(tokens[:, :6], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_pt_files_hold_the_dict_itself_or_under_a_name(tmp_path, weights, wrap):
    path = tmp_path / "model.pt"
    torch.save({wrap: weights, "step": 7} if wrap else weights, path)
    exported = export_released(load_released(path, num_heads=2))
    assert all(torch.equal(exported[key], value) for key, value in weights.items())


def test_safetensors_and_dtype(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    model = load_released(str(tmp_path / "model.safetensors"), num_heads=2, dtype=torch.bfloat16)
    exported = export_released(model)
    for key, value in weights.items():
        assert torch.equal(exported[key], value.bfloat16()), key


def test_the_model_shares_no_memory_with_its_source(weights):
    before = {key: value.clone() for key, value in weights.items()}
    model = load_released(weights, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert all(torch.equal(weights[key], value) for key, value in before.items())


def test_an_export_can_be_saved_as_safetensors_and_read_again(tmp_path, weights):
    save_file(export_released(load_released(weights, num_heads=2)), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], value) for key, value in weights.items())


# Refusals


def test_each_missing_key_is_named(weights):
    for key in list(weights):
        rest = {name: value for name, value in weights.items() if name != key}
        if key == "context_proj.weight":  # without it the text width is the model's: no fault
            assert load_released(rest, num_heads=2).config.text_width == 64
            continue
        with pytest.raises(UserError, match=f"missing: {key.replace('.', '[.]')}$"):
            load_released(rest, num_heads=2)


def test_each_wrong_shape_is_named(weights):
    for key, value in weights.items():
        if key == "patch_embed.patch_proj.weight":
            continue  # all other shapes are judged by this one
        wrong = weights | {key: torch.ones(value.shape[0] + 1, *value.shape[1:])}
        with pytest.raises(UserError, match=r"wrong shape: .*" + key.replace(".", "[.]")):
            load_released(wrong, num_heads=2)


@pytest.mark.parametrize(
    "key", ["blocks.1.operator.proj.bias", "module.final_proj.weight", "blocks.0.norm.weight"]
)
def test_unknown_keys_are_named(weights, key):
    with pytest.raises(UserError, match=f"unknown: {key}$"):
        load_released(weights | {key: torch.ones(64)}, num_heads=2)


def test_one_bias_alone_makes_the_others_missing(weights):
    weights["blocks.1.operator.q_proj.bias"] = torch.zeros(64)
    with pytest.raises(
        UserError, match=r"missing: blocks\.0\.operator\.q_proj\.bias, .*k_proj\.bias"
    ):
        load_released(weights, num_heads=2)


def test_every_kind_of_fault_is_in_one_line(weights):
    del weights["final_proj.bias"]
    weights["extra"] = torch.ones(1)
    weights["blocks.2.ffn.w13.weight"] = torch.ones(3, 3)
    weights["norm_img_input.weight"] = torch.full((64,), 2.0)
    with pytest.raises(UserError) as caught:
        load_released(weights, num_heads=2)
    assert str(caught.value) == (
        "checkpoint is not in the released layout; missing: final_proj.bias; unknown: extra; "
        "wrong shape: blocks.2.ffn.w13.weight [3, 3] (expected [192, 64]); "
        "not all ones: norm_img_input.weight"
    )


def test_a_foreign_state_dict_is_refused_at_a_readable_length():
    foreign = {f"layers.{i}.weight": torch.ones(2) for i in range(500)}
    with pytest.raises(UserError, match=r"in another: it holds layers\.0\.weight, ") as caught:
        load_released(foreign)
    assert len(str(caught.value)) < 1000


ONES = (
    "blocks.0.fused_mvsplit_norm1.weight",
    "blocks.2.fused_mvsplit_norm2.weight",
    "blocks.1.operator.qk_norm.query_norm.weight",
    "blocks.1.operator.qk_norm.key_norm.weight",
)


@pytest.mark.parametrize("key", ONES)
def test_norm_weights_are_accepted_only_where_they_are_one(weights, key):
    weight = torch.ones(32 if "qk_norm" in key else 64)
    load_released(weights | {key: weight}, num_heads=2)
    weight[3] = 1.5
    with pytest.raises(UserError, match=f"not all ones: {key}$"):
        load_released(weights | {key: weight}, num_heads=2)


def test_heads_that_do_not_fit_are_refused(weights):
    with pytest.raises(UserError, match="width / 128, is not a whole number at width 64"):
        load_released(weights)
    with pytest.raises(UserError, match="num_heads=3"):
        load_released(weights, num_heads=3)
    with pytest.raises(UserError, match=r"wrong shape: blocks\.0\.operator\.k_proj\.weight"):
        load_released(weights, num_heads=2, num_kv_heads=1)


def test_files_that_cannot_be_read_are_refused(tmp_path, weights):
    with pytest.raises(UserError, match=r"there is no file .*none\.pt"):
        load_released(tmp_path / "none.pt")
    for name in ("cut.pt", "cut.safetensors"):
        path = tmp_path / name
        (torch.save if name.endswith("pt") else save_file)(weights, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=f"{name} is truncated or no checkpoint") as caught:
            load_released(path)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_released(tmp_path / "list.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Path("/")}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt is truncated or no checkpoint"):
        load_released(tmp_path / "code.pt")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rule": RuleConfig(name="plain")}, "model.rule.name='plain'"),
        ({"rule": RuleConfig(tied_leak=False)}, "model.rule.tied_leak=False"),
        ({"rule": RuleConfig(eps=1e-6)}, "model.rule.eps=1e-06"),
        ({"rope_theta": 100.0}, "model.rope_theta=100.0"),
    ],
)
def test_what_the_layout_cannot_hold_is_not_exported(change, field):
    size = {"depth": 1, "width": 8, "heads": 1, "ffn_width": 4, "channels": 1, "text_width": 4}
    with pytest.raises(UserError, match=field):
        export_released(DiT(DiTConfig(**size, **change)))


def test_a_manifest_of_others_beside_weights_says_nothing_of_them(tmp_path):
    model = scrambled(
        DiTConfig(depth=1, width=32, heads=2, ffn_width=64, channels=1, text_width=32)
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "manifest.json").write_text('{"name": "of another tool"}')
    (tmp_path / "models" / "manifest.json").write_text("{}")
    path = tmp_path / "models" / "model.safetensors"
    save_file(export_released(model), path)
    found = load_released(path, num_heads=2)
    assert torch.equal(found.head.weight, model.head.weight)
