"""The backward of SwiGLU inside the product that its gradient comes from.

With ∂L/∂F of the FFN's output, δ = ∂L/∂F·W₂ is the gradient of the hidden units, of which only the
gradient of the packed projection is made. One kernel multiplies and, while another block of the
same processor multiplies, turns its tile of δ into that of both halves, and into the hidden units
that the gradient of W₂ needs: δ never goes to memory, and the pass over memory that stood behind
the product costs little more than the product.

It is a product of Triton's beside one of the library's, and which way is faster depends on the
machine and the shape. So both are timed on the first tensors of a shape, the fused one in several
tilings, and the fastest serves from then on, in later processes too (`choices`); what the fused
kernel gives is compared with the other way first.

Shapes: N rows (all leading axes), D width, F hidden width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvsplit.kernels.capture import milliseconds
from mvsplit.kernels.choices import recall, remember
from mvsplit.kernels.fused.swiglu import swiglu_backward

_logger = logging.getLogger(__name__)
_FEWEST_ROWS = 2048  # below, the library's products have the better tilings
_AGREEMENT = 1e-2  # ‖a − b‖/‖b‖; δ is rounded on one way only, by 2⁻⁹
_COMPARED = 300  # rows
_SEPARATE = "separate"


class Tile(NamedTuple):
    """Rows and columns of δ that a block computes, its step along D, its warps, and the steps that
    load at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return "×".join(map(str, self))


# The first two leave room for two blocks on a processor: one multiplies, one moves bytes.
TILES = (Tile(128, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3))


