"""The public ops: fused Triton kernels on CUDA, the readable reference everywhere else.

Nothing is replaced in silence: `backend(x)` says what an input runs on, and each choice made for a
CUDA tensor is logged once, as a warning where it is the slow one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.kernels import reference
from mvsplit.kernels.reference import Gain
from mvsplit.kernels.segments import Segments

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_WIDTH = 8192  # the widest row that one block holds
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked for, not imported

_logger = logging.getLogger(__name__)
_forced: str | None = None


def backend(x: Tensor, row: int | None = None) -> str:
    """What an op runs on for an input like `x` [..., D]: "triton" or "reference".

    Args:
        row: values that one block of the op has to hold; D, as for a norm, if None.
    """
    if _forced is not None:
        return _forced
    if not x.is_cuda:
        return "reference"
    obstacle = _obstacle(x, x.shape[-1] if row is None else row)
    if not torch.compiler.is_compiling():
        _log(obstacle)
    return "reference" if obstacle else "triton"


def _obstacle(x: Tensor, row: int) -> str | None:
    """Why the fused kernels cannot take a CUDA tensor, if so."""
    if not HAS_TRITON:
        return "Triton is not installed (it comes with CUDA builds of torch)"
    if x.dtype not in FUSED_DTYPES:
        return f"the fused kernels take fp32, bf16 and fp16, not {x.dtype}"
    if row > FUSED_WIDTH:
        return f"the fused kernels take widths up to {FUSED_WIDTH}, not {row}"
    return None


@cache
def _log(obstacle: str | None) -> None:
    if obstacle is None:
        _logger.info("ops on CUDA: fused Triton kernels")
    else:
        _logger.warning("ops on CUDA: the slow reference, because %s", obstacle)


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on "triton" or "reference", whatever the input.

    Raises:
        UserError: the name is neither. Triton on a CPU tensor raises torch's NotImplementedError,
            unless Triton was imported under TRITON_INTERPRET=1.
    """
    global _forced
    if name not in ("triton", "reference"):
        raise UserError(f'forced_backend({name!r}): choose "triton" or "reference"')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def split_merge(
    x: Tensor,
    f: Tensor,
    beta: Gain,
    alpha: Gain,
    leak: Gain | None = None,
    segments: Segments | None = None,
    eps: float = 1e-5,
    norm: bool = True,
) -> Tensor:
    if segments is not None and not isinstance(segments, Segments):
        raise UserError(f"segments={segments!r}: give Segments({segments!r})")
    if backend(x) == "reference":
        return reference.split_merge(x, f, beta, alpha, leak, segments, eps, norm)
    from mvsplit.kernels.fused.scaled_merge import scaled_merge
    from mvsplit.kernels.fused.split_merge import split_merge as fused

    segments = Segments.whole(x) if segments is None else segments
    if needs_no_mean(beta, alpha, leak):
        return scaled_merge(x, f, beta, segments, eps, norm)
    return fused(x, f, beta, alpha, leak, segments, eps, norm)


def needs_no_mean(beta: Gain, alpha: Gain, leak: Gain | None) -> bool:
    """β = α and λ = 0, known without looking into tensors."""
    if leak is None or isinstance(leak, Tensor) or leak != 0:
        return False
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return alpha is beta
    return alpha == beta


def rms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    if backend(x) == "reference":
        return reference.rms_norm(x, eps)
    from mvsplit.kernels.fused.scaled_merge import scaled_merge

    rows = x.reshape(1, -1, x.shape[-1])
    return scaled_merge(rows, None, 1.0, Segments.whole(rows), eps, norm=True).view(x.shape)


def qk_norm_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    if backend(qkv, qkv.shape[-1] // (heads + 2 * kv_heads)) == "reference":
        return reference.qk_norm_rope(qkv, cos, sin, heads, kv_heads, eps)
    from mvsplit.kernels.fused.qk_norm_rope import qk_norm_rope as fused

    return fused(qkv, cos, sin, heads, kv_heads, eps)


def swiglu(packed: Tensor) -> Tensor:
    if backend(packed, row=1) == "reference":  # a block takes as much of a row as it can hold
        return reference.swiglu(packed)
    from mvsplit.kernels.fused.swiglu import swiglu as fused

    return fused(packed)


for _op in (split_merge, rms_norm, qk_norm_rope, swiglu):
    _op.__doc__ = getattr(reference, _op.__name__).__doc__
