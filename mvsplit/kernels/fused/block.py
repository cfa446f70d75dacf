"""A whole post-norm block as one autograd node on a GPU: deep training at the memory's limit.

Between matrix products stand the fused ops, or they are part of a product (`fused/products.py`),
and nothing else is launched. The node decides what a block keeps between its forward and its
backward (`Recompute`), writes the gradients of its matrices straight into the buffers of the
optimiser where those exist, and never builds a graph of its parts. It computes what the parts
compute one by one; `mvsplit.models.Block` says when it is used.

Kept per token, in bytes of bf16 at D = 1024, F = 3D (x and the output belong to the trunk, 2D each
of which one counts here):

| `Recompute` | kept | bytes | computed again |
|---|---|---|---|
| nothing | x, q, k, v, mixed, f, y, packed, f | 28 D | silu(gate)⊙value, inside its own backward |
| packed | the same without `packed` | 16 D | y·W13ᵀ |
| attention | x, y, f of the FFN | 6 D | the attention branch too |
| trunk | x, f of the FFN | 4 D | the first merge too |
| all | x | 2 D | everything but the last merge |

So a byte less costs more at each level: f of the FFN, of which only the gains' gradients have need,
is two large kernels.

Shapes: B batch, T tokens, D width, H heads, K head width, F hidden width of the FFN.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mvsplit.kernels.attention import attend
from mvsplit.kernels.block_parts import (
    RECOMPUTE,
    BlockSettings,
    BlockWeights,
    Recompute,
    has_gradient_hooks,
)
from mvsplit.kernels.fused import products, qk_norm_rope
from mvsplit.kernels.fused.merges import Merge, Statistics, merge_backward, merge_forward
from mvsplit.kernels.fused.verdicts import prepare
from mvsplit.kernels.masked_attention import gradient_of_projection
from mvsplit.kernels.reference import Gain, Gains


class _Attended(NamedTuple):
    """The attention branch: leaves q, k, v of a small graph that ends in `out` [B, H, T, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor  # 1/RMS of the heads of q and k
    out: Tensor
    f: Tensor  # [B, T, D]

    @property
    def mixed(self) -> Tensor:
        """The heads side by side, [B, T, D]."""
        return self.out.detach().transpose(1, 2).flatten(-2)


class _Kept(NamedTuple):
    """What lies between a block's forward and its backward; None is computed again."""

    attended: _Attended | None
    y: Tensor | None  # the trunk between the branches, [B, T, D]
    first: Statistics | None  # of the merge that made it
    packed: Tensor | None  # [B, T, 2F]
    f: Tensor | None  # output of the FFN, [B, T, D]
    second: Statistics


def _attention_branch(x: Tensor, weights: BlockWeights, s: BlockSettings) -> _Attended:
    q, k, v, r = products.heads(x, weights.qkv, s.cos, s.sin, s.heads, s.qk_eps)
    learns = not torch.is_inference_mode_enabled()  # where nothing can be differentiated
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_(learns) for t in (q, k, v))
        out = attend(q, k, v, s.segments, zero_padding=True)  # no bias: see `Attention`
    f = linear(out.detach().transpose(1, 2).flatten(-2), weights.proj)
    return _Attended(q, k, v, r, out, f)


