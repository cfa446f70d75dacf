"""Attention where padding is no key, in ways that do not add a mask to the scores, and attention of
heads that are normalised.

**In sequences.** Where the real tokens of each sample come first, the padded batch is, without a
byte moved, a packed batch of twice as many sequences: the real tokens of a sample, its padding, and
so on. Flash attention for sequences of unequal lengths takes that as it is, and real tokens never
see padding. Padding attends to itself. (cuDNN's cannot be captured in a CUDA graph.)

**Zero keys.** A padded key that is zero scores 0 for every query and so adds exp(0) = 1 to the sum
Z that its softmax divides by; a padded value that is zero adds nothing else. So with m padded keys

    out = out₀ · Z/(Z − m),   ln(Z − m) = ln Z + log1p(−m/Z)                                   (1)

are the output and the log-sum-exp over the real keys alone, and from these two the backward of any
flash attention gives the exact gradients of q and of the real keys and values: it recomputes
exp(score − lse), and a zero key passes nothing to q. Rows whose Z is nearly all m are computed anew
(`kernels/fused/zero_keys.py`). It serves where padded rows of k and v are zero, as they are behind
a projection without bias, for padding leaves every merge as zero; and where no score is far below
zero, for backward sees exp(−lse) at zero keys: heads of unit RMS have none below −√K.

**Unit heads.** Queries and keys of unit RMS have no score above √K. So a kernel of ours sums the
exponentials as they come, in which it leaves padding out (`kernels/fused/unit_attention.py`), and
backward is cuDNN's, from its log-sum-exp. It serves where padded rows of k and v are zero, and
without padding too. On Hopper there is another such kernel for short samples, in CUDA C++, and one
that makes the gradients (`kernels/hopper/unit_heads.py`).

All call PyTorch's operators beneath `scaled_dot_product_attention`, which does not offer them. So
before one of them serves on a machine, it is compared there with attention in fp32, and with how
far a mask is from that (`off_by`).

Shapes: B batch, H heads, T tokens, K head width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from mvsplit.kernels.segments import Segments

_logger = logging.getLogger(__name__)
_aten = torch.ops.aten
_DRAWS = 3
_AT_A_TIME = 4  # samples in fp32
_AWAY = 3.0  # the scores of one head are about −9, where the real keys have no share in Z


class Obstacle(NamedTuple):
    """Why kernels do not serve; whether that holds for later processes too."""

    reason: str
    lasting: bool


class NotComparedError(RuntimeError):
    """Kernels could not be compared this time: that they did not serve says nothing of them."""


def in_sequences(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention over the real tokens; q, k, v [B, H, T, K], as many key heads as heads.

    Raises:
        RuntimeError: flash attention does not take such inputs, or real tokens do not come first.
    """
    bounds = segments.sequence_bounds()
    if bounds is None:
        raise RuntimeError("a segment before the last may have padding")
    _check(q, k, v, can_use_flash_attention)
    return _InSequences.apply(q, k, v, bounds, q.shape[2])


