"""Attention by measurement: PyTorch's own kernels, tried once for each shape on the GPU in hand.

Which of them is fastest depends on the GPU, the shape and whether padding is masked; on an H200
cuDNN's is 1.4–1.8 times faster than the one that PyTorch takes by itself. So the candidates run a
few times forward and backward on the first tensors of a shape, and the fastest serves from then on,
in later processes too (`choices`). The choice is logged. With padding there are more of them
(`masked_attention`), for a mask is slow; what these give is checked first. On a CPU there is
nothing to choose.

Shapes: B batch, H heads, G key/value heads, T tokens, K head width.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import handle_torch_function, has_torch_function_unary

from mvsplit.kernels.capture import milliseconds
from mvsplit.kernels.choices import recall, remember
from mvsplit.kernels.dispatch import HAS_TRITON
from mvsplit.kernels.masked_attention import (
    NotComparedError,
    in_sequences,
    obstacle_in_cuda,
    off_by,
    with_unit_heads,
    with_unit_heads_in_cuda,
    with_zero_keys,
)
from mvsplit.kernels.segments import Segments

_logger = logging.getLogger(__name__)
# Of `off_by`. A way that is right differs from another by its roundings: an output that is rounded
# twice is √2 times as far off; 1.25 … 1.46 were found on an H200, of zero keys and of the library's
# own.
AGREEMENT = 2.0

Way = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
_HOPPER = Path(__file__).parent / "hopper"
# What is compiled for unit heads in CUDA C++, and what cuts it.
_SOURCES = ("base.cu", "common.cu", "heads.cu", "attention_three.cu", "attention_backward.cu",
            "attention.py", "unit_heads.py", "wgmma.py")  # fmt: skip
# (B, H, G, T, K), dtype, what is known of padding and whether sums are made in a fixed order,
# differentiated, device index
_Key = tuple[tuple[int, ...], torch.dtype, str, bool, int]


def _by_library(
    backend: SDPBackend | list[SDPBackend], q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> Tensor:
    """PyTorch's own, with a mask where there is padding."""
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=segments.key_bias(q), enable_gqa=grouped
        )


_LIBRARIES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ANY: Way = partial(_by_library, list(_LIBRARIES.values()))
_WAYS: dict[str, Way] = {name: partial(_by_library, b) for name, b in _LIBRARIES.items()}
_SEQUENCES: dict[str, Way] = {"flash in sequences": in_sequences}
_ZERO_KEYS: dict[str, Way] = {"cudnn with zero keys": with_zero_keys} if HAS_TRITON else {}
_TILES = ("128 queries", "64 queries", "64 queries, 32 keys")  # of `unit_attention`
_UNIT_HEADS: dict[str, Way] = {
    f"unit heads, {tile}": partial(with_unit_heads, tile=tile) for tile in _TILES if HAS_TRITON
}
_IN_CUDA: dict[str, partial[Tensor]] = {  # whether the gradients are by such a kernel too
    f"unit heads in CUDA C++, gradients by {which}": partial(with_unit_heads_in_cuda, gradients=own)
    for which, own in (("it", True), ("cudnn", False))
    if HAS_TRITON
}
_ALL_WAYS = _SEQUENCES | _ZERO_KEYS | _UNIT_HEADS | _IN_CUDA | _WAYS
_chosen: dict[_Key, Way] = {}


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, zero_padding: bool = False
) -> Tensor:
    """softmax(QKᵀ/√K)V over all real tokens; padding is no key.

    Args:
        q: [B, H, T, K].
        k, v: [B, G, T, K] with H a multiple of G.
        segments: of the T tokens; their mask says which are real.
        zero_padding: a promise that padded rows of k and v are zero, and that heads of q and k have
            unit RMS.

    Returns:
        [B, H, T, K]; rows of padding hold values without meaning, and so do their gradients. The
        gradient of the output has to be zero there, or those of real keys and values depend on
        which way serves.

    On a GPU some ways are no call of PyTorch's attention: a `TorchFunctionMode` that listens for
    such calls is shown one of this function there, whichever way serves.
    """
    if not q.is_cuda or torch.compiler.is_compiling():
        grouped, mask = q.shape[1] != k.shape[1], attention_mask(segments)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    if has_torch_function_unary(q):
        padding = {"zero_padding": zero_padding}
        return handle_torch_function(attend, (q,), q, k, v, segments, **padding)
    return _choose(q, k, v, segments, zero_padding)(q, k, v, segments)


def attention_mask(segments: Segments) -> Tensor | None:
    """[B, 1, 1, T], true for the keys that count, as `scaled_dot_product_attention` takes it; None
    where all do."""
    return None if segments.mask is None else segments.mask[:, None, None, :]


def attention_backend(
    q: Tensor, k: Tensor, segments: Segments, *, zero_padding: bool = False
) -> str | None:
    """The name of the way that inputs like these have been given; None as long as none has."""
    found = _chosen.get(_key(q, k, segments, zero_padding))
    return None if found is None else _name_of(found)