@triton.jit
def _store_gradients(
    grad, p_packed, p_dpacked, p_out, row, column, m, F: tl.constexpr
):  # fmt: skip
    """∂L/∂gate, ∂L/∂value and the hidden units of a tile [ROWS, COLUMNS], from δ in fp32."""
    p_packed += row * 2 * F + column
    p_dpacked += row * 2 * F + column
    gate = tl.load(p_packed, m, 0.0).to(tl.float32)
    value = tl.load(p_packed + F, m, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = grad * value * (sigmoid + silu * (1 - sigmoid))
    tl.store(p_dpacked, dgate.to(p_dpacked.dtype.element_ty), mask=m)
    tl.store(p_dpacked + F, (grad * silu).to(p_dpacked.dtype.element_ty), mask=m)
    tl.store(p_out + row * F + column, (silu * value).to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["n"])
def swiglu_product_bwd_kernel(
    grad, w, p_packed, p_dpacked, p_out, n,
    D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    n_columns: tl.constexpr = F // COLUMNS
    row = tl.program_id(0) // n_columns * ROWS
    column = tl.program_id(0) % n_columns * COLUMNS
    delta = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, D, DEPTH):
        b_grad = grad.load([row, k])
        b_w = w.load([k, column])
        delta = tl.dot(b_grad, b_w, delta, input_precision="ieee")
    # By quarters of its columns, so that registers hold what belongs to one of them.
    HALF: tl.constexpr = COLUMNS // 2
    QUARTER: tl.constexpr = COLUMNS // 4
    o_r = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_c = column + tl.arange(0, QUARTER)[None, :]
    m = (o_r < n) & (o_c < F)
    left, right = tl.split(tl.permute(tl.reshape(delta, (ROWS, 2, HALF)), (0, 2, 1)))
    d0, d1 = tl.split(tl.permute(tl.reshape(left, (ROWS, 2, QUARTER)), (0, 2, 1)))
    d2, d3 = tl.split(tl.permute(tl.reshape(right, (ROWS, 2, QUARTER)), (0, 2, 1)))
    _store_gradients(d0, p_packed, p_dpacked, p_out, o_r, o_c, m, F)
    _store_gradients(d1, p_packed, p_dpacked, p_out, o_r, o_c + QUARTER, m, F)
    _store_gradients(d2, p_packed, p_dpacked, p_out, o_r, o_c + HALF, m, F)
    _store_gradients(d3, p_packed, p_dpacked, p_out, o_r, o_c + HALF + QUARTER, m, F)


def fused(grad: Tensor, w2: Tensor, packed: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """`swiglu_backward(grad @ w2, packed)` in one kernel; of dense tensors, F a multiple of the
    tile's columns and D of its depth."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    width, hidden = w2.shape
    rows = grad.numel() // width
    dpacked, out = torch.empty_like(packed), grad.new_empty(*grad.shape[:-1], hidden)
    grid = (triton.cdiv(rows, tile.rows) * (hidden // tile.columns),)
    swiglu_product_bwd_kernel[grid](
        TensorDescriptor.from_tensor(grad.view(rows, width), [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w2, [tile.depth, tile.columns]),
        packed, dpacked, out, rows,
        D=width, F=hidden, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dpacked, out


def separate(grad: Tensor, w2: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a product of the library's and a pass over memory."""
    return swiglu_backward(grad @ w2, packed)


def swiglu_product_backward(grad: Tensor, w2: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients through W₂ and SwiGLU, by the faster way.

    Args:
        grad: ∂L/∂F of the FFN's output, [..., D].
        w2: [D, F].
        packed: the projection, [..., 2F], gates first.

    Returns:
        ∂L/∂packed [..., 2F] and the hidden units silu(gate)⊙value [..., F].
    """
    return _way(grad, w2, packed)(grad, w2, packed)


Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_chosen: dict[tuple[int, int, int, torch.dtype, torch.device], Way] = {}


def candidates(grad: Tensor, w2: Tensor, packed: Tensor) -> dict[str, Way]:
    """The fused ways that take these inputs, by name."""
    width, hidden = w2.shape
    half = grad.dtype in (torch.bfloat16, torch.float16)
    dense = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (grad, w2, packed))
    if not (half and dense and grad.numel() // width >= _FEWEST_ROWS):
        return {}
    if torch.cuda.get_device_capability(grad.device) != (9, 0):
        return {}
    fit = (t for t in TILES if hidden % t.columns == 0 and width % t.depth == 0)
    return {tile.name: partial(fused, tile=tile) for tile in fit}


def _way(grad: Tensor, w2: Tensor, packed: Tensor) -> Way:
    """What was chosen for such inputs; the separate way where nothing is, and a capture forbids to
    measure."""
    if not grad.is_cuda:
        return separate
    key = (*w2.shape, grad.numel() // grad.shape[-1], grad.dtype, grad.device)
    if key not in _chosen:
        found = candidates(grad, w2, packed)
        if found and torch.cuda.is_current_stream_capturing():
            return separate
        name = _choose(grad, w2, packed, found) if found else _SEPARATE
        _chosen[key] = found.get(name, separate)
    return _chosen[key]


def _choose(grad: Tensor, w2: Tensor, packed: Tensor, found: dict[str, Way]) -> str:
    """The name of the fastest that is right."""
    shape = (*grad.shape, w2.shape[1])
    gpu = torch.cuda.get_device_name(grad.device)
    kept = "; ".join(map(str, (gpu, torch.__version__, triton.__version__, shape, grad.dtype)))
    known = recall("swiglu_product", kept)
    if known == _SEPARATE or known in found:
        return known
    inputs = (_noise(grad), _noise(w2), packed)  # a fresh network has zeros
    times = {_SEPARATE: _time(separate, inputs)}
    lasting = True
    for name, way in found.items():
        try:
            off = _off_by(way, *inputs)
            if not off < _AGREEMENT:
                _logger.warning("SwiGLU's product backward %s is off by %.1e", name, off)
                continue
            times[name] = _time(way, inputs)
        except torch.OutOfMemoryError:
            lasting = False
            _logger.warning("SwiGLU's product backward %s: no memory to try it", name)
    best = min(times, key=lambda name: times[name])
    shown = ", ".join(f"{name} {1e3 * ms:.0f} µs" for name, ms in times.items())
    _logger.info("SwiGLU's product backward %s: %s (%s)", list(shape), best, shown)
    if lasting:
        remember("swiglu_product", kept, best)
    return best


def _noise(like: Tensor) -> Tensor:
    """Random numbers, of which nobody else's are drawn."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty_like(like).normal_(generator=generator)


def _time(way: Way, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Milliseconds."""
    return milliseconds(partial(way, *inputs))


def _off_by(way: Way, grad: Tensor, w2: Tensor, packed: Tensor) -> float:
    """The largest ‖found − wanted‖/‖wanted‖ of both results over the first and the last rows, where
    the other way gives `wanted`."""
    rows = [t.flatten(0, -2) for t in (grad, packed)]
    found = [t.flatten(0, -2) for t in way(grad, w2, packed)]
    errors = []
    for some in (slice(_COMPARED), slice(-_COMPARED, None)):
        wanted = separate(rows[0][some], w2, rows[1][some])
        for a, b in zip(found, wanted, strict=True):
            errors.append(float((a[some].float() - b.float()).norm() / b.float().norm()))
    return max(float("inf") if error != error else error for error in errors)