def with_zero_keys(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same where padded rows of k and v are zero and scores are above −80. Gradients of these
    rows have no meaning.

    Raises:
        RuntimeError: cuDNN does not take such inputs.
    """
    padding = segments.padding()
    assert padding is not None
    _check(q, k, v, can_use_cudnn_attention)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _ZeroKeys.apply(q, k, v, segments.mask, padding)


def with_unit_heads(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, tile: str = "64 queries"
) -> Tensor:
    """The same where heads of q and k have unit RMS and padded rows of k and v are zero.

    Args:
        tile: one of `unit_attention.TILES`.

    Raises:
        RuntimeError: cuDNN or the kernel does not take such inputs.
    """
    _check(q, k, v, can_use_cudnn_attention)
    _require_narrow(q)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _UnitHeads.apply(q, k, v, segments.mask, tile)


def with_unit_heads_in_cuda(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, gradients: bool
) -> Tensor:
    """The same by kernels in CUDA C++ on Hopper; if `gradients`, backward too, else cuDNN's.

    Raises:
        NotComparedError: whether the kernels are right here could not be found out this time.
        RuntimeError: the kernels or cuDNN do not take such inputs, or are not right here.
    """
    if found := obstacle_in_cuda(q, k, v, segments, gradients):
        raise (RuntimeError if found.lasting else NotComparedError)(found.reason)
    if not gradients:
        _check(q, k, v, can_use_cudnn_attention)
        return by_unit_heads_in_cuda(q, k, v, segments, gradients=False)
    turns = q.requires_grad and turns_back(q)
    return _InCuda.apply(q, k, v, segments.first_tokens(), True, turns)


def turns_back(q: Tensor) -> bool:
    """Whether the kernel of the gradients may go on to the projection that was turned and
    normalised; it is compared and timed first, where it was not yet."""
    from mvsplit.kernels.hopper import unit_heads_choice

    kind = unit_heads_choice.Class(q.shape[2], masked=False, gradients=True, turned=True)
    found = unit_heads_choice.obstacle(kind, q.device)
    _say(q.shape[2], q.device, "in the same kernel" if found is None else found.reason)
    return found is None


@cache
def _say(tokens: int, device: torch.device, words: str) -> None:
    """Once."""
    _logger.info(
        "from attention of %d tokens on to the projection on %s: %s", tokens, device, words
    )


def gradient_of_projection(
    out: Tensor, grad: Tensor, r: Tensor, cos: Tensor, sin: Tensor
) -> Tensor | None:
    """The gradient of the projection [B, T, 3H·K] that `qk_norm_rope` made q, k and v from, from
    that of the output of `attend` [B, H, T, K], in one kernel; None where none serves that can.

    Args:
        out: with its graph, which stays.
        r, cos, sin: as `unit_heads.backward_of_projection` has them.
    """
    from mvsplit.kernels.hopper import unit_heads

    node: Any = out.grad_fn
    if not getattr(node, "turns", False) or not unit_heads.takes_turn(r, cos, sin):
        return None
    q, k, v, result, lse = node.saved_tensors
    return unit_heads.backward_of_projection(grad, q, k, v, result, lse, r, cos, sin)


def obstacle_in_cuda(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, gradients: bool
) -> Obstacle | None:
    """Why these kernels do not serve, if so; they are compared first, where they were not yet."""
    from mvsplit.kernels.hopper import unit_heads, unit_heads_choice

    masked = segments.mask is not None
    if masked and not segments.real_first:
        return Obstacle("a segment before the last may have padding", True)
    if reason := unit_heads.obstacle(q, k, v):
        return Obstacle(reason, True)
    kind = unit_heads_choice.Class(q.shape[2], masked, gradients)
    return unit_heads_choice.untrusted(kind, q.device)


def by_unit_heads_in_cuda(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, gradients: bool
) -> Tensor:
    """As `with_unit_heads_in_cuda`, whose kernels take such inputs."""
    return _InCuda.apply(q, k, v, segments.first_tokens(), gradients, False)


def _check(q: Tensor, k: Tensor, v: Tensor, takes: Callable[..., bool]) -> None:
    """Raises RuntimeError for inputs that a library does not take, which PyTorch asks above the
    operators that are called here."""
    _require_half(q)
    if q.shape[1] != k.shape[1]:
        raise RuntimeError("fewer key heads than heads")
    if q.is_cuda and not takes(SDPAParams(q, k, v, None, 0.0, False, False), False):
        raise RuntimeError(f"the library does not take {list(q.shape)}")


def _require_half(q: Tensor) -> None:
    """cuDNN's operator reads the bytes of fp32 as those of fp16, and returns NaN."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"it takes bf16 and fp16, not {q.dtype}")


def _require_narrow(q: Tensor) -> None:
    """fp16 does not hold e^√K, and wide heads do not stay in registers."""
    from mvsplit.kernels.fused.unit_attention import WIDEST

    if q.dtype != torch.bfloat16 or q.shape[-1] > WIDEST:
        raise RuntimeError(f"it takes bf16 and heads up to {WIDEST}, not {q.dtype} {q.shape[-1]}")


def _packed(x: Tensor) -> Tensor:
    """[B, H, T, K] → [B·T, H, K], a view where tokens lie one behind the other."""
    return x.transpose(1, 2).flatten(0, 1)


def _unpacked(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def off_by(
    way: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    known: Callable[..., Tensor],
) -> float:
    """How many times as far as `known` a way is off: ‖found − right‖/‖right‖ over the real rows of
    a head of a sample, of the sample in which it is largest; of the head, and of the output or, if
    `q` asks for any, the gradient, in which the ratio is largest. Right is softmax in fp32.
    Infinite where something is not finite.

    Numbers are drawn, in the shapes, dtypes and strides of q, k, v: those of a network that learns
    may have gradients of which rounding leaves nothing, by whatever way. Queries and keys of the
    last head point away from each other. Drawn several times, for threads that do not wait for each
    other are not wrong every time.

    Args:
        known: attention that is right but for rounding; takes what `way` takes.

    Raises:
        RuntimeError: `way` does not take such inputs.
    """
    mask = segments.mask
    if mask is None:
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    drawn = [_draw(q, k, v, mask, seed) for seed in range(_DRAWS)]
    ours = [_with_gradients(way, given, q.requires_grad, segments) for given in drawn]
    right = [_right(given, q.requires_grad, mask) for given in drawn]
    theirs = [_with_gradients(known, given, q.requires_grad, segments) for given in drawn]
    found, least = (
        torch.stack([_distances(*pair, mask) for pair in zip(of, right, strict=True)])
        for of in (ours, theirs)
    )
    ratios = found.amax(0) / least.amax(0).clamp(min=torch.finfo(torch.float32).eps)
    return float(ratios.max()) if ratios.isfinite().all() else math.inf


def _draw(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, seed: int) -> list[Tensor]:
    """Inputs and the gradient of the output."""
    chance = torch.Generator(q.device).manual_seed(seed)
    with torch.no_grad():
        drawn = [
            torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device=t.device
            ).normal_(generator=chance)
            for t in (q, k, v)
        ]  # fmt: skip
        drawn.append(torch.empty_like(q).normal_(generator=chance))  # dense, as attention's output
        for t, sign in ((drawn[0], 1), (drawn[1], -1)):
            t[:, -1] = t[:, -1] / 4 + sign * _AWAY / t.shape[-1] ** 0.25
        return [t.mul_(mask[:, None, :, None]) for t in drawn]


def _right(drawn: list[Tensor], learns: bool, mask: Tensor) -> list[Tensor]:
    """Output and gradients in fp32, a few samples at a time."""
    parts = [
        _with_gradients(_in_fp32, [t[i : i + _AT_A_TIME].float() for t in drawn], learns,
                        mask[i : i + _AT_A_TIME])
        for i in range(0, len(mask), _AT_A_TIME)
    ]  # fmt: skip
    return [torch.cat(t) for t in zip(*parts, strict=True)]


def _distances(found: list[Tensor], right: list[Tensor], mask: Tensor) -> Tensor:
    """Of each output and head, in the sample in which it is largest. [outputs, H]"""
    padding = ~mask[:, None, :, None]
    rows = []
    for ours, theirs in zip(found, right, strict=True):
        wanted = theirs.masked_fill(padding, 0).flatten(2).norm(dim=-1)
        difference = (ours.float() - theirs).masked_fill(padding, 0).flatten(2).norm(dim=-1)
        rows.append(torch.where(difference == 0, 0, difference / wanted).amax(0))
    return torch.stack(rows)


def _with_gradients(
    way: Callable[..., Tensor], drawn: list[Tensor], learns: bool, padding: Segments | Tensor
) -> list[Tensor]:
    *inputs, grad = drawn
    inputs = [t.detach().requires_grad_(learns) for t in inputs]
    # Neither autocast nor the hooks of others, such as activation checkpointing, have a part in it.
    off = torch.autocast(grad.device.type, enabled=False)
    with torch.enable_grad(), off, saved_tensors_hooks(_same, _same):
        out = way(*inputs, padding)
        return [out.detach(), *(torch.autograd.grad(out, inputs, grad) if learns else ())]


def _same(x: Tensor) -> Tensor:
    return x


def _in_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1) @ v


