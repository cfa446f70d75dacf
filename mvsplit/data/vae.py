"""The FLUX.2 autoencoder as the released model sees it (paper §3); needs the extra `hub`.

Pictures [B, 3, H, W] in [−1, 1] ↔ latents [B, C, h, w], C = 4·c and h = H/16 with the autoencoder's
c = 32 channels at 1/8 of the resolution: 2×2 patches of these become channels, ordered (c, pi, pj),
and are normalised with the running statistics that the autoencoder's own BatchNorm holds.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.data.hub_access import hub_options, unreached
from mvsplit.errors import UserError, needs_extra

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2


class Flux2Autoencoder:
    """Encodes and decodes with the autoencoder it is given, without gradients.

    Args:
        vae: of diffusers, on the device and in the dtype in which it is to run; statistics are
            applied in fp32.
    """

    def __init__(self, vae: AutoencoderKLFlux2) -> None:
        self.vae = vae

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Flux2Autoencoder:
        """The autoencoder in a folder or of a hub id, or in the `vae` folder of a pipeline there.

        Raises:
            UserError: the extra `hub` is not installed; there is no such autoencoder.
        """
        with needs_extra("hub"):
            from diffusers import AutoencoderKLFlux2
        try:
            where = hub_options(source)
            if not _is_autoencoder(AutoencoderKLFlux2, source, where):
                where |= {"subfolder": "vae"}
            vae = AutoencoderKLFlux2.from_pretrained(source, torch_dtype=dtype, **where)
        except (OSError, ValueError) as error:
            raise UserError(
                f"vae={source!r}: neither a folder nor a hub id with the weights of an "
                f"AutoencoderKLFlux2 ({_first_line(error)}){unreached(source)}"
            ) from error
        return cls(vae.to(device).eval().requires_grad_(False))

    @property
    def channels(self) -> int:
        """C of the latents."""
        return 4 * self.vae.config.latent_channels

    @property
    def multiple(self) -> int:
        """Pixels a latent: of which both sides of a picture must be a multiple."""
        return 2 ** len(self.vae.config.block_out_channels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] fp32, the mode of the posterior, of [B, 3, H, W].

        Raises:
            UserError: sides that are no multiple of `multiple`.
        """
        height, width = images.shape[2:]
        if height % self.multiple or width % self.multiple:
            raise UserError(
                f"pictures of {height}×{width} pixels: both sides must be multiples of "
                f"{self.multiple}"
            )
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        return self.normalise(functional.pixel_unshuffle(posterior.mode().float(), 2))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] fp32, about in [−1, 1], of normalised latents [B, C, h, w]."""
        grid = functional.pixel_shuffle(self.denormalise(latents.float()), 2)
        return self.vae.decode(grid.to(self.vae.dtype)).sample.float()

    def normalise(self, latents: Tensor) -> Tensor:
        """(z − mean)/√(var + ε) by channel. [B, C, h, w]."""
        mean, deviation = self._statistics(latents.device)
        return (latents - mean) / deviation

    def denormalise(self, latents: Tensor) -> Tensor:
        """z·√(var + ε) + mean by channel, the inverse of `normalise`. [B, C, h, w]."""
        mean, deviation = self._statistics(latents.device)
        return latents * deviation + mean

    def fingerprint(self) -> str:
        """Changes where any latent would: a hash of every weight and statistic."""
        return f"flux2:{hash_of(self.vae)}"

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, [1, C, 1, 1] in fp32."""
        norm = self.vae.bn
        variance = norm.running_var.to(device).float() + self.vae.config.batch_norm_eps
        mean = norm.running_mean.to(device).float()
        return mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def hash_of(module: torch.nn.Module) -> str:
    """SHA-256 of a module's names, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_autoencoder(kind: type[AutoencoderKLFlux2], source: str, options: dict[str, Any]) -> bool:
    """Whether there is a configuration at `source` itself, and not in its folder `vae`."""
    try:
        return kind.load_config(source, **options).get("_class_name") == kind.__name__
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
