"""Drawn pictures stay on the disk: a drawing that was cut off goes on to the same pictures."""

import pytest
import torch
from PIL import Image

from mvsplit.data import Digits, WordEmbedder
from mvsplit.errors import UserError
from mvsplit.evaluation.drawn import DrawnPictures, draw_missing, png_batches
from mvsplit.models import DiT, DiTConfig
from mvsplit.sampling import SamplingConfig

PROMPTS = [Digits.vocabulary[k % 10] for k in range(11)]


@pytest.fixture(scope="module")
def model():
    config = DiTConfig(depth=1, width=16, heads=1, ffn_width=32, channels=1, patch=2, text_width=16)
    network = DiT(config, torch.Generator().manual_seed(0))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return network.requires_grad_(False).eval()


def draw(folder, model, decode=lambda latents: latents, prompts=PROMPTS, steps=None):
    config = SamplingConfig(steps=3, shift=1.0, batch_size=4)
    embedder = WordEmbedder(Digits.vocabulary, 16, max_tokens=1)
    told = steps if steps is not None else []
    draw_missing(
        folder, model, embedder, prompts, (1, 8, 8), config, decode,
        on_step=lambda *, pictures: told.append(pictures),
    )  # fmt: skip


def test_it_goes_on_where_it_was_cut_off(model, tmp_path):
    whole = DrawnPictures(tmp_path / "whole", {"seed": 0})
    draw(whole, model)
    cut, batches = DrawnPictures(tmp_path / "cut", {"seed": 0}), []

    def interrupted(latents):
        batches.append(len(latents))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return latents

    with pytest.raises(KeyboardInterrupt):
        draw(cut, model, interrupted)
    assert cut.done == 4
    again, steps = DrawnPictures(tmp_path / "cut", {"seed": 0}), []
    draw(again, model, steps=steps)
    assert sum(steps) == 3 * 7
    assert again.done == whole.done == len(PROMPTS)
    assert torch.equal(again.read(11), whole.read(11))
    draw(again, model, steps=steps)
    assert sum(steps) == 3 * 7


def test_a_gap_is_filled(model, tmp_path):
    folder = DrawnPictures(tmp_path, {})
    draw(folder, model)
    before = folder.read(11)
    folder.path(5).unlink()
    assert folder.done == 5
    draw(folder, model)
    assert torch.equal(folder.read(11), before)


def test_another_recipe_is_refused_and_named(tmp_path):
    DrawnPictures(tmp_path, {"steps": 35, "guidance_interval": (0.0, 1.0)})
    DrawnPictures(tmp_path, {"steps": 35, "guidance_interval": (0.0, 1.0)})
    with pytest.raises(UserError, match="steps: 35 there, 25 now"):
        DrawnPictures(tmp_path, {"steps": 25, "guidance_interval": (0.0, 1.0)})
    with pytest.raises(UserError, match="seed: None there, 1 now"):
        DrawnPictures(tmp_path, {"steps": 35, "guidance_interval": (0.0, 1.0), "seed": 1})
    DrawnPictures(tmp_path / "hashed", {"weights": 64 * "a"})
    with pytest.raises(
        UserError, match=r"weights: a{12} there, b{12} now\); choose another --name"
    ):
        DrawnPictures(tmp_path / "hashed", {"weights": 64 * "b"})


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_rounded_cut_and_kept_in_their_size(channels, tmp_path):
    folder = DrawnPictures(tmp_path, {})
    pictures = torch.rand(5, channels, 6, 9, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    folder.add([0, 1, 2, 3, 4], pictures)
    assert Image.open(folder.path(3)).size == (9, 6)
    levels = (pictures.clamp(-1, 1).double() + 1) / 2 * 255
    read = (folder.read(5).double() + 1) / 2 * 255
    assert (read - levels).abs().max() <= 0.5 + 1e-4
    batches = list(png_batches(folder.paths(5), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches).double(), read.round().expand(-1, 3, -1, -1))
