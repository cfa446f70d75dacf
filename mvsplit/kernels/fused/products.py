"""Products of a block and what follows them, without autograd, for code that writes its own
backward.

Where kernels for Hopper are right and faster (`hopper/block_product_choice.py`), what follows is
part of the product; else a library multiplies and a fused op follows. Both round (gate, value)
before H is made of it, so that whoever computes it again from what was kept finds the same H, or,
where one way served forward and the other backward, one that differs by a last bit in places. The
gradient of H, and queries and keys before they are turned, are rounded by a library, and not always
by the kernel, in which they are never written.

Shapes: B batch, T tokens, D width, H heads, K head width, F hidden width of the FFN.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import linear

from mvsplit.kernels.fused import qk_norm_rope, swiglu
from mvsplit.kernels.hopper import block_product, block_product_choice
from mvsplit.kernels.hopper.block_product import DOWN, HEAD, HEADS, UP, Cut, Turns

_logger = logging.getLogger(__name__)
_Key = tuple[int, torch.Size, torch.Size, torch.dtype, torch.device]
_ways: dict[_Key, Cut | str] = {}


def ways_so_far() -> list[str]:
    """What served for which shapes in this process, and why not the kernel for Hopper."""
    return [f"{_shown(key)}: {_words(found)}" for key, found in _ways.items()]


def project(y: Tensor, w13: Tensor, *, hidden: bool) -> tuple[Tensor, Tensor | None]:
    """(gate, value) = Y·W13ᵀ [B, T, 2F] and, if it is wanted, H = silu(gate)⊙value [B, T, F].

    Args:
        y: [B, T, D].
        w13: [2F, D], gates first, of the same precision.
    """
    rows = y.flatten(0, 1)
    cut = _serving(UP, rows, w13)
    if cut is not None:
        packed, found = block_product.up(rows, w13, hidden=hidden, cut=cut)
        shape = y.shape[:2]
        return packed.unflatten(0, shape), None if found is None else found.unflatten(0, shape)
    product = linear(y, w13)
    return product, swiglu.swiglu(product) if hidden else None


def project_backward(df: Tensor, w2: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of F = H·W2ᵀ that of (gate, value) [B, T, 2F] and, again, H [B, T, F].

    Args:
        df: [B, T, D].
        w2: [D, F].
        packed: (gate, value) [B, T, 2F].
    """
    rows, kept = df.flatten(0, 1), packed.flatten(0, 1)
    cut = _serving(DOWN, rows, w2, kept)
    if cut is not None:
        grad, hidden = block_product.down(rows, w2, kept, cut=cut)
        return grad.view_as(packed), hidden.unflatten(0, packed.shape[:2])
    return swiglu.swiglu_backward(df @ w2, packed)


def heads(
    x: Tensor, w_qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads of X·W_QKVᵀ, queries and keys turned, then normalised.

    Args:
        x: [B, T, D].
        w_qkv: [3H·K, D], rows of queries, then keys, then values.
        cos, sin: [T, K/2].
        n_heads: H.
        eps: ε of the norm.

    Returns:
        q, k, v [B, H, T, K], tokens before heads in memory, side by side, and the 1/RMS
        [B, T, 2H] that `qk_norm_rope._backward_op` needs.
    """
    rows, cut, shape = x.flatten(0, 1), None, (x.shape[1], HEAD // 2)
    tables = all(
        t.shape == shape and t.dtype == torch.float32 and t.is_contiguous() for t in (cos, sin)
    )
    if tables and w_qkv.shape[0] == 3 * n_heads * HEAD:
        cut = _serving(HEADS, rows, w_qkv)
    if cut is None:
        qkv = linear(x, w_qkv)
        return qk_norm_rope.qk_norm_rope_(qkv, cos, sin, n_heads, n_heads, eps)
    qkv, r = block_product.heads(rows, w_qkv, Turns(cos, sin, 2 * n_heads, eps), cut=cut)
    q, k, v = qkv.view(*x.shape[:2], 3, n_heads, HEAD).permute(2, 0, 3, 1, 4)
    return q, k, v, r.unflatten(0, x.shape[:2])


def _serving(which: int, x: Tensor, w: Tensor, packed: Tensor | None = None) -> Cut | None:
    """How the kernel is cut, if it serves; said in the log for each shape, where that could be."""
    found = block_product_choice.serving(which, x, w, packed)
    key = (which, x.shape, w.shape, x.dtype, x.device)
    if _ways.get(key) != found:
        _ways[key] = found
        if x.is_cuda:
            _logger.info("%s: %s", _shown(key), _words(found))
    return found if isinstance(found, Cut) else None


def _words(found: Cut | str) -> str:
    return f"in one kernel, {found}" if isinstance(found, Cut) else f"by libraries, because {found}"


def _shown(key: _Key) -> str:
    which, rows, weight, dtype, device = key
    name = block_product_choice.NAMES[which]
    return f"{name} {list(rows)} × {list(weight)} {dtype} on {device}"
