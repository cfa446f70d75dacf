"""Classifier-free guidance: one velocity from a network with and without its text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.errors import UserError
from mvsplit.sampling.samplers import Velocity


def classifier_free(
    model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    text: Tensor,
    null_text: Tensor,
    scale: float,
    *,
    text_valid: Tensor | None = None,
    null_valid: Tensor | None = None,
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

    Raises:
        UserError: `null_text` is neither one prompt nor as many as `text`.
    """
    if scale == 1:
        return lambda z, t: model(z.to(text.dtype), text, text_valid)
    batch = len(text)
    if len(null_text) not in (1, batch):
        raise UserError(
            f"null_text holds {len(null_text)} prompts for {batch} samples; give 1 or {batch}"
        )
    null_text = null_text.to(text).expand(batch, -1, -1)
    both, valid = _join(null_text, text, null_valid, text_valid)

    def velocity(z: Tensor, t: float) -> Tensor:
        v = model(torch.cat((z, z)).to(both.dtype), both, valid).to(z.dtype)
        unconditional, conditional = v.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return velocity


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
