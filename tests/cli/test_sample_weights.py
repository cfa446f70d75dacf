"""`mvsplit sample WEIGHTS` with a tiny FLUX.2 autoencoder and Qwen3, in their own formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvsplit.cli import main
from mvsplit.data.text_encoder import QwenEncoder
from mvsplit.data.vae import Flux2Autoencoder
from mvsplit.hub import write_weights
from mvsplit.sampling import Edit, classifier_free, euler, sample_edit, sample_noise
from mvsplit.training import train
from tests.hub.tiny import library, tiny_dit, tiny_text_encoder, tiny_tokenizer, tiny_vae
from tests.training import runs

library("diffusers")
library("transformers")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """model.pt, a folder with the autoencoder, one with the text encoder, a pipeline of all."""
    folder = tmp_path_factory.mktemp("parts")
    write_weights(tiny_dit(), folder / "model.pt")
    tiny_vae().save_pretrained(folder / "vae")
    tiny_text_encoder().save_pretrained(folder / "qwen")
    tiny_tokenizer().save_pretrained(folder / "qwen")
    write_weights(tiny_dit(), folder / "pipeline", "diffusers")
    shutil.copytree(folder / "vae", folder / "pipeline" / "vae")
    tiny_text_encoder().save_pretrained(folder / "pipeline" / "text_encoder")
    tiny_tokenizer().save_pretrained(folder / "pipeline" / "tokenizer")
    return folder


def draw(parts: Path, *options: str, weights: str = "model.pt", prompt: str = "a b") -> int:
    given = {
        "--vae": str(parts / "vae"),
        "--text-encoder": str(parts / "qwen"),
        "--num-heads": "2",
        "--prompt": prompt,
        "--num-images": "2",
        "--steps": "3",
        "--device": "cpu",
        "--resolution": "64x80",
        **dict(zip(options[::2], options[1::2], strict=True)),
    }
    words = [
        word for pair in given.items() if pair[1] != "" or pair[0] == "--prompt" for word in pair
    ]
    return main(["sample", str(parts / weights), *words])


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png"))]).astype(int)


def expected(padding: str, prompt: str = "a b", *, shift: float = 4.0) -> np.ndarray:
    """The same pictures step by step from the parts."""
    encoder = QwenEncoder(tiny_tokenizer(), tiny_text_encoder())
    text, valid = encoder.encode([prompt, prompt, ""])
    counts = {"text_valid": valid[:2], "null_valid": valid[2:]} if padding == "mask" else {}
    velocity = classifier_free(tiny_dit(), text[:2], text[2:], 2.0, **counts)
    noise = sample_noise([0, 1], (128, 4, 5), seed=0)
    latents = euler(velocity, noise, steps=3, shift=shift)
    images = Flux2Autoencoder(tiny_vae()).decode(latents).permute(0, 2, 3, 1)
    return ((images + 1) * 127.5).round().clamp(0, 255).int().numpy()


@pytest.mark.parametrize("padding", ["mask", "attend"])
def test_pictures_are_those_of_the_parts(parts, tmp_path, capsys, padding):
    out = tmp_path / "out"
    assert draw(parts, "--padding", padding, "--out", str(out)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "euler, 3 steps, guidance 2, shift 4 (the paper's): 6 passes of the network a picture",
        f"2 of 2 pictures are in {out}",
    ]
    assert pixels(out).shape == (2, 64, 80, 3)
    assert abs(pixels(out) - expected(padding)).max() <= 1  # a value may lie between two levels
    assert np.ptp(pixels(out)) > 20
    record = json.loads((out / "metadata.jsonl").read_text().splitlines()[1])
    assert record["padding"] == padding
    assert record["resolution"] == [64, 80]
    assert record["weights"] == str(parts / "model.pt")


def test_the_two_paddings_differ(parts):
    assert abs(expected("mask") - expected("attend")).max() > 1


def test_a_pipeline_brings_its_own_parts(parts, tmp_path):
    own = ["--vae", "", "--text-encoder", "", "--num-heads", ""]
    assert draw(parts, *own, "--out", str(tmp_path / "out"), weights="pipeline") == 0
    assert abs(pixels(tmp_path / "out") - expected("mask")).max() <= 1


def test_its_shift_is_that_of_the_scheduler(parts, tmp_path):
    pipeline = Path(shutil.copytree(parts / "pipeline", tmp_path / "pipeline"))
    config = pipeline / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 1.0}))
    own = ["--vae", "", "--text-encoder", "", "--num-heads", "", "--out", str(tmp_path / "out")]
    assert draw(tmp_path, *own, weights="pipeline") == 0
    assert abs(pixels(tmp_path / "out") - expected("mask", shift=1.0)).max() <= 1
    assert abs(expected("mask", shift=1.0) - expected("mask")).max() > 1


@pytest.mark.parametrize("damaged", ["{", "[]", '{"shift": "three"}', '{"shift": 0}'])
def test_a_scheduler_that_cannot_be_read_is_said(parts, tmp_path, capsys, damaged):
    pipeline = Path(shutil.copytree(parts / "pipeline", tmp_path / "pipeline"))
    (pipeline / "scheduler" / "scheduler_config.json").write_text(damaged)
    own = ["--vae", "", "--text-encoder", "", "--num-heads", "", "--out", str(tmp_path / "out")]
    assert draw(tmp_path, *own, weights="pipeline") == 2
    assert "scheduler_config.json: has no shift that can be used" in capsys.readouterr().err


def test_a_given_picture_goes_through_the_autoencoder(parts, tmp_path):
    """A latent is 16 pixels a side; where a pixel of it is to be drawn, it is."""
    levels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "given.png")
    mask = np.zeros((64, 80), dtype=np.uint8)
    mask[20, 40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    vae = Flux2Autoencoder(tiny_vae())
    pixels_in = torch.from_numpy(levels / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    picture = vae.encode(pixels_in)[0]
    known = torch.ones(4, 5, dtype=torch.bool)
    known[1, 2] = False

    encoder = QwenEncoder(tiny_tokenizer(), tiny_text_encoder())
    text, valid = encoder.encode(["a b", "a b", ""])
    counts = {"text_valid": valid[:2], "null_valid": valid[2:]}
    velocity = classifier_free(tiny_dit(), text[:2], text[2:], 2.0, **counts)
    for name, edit in (
        ("weak", Edit(picture=picture, strength=0.3)),
        ("mask", Edit(picture=picture, known=known)),
    ):
        noise = sample_noise([0, 1], (128, 4, 5), seed=0)
        latents = sample_edit(euler, velocity, noise, edit, steps=3, shift=4.0)
        images = vae.decode(latents).permute(0, 2, 3, 1)
        drawn = ((images + 1) * 127.5).round().clamp(0, 255).int().numpy()
        options = {
            "weak": ["--strength", "0.3"],
            "mask": ["--mask", str(tmp_path / "mask.png")],
        }[name]
        out = ["--image", str(tmp_path / "given.png"), "--out", str(tmp_path / name)]
        assert draw(parts, *out, *options) == 0
        assert abs(pixels(tmp_path / name) - drawn).max() <= 1


def test_without_out_pictures_go_to_samples_here(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw(parts, "--num-images", "1") == 0
    assert (tmp_path / "samples" / "model_a-b_seed0" / "00000.png").exists()


def test_an_empty_prompt_is_drawn_and_an_overlong_one_says_what_is_cut(parts, tmp_path, capsys):
    assert draw(parts, "--out", str(tmp_path / "a"), prompt="") == 0
    assert abs(pixels(tmp_path / "a") - expected("mask", "")).max() <= 1
    assert draw(parts, "--out", str(tmp_path / "b"), prompt="c" * 300) == 0
    assert "300 tokens; the last 44 are cut, 256 are read\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "250"], "resolution=250: 250 is not a multiple of 16"),
        (["--resolution", "64x70"], "70 is not a multiple of 16, the pixels of a token"),
        (["--resolution", "large"], "resolution=large: give a side as 256"),
        (["--resolution", "0"], "resolution=0: 0 is not a multiple of 16"),
        (["--vae", ""], "draws latents of 128 channels; give --vae"),
        (["--text-encoder", ""], "of a training elsewhere: give its --text-encoder"),
        (["--vae", "no/such/folder"], "vae='no/such/folder': neither a folder nor a hub id"),
        (["--num-heads", "3"], "num_heads=3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(parts, tmp_path, capsys, options, message):
    assert draw(parts, "--out", str(tmp_path / "out"), *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("mvsplit: ")
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_parts_of_another_training_are_refused(parts, tmp_path, capsys):
    write_weights(tiny_dit(text_width=16), tmp_path / "narrow.safetensors")
    write_weights(tiny_dit(channels=64), tmp_path / "few.safetensors")
    for name, message in (
        ("narrow", "states have width 24, "),
        ("few", "its latents have 128 channels, those of "),
    ):
        shutil.copytree(parts / "vae", tmp_path / "vae", dirs_exist_ok=True)
        shutil.copytree(parts / "qwen", tmp_path / "qwen", dirs_exist_ok=True)
        assert draw(tmp_path, weights=f"{name}.safetensors") == 2
        assert message in capsys.readouterr().err


def test_weights_that_are_not_there_or_broken_are_one_line(parts, tmp_path, capsys):
    assert draw(parts, weights="none.safetensors") == 2
    assert "there is no file" in capsys.readouterr().err
    broken = tiny_dit()
    broken.head.weight.data[0, 0] = torch.nan
    write_weights(broken, tmp_path / "nan.pt")
    assert draw(parts, weights=str(tmp_path / "nan.pt")) == 2
    assert "final_proj.weight holds values that are not finite" in capsys.readouterr().err


def test_a_run_takes_no_options_of_weights(tmp_path, capsys):
    train(runs.experiment(steps=1), tmp_path / "run")
    assert main(["sample", str(tmp_path / "run"), "--prompt", "seven", "--resolution", "64"]) == 2
    assert "resolution=64: a run has its own" in capsys.readouterr().err