class _InSequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        inputs = [_packed(t) for t in (q, k, v)]
        out, lse, seed, unused, _ = _aten._flash_attention_forward(
            *inputs, bounds, bounds, longest, longest, 0.0, False, False
        )
        ctx.save_for_backward(*inputs, out, lse, bounds, seed, unused)
        ctx.batch, ctx.longest = q.shape[0], longest
        return _unpacked(out, q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bounds, seed, unused = ctx.saved_tensors
        grads = _aten._flash_attention_backward(
            _packed(grad), q, k, v, out, lse, bounds, bounds, ctx.longest, ctx.longest, 0.0, False,
            seed, unused,
        )  # fmt: skip
        return *(_unpacked(g, ctx.batch) for g in grads), None, None


class _UnitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tile: str
    ) -> Tensor:
        from mvsplit.kernels.fused.unit_attention import TILES, unit_attention

        out, lse = unit_attention(q, k, v, mask, TILES[tile])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        chance = torch.empty((), dtype=torch.int64, device=q.device)  # not read without dropout
        return *_cudnn_backward(grad, q, k, v, out, lse, chance, chance), None, None


class _InCuda(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None, gradients: bool,
        turns: bool,
    ) -> Tensor:  # fmt: skip
        from mvsplit.kernels.hopper import unit_heads

        out, lse = unit_heads.forward(q, k, v, counts)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.gradients, ctx.turns = gradients, turns
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from mvsplit.kernels.hopper import unit_heads

        q, k, v, out, lse = ctx.saved_tensors
        if ctx.gradients:
            return *unit_heads.backward(grad, q, k, v, out, lse), None, None, None
        chance = torch.empty((), dtype=torch.int64, device=q.device)  # not read without dropout
        return *_cudnn_backward(grad, q, k, v, out, lse, chance, chance), None, None, None


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *chance: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v by cuDNN, from the output and the log-sum-exp; no dropout."""
    sizes = (q.shape[2], k.shape[2])
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, *chance, None, None, None, *sizes, 0.0, False
    )


class _ZeroKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        from mvsplit.kernels.fused.zero_keys import leave_out_zero_keys_

        found = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
        out = found[0]
        lse = leave_out_zero_keys_(out, found[1], q, k, v, mask, padding)
        ctx.save_for_backward(q, k, v, out, lse, *found[6:8])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_cudnn_backward(grad, *ctx.saved_tensors), None, None