def _ffn_branch(y: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
    """(gate, value) [B, T, 2F], and the branch's output [B, T, D]."""
    packed, hidden = products.project(y, weights.w13, hidden=True)
    assert hidden is not None
    return packed, linear(hidden, weights.w2)


def _forward(
    x: Tensor, weights: BlockWeights, merges: tuple[Merge, Merge], s: BlockSettings
) -> tuple[Tensor, _Kept]:
    attended = _attention_branch(x, weights, s)
    y, first = merge_forward(x, attended.f, merges[0])
    packed, f = _ffn_branch(y, weights)
    out, second = merge_forward(y, f, merges[1])
    return out, _Kept(attended, y, first, packed, f, second)


def _thinned(kept: _Kept, recompute: Recompute) -> _Kept:
    """Without what is to be computed again."""
    lacks = RECOMPUTE[: RECOMPUTE.index(recompute) + 1]
    return _Kept(
        None if "attention" in lacks else kept.attended,
        None if "trunk" in lacks else kept.y,
        None if "trunk" in lacks else kept.first,
        None if "packed" in lacks else kept.packed,
        None if "all" in lacks else kept.f,
        kept.second,
    )


def _completed(
    kept: _Kept, x: Tensor, weights: BlockWeights, merges: tuple[Merge, Merge], s: BlockSettings
) -> _Kept:
    """With everything that was not kept computed again, by the same operations."""
    attended, y, first, packed, f, second = kept
    if attended is None:
        attended = _attention_branch(x, weights, s)
    if y is None:
        y, first = merge_forward(x, attended.f, merges[0])
    if f is None and merges[1].learns:  # `packed` was not kept either
        packed, f = _ffn_branch(y, weights)
    elif packed is None:
        packed, _ = products.project(y, weights.w13, hidden=False)
    return _Kept(attended, y, first, packed, f, second)


def _add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a·b, of the products' own precision or, for an fp32 target, without rounding the
    product to it."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(target, a, b, target.dtype, out=target)
    else:
        target.addmm_(a.to(target.dtype), b.to(target.dtype))


def _weight_gradient(weight: Tensor, grad: Tensor, x: Tensor, adds: bool) -> Tensor | None:
    """∇W = Σ_t δ_t y_tᵀ (Eq. 5): added to what `weight.grad` holds, or returned. grad [B, T, E], x
    [B, T, D] → [E, D]."""
    if not weight.requires_grad:
        return None
    a, b = grad.flatten(0, 1).mT, x.flatten(0, 1)
    if adds and weight.grad is not None and not has_gradient_hooks(weight):
        _add_product(weight.grad, a, b)
        return None
    return (a @ b).to(weight.dtype)


def _gain_gradients(
    gains: tuple[Gain | None, ...], grads: tuple[Tensor | None, ...], adds: bool
) -> list[Tensor | None]:
    """The same for the gains: all of a block's are added in one launch. What is left for autograd
    is returned."""
    own = [
        (i, gain.grad)
        for i, gain in enumerate(gains)
        if adds
        and grads[i] is not None
        and isinstance(gain, Tensor)
        and gain.is_leaf
        and gain.grad is not None
        and not has_gradient_hooks(gain)
    ]
    if own:
        torch._foreach_add_([grad for _, grad in own], [cast(Tensor, grads[i]) for i, _ in own])
    added = {i for i, _ in own}
    return [None if i in added else grad for i, grad in enumerate(grads)]


def _add_input_gradient(trunk: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Adds the gradient through a matrix to the trunk's own, in place. [B, T, D]"""
    trunk.flatten(0, 1).addmm_(grad.flatten(0, 1), weight)
    return trunk


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: BlockWeights, settings: BlockSettings, *tensors: Any
    ) -> Tensor:
        merges = _merges(tensors[4:], settings)
        low, learns = _cast(weights, x), any(ctx.needs_input_grad)
        prepare(x, low, settings, learns=learns)
        out, kept = _forward(x, low, merges, settings)
        ctx.save_for_backward(x, out)
        ctx.inner = _thinned(kept, settings.recompute), weights, merges, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, out = ctx.saved_tensors
        if ctx.inner is None:
            raise RuntimeError("a block lets go of what it kept: backward runs only once")
        kept, weights, merges, s = ctx.inner
        ctx.inner = None  # so that what is used up is freed along the way
        low = _cast(weights, x)
        kept = _completed(kept, x, low, merges, s)
        grad, of_f, grad_w13, grad_w2 = _ffn_backward(grad, out, kept, weights, low, merges[1], s)
        kept = kept._replace(packed=None, f=None)
        grad, of_a, grad_qkv, grad_proj = _attention_backward(
            grad, x, kept, weights, low, merges[0], s
        )
        of_gains = _gain_gradients((*merges[0].gains, *merges[1].gains), (*of_a, *of_f), s.adds)
        return grad, None, None, grad_qkv, grad_proj, grad_w13, grad_w2, *of_gains


def _ffn_backward(
    grad: Tensor, out: Tensor, kept: _Kept, weights: BlockWeights, low: BlockWeights, merge: Merge,
    s: BlockSettings,
) -> tuple[Tensor, tuple[Any, ...], Tensor | None, Tensor | None]:  # fmt: skip
    """∂L/∂Y of the trunk between the branches; gradients of the gains, of W13 and of W2."""
    assert kept.packed is not None
    assert kept.y is not None
    of = merge_backward(grad, out, kept.f, kept.second, merge)
    grad_packed, hidden = products.project_backward(of.f, low.w2, kept.packed)
    grad_w2 = _weight_gradient(weights.w2, of.f, hidden, s.adds)
    grad_w13 = _weight_gradient(weights.w13, grad_packed, kept.y, s.adds)
    return _add_input_gradient(of.x, grad_packed, low.w13), of[2:], grad_w13, grad_w2


def _attention_backward(
    grad: Tensor, x: Tensor, kept: _Kept, weights: BlockWeights, low: BlockWeights, merge: Merge,
    s: BlockSettings,
) -> tuple[Tensor, tuple[Any, ...], Tensor | None, Tensor | None]:  # fmt: skip
    """∂L/∂X of the block's input; gradients of the gains, of W_QKV and of W_O."""
    assert kept.attended is not None
    assert kept.y is not None
    assert kept.first is not None
    q, k, v, r, out, f = kept.attended
    of = merge_backward(grad, kept.y, f, kept.first, merge)
    grad_proj = _weight_gradient(weights.proj, of.f, kept.attended.mixed, s.adds)
    upstream = (of.f @ low.proj).unflatten(-1, (s.heads, -1)).transpose(1, 2)
    grad_qkv = gradient_of_projection(out, upstream, r, s.cos, s.sin)
    if grad_qkv is None:
        with torch.enable_grad():
            grads = torch.autograd.grad(out, (q, k, v), upstream)
        grad_qkv = qk_norm_rope._backward_op(*grads, q.detach(), k.detach(), r, s.cos, s.sin)
    grad_w = _weight_gradient(weights.qkv, grad_qkv, x, s.adds)
    return _add_input_gradient(of.x, grad_qkv, low.qkv), of[2:], grad_w, grad_proj


def _cast(weights: BlockWeights, x: Tensor) -> BlockWeights:
    """The matrices in the trunk's precision. A copy lives as long as its block works: 0.02 ms a
    block at D = 1024 against keeping every layer's."""
    return BlockWeights(*(w.detach().to(x.dtype) for w in weights))


def _merges(gains: tuple[Any, ...], s: BlockSettings) -> tuple[Merge, Merge]:
    pairs = zip((Gains(*gains[:3]), Gains(*gains[3:])), s.eps, strict=True)
    first, second = (Merge(g, s.segments, eps) for g, eps in pairs)
    return first, second


def block(
    x: Tensor,
    weights: BlockWeights,
    attention_gains: Gains,
    ffn_gains: Gains,
    settings: BlockSettings,
) -> Tensor:
    """x ← merge(x, attention(x)), then x ← merge(x, FFN(x)), padding and all.

    Args:
        x: trunk [B, T, D] in bf16 or fp16 (fp32 under the interpreter).
        weights: in any precision; used in the trunk's.
        settings: see there; `adds` and `recompute` among them.
        attention_gains, ffn_gains: β, α, λ of the two merges.

    Returns:
        The next trunk [B, T, D].
    """
    return _Block.apply(x, weights, settings, *weights, *attention_gains, *ffn_gains)
