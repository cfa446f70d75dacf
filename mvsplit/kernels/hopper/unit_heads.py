"""Attention of heads of unit RMS in a training step on Hopper: attention_three.cu, which leaves the
log-sum-exp, and attention_backward.cu, which makes the gradients from it, of queries and keys, or
of what they were before they were turned and normalised.

Shapes: B samples, H heads, T tokens, K = 128 head width.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.hopper import attention
from mvsplit.kernels.hopper.attention import HEAD, SCALE, Heads
from mvsplit.kernels.hopper.driver import Kernel, compiled
from mvsplit.kernels.hopper.wgmma import multiply

# Of a sample; two matrices of so many rows are in shared memory, and for each warpgroup 64 of two.
MOST_ROWS = 320
_FOLDER = Path(__file__).parent
_CUT = Heads(3)
_GROUPS, _TILE = 2, 64  # of backward: warpgroups of a block, rows of each
_MOST = 96  # keys of the gradients of queries at a time; more were not tried
# Queries of the gradients of keys at a time, one of which divides T: with 64, a thread has 254
# registers (ptxas 13.0) of the 255 that there are.
_AT_A_TIME = (64, 48, 32)


class _Rows(ctypes.Structure):
    _fields_ = (
        ("p", ctypes.c_void_p), ("sample", ctypes.c_longlong), ("head", ctypes.c_longlong),
        ("token", ctypes.c_longlong),
    )  # fmt: skip


class _Turn(ctypes.Structure):
    _fields_ = (
        ("r", ctypes.c_void_p), ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p),
        ("cos_token", ctypes.c_int), ("sin_token", ctypes.c_int),
    )  # fmt: skip


_NOT_TURNED = _Turn()


def obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels do not take such inputs, if so."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it needs a Hopper GPU"
    rows = q.shape[2]
    alike = all((t.dtype, t.shape) == (torch.bfloat16, q.shape) for t in (q, k, v))
    if not alike or q.shape[-1] != HEAD:
        return f"it takes bf16 heads of {HEAD}, as many of keys and values as of queries"
    if not takes_rows(rows):
        return f"it takes up to {MOST_ROWS} tokens, a multiple of 32 or 48, not {rows}"
    if not all(_is_aligned(t) for t in (q, k, v)):
        return "it takes rows at multiples of 16 bytes"
    return None


def takes_rows(rows: int) -> bool:
    """Whether samples of so many rows fit."""
    return rows <= MOST_ROWS and any(rows % n == 0 for n in _AT_A_TIME)


def forward_source(rows: int, masked: bool) -> str:
    """The CUDA C++ of forward for samples of `rows` rows."""
    return attention.source(_CUT, rows, masked, trap=True)


def _is_aligned(x: Tensor) -> bool:
    strides = x.stride()[:3]
    whole = all(s > 0 and s % 8 == 0 for s in strides)
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and whole


def forward(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ/√K)V over the first `counts` keys, and the natural log-sum-exp of the scores.

    Args:
        q, k, v: [B, H, T, K]; rows of q and k of at most the norm √K.
        counts: [B] int32; None: all keys are real.

    Returns:
        The output [B, H, T, K], tokens before heads in memory, and [B, H, T, 1] fp32, dense. Rows
        of padding hold values without meaning.
    """
    batch, heads, rows, _ = q.shape
    out = _empty(q)
    lse = torch.empty(batch, heads, rows, 1, dtype=torch.float32, device=q.device)
    flat, masked = out.transpose(1, 2).flatten(-2).flatten(0, 1), counts is not None
    layout = (0, 0, 0) if masked else (rows, 0, rows)
    attention.launch(q, k, v, flat, lse, counts, layout, _CUT, masked)
    return out, lse


