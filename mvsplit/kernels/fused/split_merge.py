"""Split-merge with means: Z = X + β⊙PF + α⊙JF − λ⊙JX, then RMSNorm (paper Eq. 7–8, 49–54).

The registered ops. Several forms compute them, each deterministic; which one serves depends on the
sizes, the GPU and what was found on the machine (`form_of`), and is logged once for each shape.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mvsplit.kernels.fused import merge_two_launches, merge_waiting
from mvsplit.kernels.fused.common import differentiate, register, unit_stride
from mvsplit.kernels.fused.merge_parts import Gradients, Merged, gradients, merged, weights
from mvsplit.kernels.hopper import merge as clusters
from mvsplit.kernels.hopper import merge_choice
from mvsplit.kernels.reference import Gain
from mvsplit.kernels.segments import Segments

_logger = logging.getLogger(__name__)
FORMS: dict[str, ModuleType] = {
    "clusters": clusters,
    "two launches": merge_two_launches,
    "waiting": merge_waiting,
}


def form_of(direction: str, x: Tensor, *rest: Any) -> tuple[str, str]:
    """Which of FORMS serves for `x` [B, T, D], X or the upstream gradient, and why: by what was
    fastest on an H200; no other GPU was measured. `rest`: as of `merge_choice.obstacle`."""
    obstacle = merge_choice.obstacle(direction, x, *rest)
    if obstacle is None:
        return "clusters", "each tensor is read once"
    if x.is_cuda and 2 * x.numel() * x.element_size() <= _l2_bytes(x.device):
        return "two launches", f"the L2 cache holds two such tensors; {obstacle}"
    return "waiting", obstacle


@cache
def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def _form(direction: str, x: Tensor, *rest: Any) -> ModuleType:
    name, why = form_of(direction, x, *rest)
    if x.is_cuda:
        _log(direction, tuple(x.shape), x.dtype, name, why)
    return FORMS[name]


@cache
def _log(direction: str, shape: tuple[int, ...], dtype: torch.dtype, name: str, why: str) -> None:
    _logger.info("merge with means, %s of %s %s: %s (%s)", direction, list(shape), dtype, name, why)


def _launch_forward(
    x: Tensor, f: Tensor, beta: Tensor | None, alpha: Tensor | None, leak: Tensor | None,
    values: list[float], tied: bool, valid: Tensor | None, lengths: list[int], eps: float,
    norm: bool,
) -> Merged:  # fmt: skip
    gains = weights(beta, alpha, leak, values, tied)
    out = merged(x, len(lengths), gains.leaks, norm)
    if x.numel():
        x, f = unit_stride(x), unit_stride(f)
        form = _form("forward", x, f, out, gains, valid, lengths)
        form.forward(x, f, out, gains, valid, lengths, eps)
    return out


def _fake_forward(x: Tensor, f: Tensor, *rest: Any) -> Merged:
    _, _, _, _, _, _, lengths, _, norm = rest
    return merged(x, len(lengths), weights(*rest[:5]).leaks, norm)


def _launch_backward(
    grad: Tensor, y: Tensor | None, f: Tensor | None, r: Tensor, mean_f: Tensor, mean_x: Tensor,
    beta: Tensor | None, alpha: Tensor | None, leak: Tensor | None, values: list[float],
    tied: bool, valid: Tensor | None, lengths: list[int],
) -> Gradients:  # fmt: skip
    out = gradients(grad, (beta, alpha, leak), f is not None)
    if grad.numel() == 0:
        for of_gain in out[2:]:
            of_gain.zero_()
        return out
    found = Merged(grad if y is None else y.contiguous(), r, mean_f, mean_x)
    grad, f = unit_stride(grad), None if f is None else unit_stride(f)
    gains = weights(beta, alpha, leak, values, tied)
    form = _form("backward", grad, f, found, gains, valid, lengths)
    form.backward(grad, f, found, out, gains, valid, lengths)
    return out


_GAINS = "Tensor? beta, Tensor? alpha, Tensor? leak, float[] values, bool tied"
_SEGMENTS = "Tensor? valid, SymInt[] lengths"
_forward_op = register(
    f"split_merge(Tensor x, Tensor f, {_GAINS}, {_SEGMENTS}, float eps, bool norm)"
    " -> (Tensor y, Tensor r, Tensor mean_f, Tensor mean_x)",
    _launch_forward,
    _fake_forward,
)
_backward_op = register(
    "split_merge_backward(Tensor grad, Tensor? y, Tensor? f, Tensor r, Tensor mean_f,"
    f" Tensor mean_x, {_GAINS}, {_SEGMENTS})"
    " -> (Tensor dx, Tensor df, Tensor dbeta, Tensor dalpha, Tensor dleak)",
    _launch_backward,
    lambda grad, y, f, *rest: gradients(grad, rest[3:6], f is not None),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, f, beta, alpha, leak, values, tied, valid, lengths, _, norm = inputs
    y, r, mean_f, mean_x = output
    learns = any(ctx.needs_input_grad[2:5])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        y if norm else None, f if learns else None, r, mean_f, mean_x, beta, alpha, leak, valid
    )
    ctx.settings = values, tied, lengths


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    y, f, r, mean_f, mean_x, beta, alpha, leak, valid = ctx.saved_tensors
    values, tied, lengths = ctx.settings
    dx, df, *per_gain = _backward_op(
        grad, y, f, r, mean_f, mean_x, beta, alpha, leak, values, tied, valid, lengths
    )
    gains = [
        g.sum_to_size(gain.shape) if needed else None
        for g, gain, needed in zip(
            per_gain, (beta, alpha, leak), ctx.needs_input_grad[2:5], strict=True
        )
    ]
    return dx, df, *gains, *(None,) * 6


differentiate(_forward_op, _backward, _setup_context)


def split_merge(
    x: Tensor, f: Tensor, beta: Gain, alpha: Gain, leak: Gain | None, segments: Segments,
    eps: float, norm: bool,
) -> Tensor:  # fmt: skip
    """`mvsplit.kernels.reference.split_merge` by fused kernels; same arguments and result."""
    segments.check(x, f)
    numbers = [0.0 if g is None or isinstance(g, Tensor) else float(g) for g in (beta, alpha, leak)]
    tensors = [g if isinstance(g, Tensor) else None for g in (beta, alpha, leak)]
    valid = None if segments.valid is None else segments.valid.contiguous()
    settings = valid, list(segments.lengths), eps, norm
    return _forward_op(x, f.to(x.dtype), *tensors, numbers, leak is None, *settings)[0]
