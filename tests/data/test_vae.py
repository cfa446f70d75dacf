"""The FLUX.2 autoencoder: its statistics, its channel order, and the way there and back."""

from __future__ import annotations

import pytest
import torch

from mvsplit.errors import UserError
from tests.hub.tiny import library, tiny_vae

library("diffusers")

from mvsplit.data.vae import Flux2Autoencoder  # noqa: E402


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1


def normalised_by_hand(vae, grid: torch.Tensor) -> torch.Tensor:
    """Every value on its own: channel c at (2i + pi, 2j + pj) → channel 4c + 2pi + pj at (i, j)."""
    b, channels, height, width = grid.shape
    out = torch.empty(b, 4 * channels, height // 2, width // 2, dtype=torch.float64)
    for c in range(channels):
        for pi in range(2):
            for pj in range(2):
                k = 4 * c + 2 * pi + pj
                mean, variance = vae.bn.running_mean[k].item(), vae.bn.running_var[k].item()
                out[:, k] = (grid[:, c, pi::2, pj::2].double() - mean) / (variance + 1e-4) ** 0.5
    return out


def test_latents_are_normalised_with_the_running_statistics_in_their_order(images):
    vae = tiny_vae()
    adapter = Flux2Autoencoder(vae)
    latents = adapter.encode(images)
    assert (adapter.channels, adapter.multiple) == (128, 16)
    expected = normalised_by_hand(vae, vae.encode(images).latent_dist.mode())
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_undoes_all_of_it(images):
    vae = tiny_vae()
    adapter = Flux2Autoencoder(vae)
    decoded = adapter.decode(adapter.encode(images))
    expected = vae.decode(vae.encode(images).latent_dist.mode()).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_statistics_are_applied_in_fp32_whatever_the_network_runs_in(images):
    low = tiny_vae().to(torch.bfloat16)
    grid = low.encode(images.bfloat16()).latent_dist.mode()
    latents = Flux2Autoencoder(low).encode(images)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(
        latents.double(), normalised_by_hand(low, grid), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_it_comes_back_from_its_own_format(tmp_path, images, subfolder):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / subfolder)
    back = Flux2Autoencoder.load(str(tmp_path))
    assert torch.equal(back.encode(images), Flux2Autoencoder(vae).encode(images))
    assert back.fingerprint() == Flux2Autoencoder(vae).fingerprint()


def test_the_fingerprint_knows_the_statistics():
    before, after = tiny_vae(), tiny_vae()
    after.bn.running_var[5] += 1e-3
    assert Flux2Autoencoder(before).fingerprint() != Flux2Autoencoder(after).fingerprint()


def test_a_size_that_does_not_divide_and_a_missing_autoencoder_are_one_line(tmp_path):
    with pytest.raises(UserError, match="32×40 pixels: both sides must be multiples of 16"):
        Flux2Autoencoder(tiny_vae()).encode(torch.zeros(1, 3, 32, 40))
    with pytest.raises(UserError, match=r"vae='.*nothing': neither a folder nor") as caught:
        Flux2Autoencoder.load(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