def _empty(like: Tensor) -> Tensor:
    """[B, H, T, K], tokens before heads in memory."""
    batch, heads, rows, width = like.shape
    return like.new_empty(batch, rows, heads, width).transpose(1, 2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [B, H, T, K], tokens before heads in memory, from that of the output
    and what `forward` gave. Rows of padding have to be zero in k, v and `grad`: what their
    queries would add to the gradients of real keys and values is not left out. Their own gradients
    have no meaning. Results are deterministic."""
    found = _empty(q), _empty(q), _empty(q)
    _launch_backward(grad, q, k, v, out, lse, found, None)
    return found


def takes_turn(r: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `backward_of_projection` takes such numbers: fp32, rows dense and of whole pairs."""
    tables = all(
        t.stride(-1) == 1 and t.stride(0) % 2 == 0 and t.data_ptr() % 8 == 0 for t in (cos, sin)
    )
    return tables and r.is_contiguous() and all(t.dtype == torch.float32 for t in (r, cos, sin))


def backward_of_projection(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, r: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensor:  # fmt: skip
    """As `backward`, but the gradient of the projection that `fused/qk_norm_rope.py` made q, k and
    v from, [B, T, 3H·K]. Gradients of q and k are not rounded on the way.

    Args:
        r: [B, T, 2H], 1/RMS of the queries' and the keys' heads.
        cos, sin: of the rotation before the norm, [T, K/2]; see `takes_turn`.
    """
    batch, heads, rows, width = q.shape
    packed = q.new_empty(batch, rows, 3 * heads * width)
    found = packed.unflatten(-1, (3 * heads, width)).transpose(1, 2).split(heads, 1)
    strides = (cos.stride(0), sin.stride(0))
    turn = _Turn(r.data_ptr(), cos.data_ptr(), sin.data_ptr(), *strides)
    _launch_backward(grad, q, k, v, out, lse, found, turn)
    return packed


def _launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    found: tuple[Tensor, ...], turn: _Turn | None,
) -> None:  # fmt: skip
    batch, heads, rows, _ = q.shape
    grad = grad if _is_aligned(grad) else grad.clone(memory_format=torch.contiguous_format)
    at = keys_at(rows)
    tensors = (q, k, v, grad)
    _kernel(rows, turn is not None, q.device.index or 0).launch(
        2 * batch * heads,
        (
            *(attention.box(t, _TILE) for t in tensors), *(attention.box(t, at) for t in tensors),
            _rows(out), lse, *map(_rows, found), turn or _NOT_TURNED, ctypes.c_int(heads),
            ctypes.c_int(batch * heads), ctypes.c_float(SCALE),
        ),
        pdl=False,
    )  # fmt: skip


def _rows(x: Tensor) -> _Rows:
    size = x.element_size()
    return _Rows(x.data_ptr(), *(size * x.stride(i) for i in (0, 1, 2)))


def keys_at(rows: int) -> int:
    """Queries that the gradients of keys take at a time, and rows of a bulk copy."""
    return next(n for n in _AT_A_TIME if rows % n == 0)


def source(rows: int, turned: bool = False) -> str:
    """The CUDA C++ of backward for samples of `rows` rows, or, `turned`, of
    `backward_of_projection`."""
    at = keys_at(rows)
    queries_at = 2 * at if rows % (2 * at) == 0 and 2 * at <= _MOST else at
    macros = {
        "TOK": rows, "BOX": at, "KEYS_AT": at, "QUERIES_AT": queries_at, "MASKED": 0, "TRAP": 1,
        "TURNED": int(turned), "TYPE": '"bf16"', "BF16": 1,
    }  # fmt: skip
    head = "".join(f"#define {key} {value}\n" for key, value in macros.items())
    files = ("base.cu", "common.cu", "heads.cu", "attention_backward.cu")
    *common, kernel = ((_FOLDER / file).read_text() for file in files)
    products = [multiply("multiply", n, "bf16") for n in sorted({at, queries_at})]
    products.append(multiply("weigh", HEAD, "bf16", registers=True, transposed=True))
    return "\n".join((head, *common, *products, kernel))


def compile_all(rows: int, masked: bool, *, gradients: bool, turned: bool) -> None:
    """Compiles the kernels of forward and, with `gradients`, of backward or, `turned`, of
    `backward_of_projection`, so that their first launch need not.

    Raises:
        DriverError: one does not compile.
    """
    backward = [source(rows, turned)] if gradients else []
    for text in (forward_source(rows, masked), *backward):
        compiled(text, cache_folder() / "cuda")


def shared_bytes(rows: int) -> int:
    """Of a block of backward."""
    tiles = 2 * _GROUPS * _TILE
    numbers = max(rows, 32 * _GROUPS)
    return 2 * HEAD * (2 * rows + tiles) + 8 * (numbers + rows // keys_at(rows) + _GROUPS)


@cache
def _kernel(rows: int, turned: bool, device: int) -> Kernel:
    binary = compiled(source(rows, turned), cache_folder() / "cuda")
    threads, shared = 128 * _GROUPS, shared_bytes(rows)
    return Kernel(
        binary, "attention_backward", threads=threads, shared=shared, cluster=1, device=device
    )