def backends_so_far() -> list[str]:
    """The names of all ways that inputs have been given in this process, each once."""
    return sorted({_name_of(way) for way in _chosen.values()})


def _name_of(way: Way) -> str:
    return next(name for name, known in _ALL_WAYS.items() if known is way)


def ways(segments: Segments, zero_padding: bool = False) -> dict[str, Way]:
    """What may serve, by name; with padding, those first that need no mask."""
    unit = _UNIT_HEADS | _IN_CUDA if zero_padding else {}
    if segments.mask is None:
        return unit | _WAYS
    first = _SEQUENCES if segments.real_first else {}
    return first | (_ZERO_KEYS if zero_padding else {}) | unit | _WAYS


def _key(q: Tensor, k: Tensor, segments: Segments, zero_padding: bool) -> _Key:
    shape = (*q.shape[:2], k.shape[1], *q.shape[2:])
    padding = "none"
    if segments.mask is not None:
        padding = "last" if segments.real_first else "anywhere"
    padding += ", zero" if zero_padding else ""
    padding += "; deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    return shape, q.dtype, padding, q.requires_grad, q.device.index or 0


def _choose(q: Tensor, k: Tensor, v: Tensor, segments: Segments, zero_padding: bool) -> Way:
    """The way for these inputs; PyTorch's own choice where nothing has been chosen and a capture
    forbids to measure."""
    key = _key(q, k, segments, zero_padding)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return _ANY
        candidates = ways(segments, zero_padding)
        found = recall("attention", _name(key))
        if found not in candidates or _refused(found, q, k, v, segments):
            found, lasting = _fastest(q, k, v, segments, candidates)
            if lasting:
                remember("attention", _name(key), found)
        _chosen[key] = candidates[found]
    return _chosen[key]


def _refused(name: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> bool:
    """Whether a way that was chosen once is not trusted any more."""
    way = _IN_CUDA.get(name)
    return way is not None and bool(obstacle_in_cuda(q, k, v, segments, **way.keywords))


@cache
def _kernels() -> str:
    """A digest of those in CUDA C++: a choice among others says nothing of these."""
    files = [(_HOPPER / name).read_bytes() for name in _SOURCES]
    return hashlib.sha256(b"\0".join(files)).hexdigest()[:16]


def _name(key: _Key) -> str:
    """The key of a choice on the disk: what it depends on, versions included."""
    shape, dtype, padding, differentiated, device = key
    gpu = torch.cuda.get_device_name(device)
    parts = (gpu, torch.__version__, list(shape), dtype, f"{padding=}", f"{differentiated=}")
    return "; ".join(map(str, (*parts, f"unit heads tried, {_kernels()}")))


def _fastest(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, candidates: dict[str, Way]
) -> tuple[str, bool]:
    """Times every candidate that takes these inputs, and says in the log what was found. The choice
    is not a lasting one if memory was too short to try all, or one could not be compared."""
    times: dict[str, float] = {}
    refused: dict[str, Exception] = {}
    for name, way in candidates.items():
        if name == "math" and times:
            break  # the last resort
        try:
            with warnings.catch_warnings():  # of the kernels that do not take these inputs
                warnings.simplefilter("ignore", UserWarning)
                if name not in _WAYS:
                    _require_right(name, way, q, k, v, segments)
                times[name] = milliseconds(_trial(q, k, v, segments, way))
        except Exception as error:  # it does not take such inputs, or its kernels do not compile
            _logger.debug("attention %s: %s", name, error)
            refused[name] = error
    torch.cuda.empty_cache()  # activations are to come, and would leave holes in what is cached
    if not times:
        raise RuntimeError(f"no attention kernel takes {list(q.shape)} {q.dtype}: {refused}")
    best = min(times, key=lambda name: times[name])
    shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    masked = "masked" if segments.mask is not None else "unmasked"
    _logger.info("attention %s %s on %s: %s (%s)", list(q.shape), masked, q.device, best, shown)
    for_now = (torch.OutOfMemoryError, NotComparedError)
    return best, not any(isinstance(error, for_now) for error in refused.values())


def _require_right(
    name: str, way: Way, q: Tensor, k: Tensor, v: Tensor, segments: Segments
) -> None:
    """Raises RuntimeError, and says so, where a way gives something else than attention."""
    if not (times := off_by(way, q, k, v, segments, _ANY)) < AGREEMENT:
        _logger.warning("attention by %s is off %.1f times as far as by a mask", name, times)
        raise RuntimeError(f"off {times:.1f} times as far as a mask")


def _trial(q: Tensor, k: Tensor, v: Tensor, segments: Segments, way: Way) -> Callable[[], object]:
    q, k, v = (t.detach().requires_grad_(q.requires_grad) for t in (q, k, v))

    def once() -> object:
        # Nobody else's hooks, such as those of activation checkpointing, may see the trial.
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            out = way(q, k, v, segments)
            return torch.autograd.grad(out, (q, k, v), out) if q.requires_grad else out

    return once


def _same(x: Tensor) -> Tensor:
    return x
