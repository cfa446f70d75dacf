"""Classifier-free guidance: one velocity from a network with and without its text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.errors import UserError
from mvsplit.sampling.samplers import Velocity

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
EVERYWHERE = (0.0, 1.0)


def classifier_free(
    model: Network,
    text: Tensor,
    null_text: Tensor,
    scale: float,
    *,
    text_valid: Tensor | None = None,
    null_valid: Tensor | None = None,
    interval: tuple[float, float] = EVERYWHERE,
    rescale: float = 0.0,
) -> Velocity:
    """v = v_u + w·(v_c − v_u) (paper §5) with both halves in one call of the network.

    The shorter text is padded to the longer, and the padding is masked, so it has no influence.
    The network runs in the dtype of `text`; the two velocities are combined in fp32 or better.

    Args:
        model: network of (latents [B, C, H, W], text, text_valid), for example a `DiT`.
        text: the prompts, [B, T, Dc].
        null_text: the unconditional prompt, [1 or B, T', Dc].
        scale: w. 1 is no guidance: the network is called on the prompts alone.
        text_valid, null_valid: real tokens, [B] and [1 or B]; None: all tokens count.
        interval: guidance for low < t ≤ high only; at other times v = v_c and only the prompts are
            evaluated (Kynkäänniemi et al. 2024, arXiv 2404.07724). `EVERYWHERE` asks for no time.
        rescale: φ of `rescaled`; 0 leaves v as it is.

    Raises:
        UserError: `null_text` is neither one prompt nor as many as `text`.
    """
    batch = len(text)

    def conditional(z: Tensor, t: float) -> Tensor:
        return model(z.to(text.dtype), text, text_valid)

    if scale == 1:
        return conditional
    if len(null_text) not in (1, batch):
        raise UserError(
            f"null_text holds {len(null_text)} prompts for {batch} samples; give 1 or {batch}"
        )
    null_text = null_text.to(text).expand(batch, -1, -1)
    both, valid = _join(null_text, text, null_valid, text_valid)

    def guided(z: Tensor, t: float) -> Tensor:
        v = model(torch.cat((z, z)).to(both.dtype), both, valid).to(z.dtype)
        without, with_text = v.chunk(2)
        mixed = without + scale * (with_text - without)
        return rescaled(mixed, with_text, rescale) if rescale else mixed

    return lambda z, t: guided(z, t) if in_interval(t, interval) else conditional(z, t)


def in_interval(t: float, interval: tuple[float, float]) -> bool:
    """Whether low < t ≤ high; `EVERYWHERE` holds any t."""
    low, high = interval
    return interval == EVERYWHERE or low < t <= high


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """φ·v·σ(v_c)/σ(v) + (1 − φ)·v, with the standard deviation σ over a sample's values: guidance
    makes velocities too large, and pictures too bright (Lin et al. 2023, arXiv 2305.08891, §3.4).
    All [B, ...]; `share` is φ in [0, 1]."""
    sigmas = (v.flatten(1).std(1, unbiased=False) for v in (conditional, guided))
    target, given = (s.view(-1, *(1,) * (guided.ndim - 1)) for s in sigmas)
    return share * (guided * (target / given)) + (1 - share) * guided


def _join(
    first: Tensor, second: Tensor, first_valid: Tensor | None, second_valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Two batches of text as one [2B, max(T, T'), Dc], with a mask only where one is needed."""
    length = max(first.shape[1], second.shape[1])
    parts = ((first, first_valid), (second, second_valid))
    text = torch.cat([functional.pad(x, (0, 0, 0, length - x.shape[1])) for x, _ in parts])
    if first_valid is None and second_valid is None and first.shape[1] == second.shape[1]:
        return text, None
    return text, torch.cat([_counts(x, valid) for x, valid in parts])


def _counts(text: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.full((len(text),), text.shape[1], device=text.device)
    return valid.to(text.device).expand(len(text))
