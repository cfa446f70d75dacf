"""Attention by measurement: PyTorch's own kernels, tried once for each shape on the GPU in hand.

Which of them is fastest depends on the GPU, the shape and whether padding is masked; on an H200
cuDNN's is 1.4–1.8 times faster than the one that PyTorch takes by itself. So the candidates run a
few times forward and backward on the first tensors of a shape, and the fastest serves from then on,
in later processes too (`choices`). The choice is logged. On a CPU there is nothing to choose.

Shapes: B batch, H heads, G key/value heads, T tokens, K head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mvsplit.kernels.choices import recall, remember
from mvsplit.kernels.segments import Segments

_logger = logging.getLogger(__name__)
_CANDIDATES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_REPEATS = 20

# (B, H, G, T, K), dtype, masked, differentiated, device index
_Key = tuple[tuple[int, ...], torch.dtype, bool, bool, int]
_chosen: dict[_Key, SDPBackend] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(QKᵀ/√K)V over all real tokens; padding is no key.

    Args:
        q: [B, H, T, K].
        k, v: [B, G, T, K] with H a multiple of G.
        segments: of the T tokens; their mask says which are real.

    Returns:
        [B, H, T, K]; rows of padding hold values without meaning.
    """
    grouped = q.shape[1] != k.shape[1]
    if not q.is_cuda or torch.compiler.is_compiling():
        mask = None if segments.mask is None else segments.mask[:, None, None, :]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    mask = segments.key_bias(q)
    backend = _choose(q, k, v, mask)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def attention_backend(q: Tensor, k: Tensor, segments: Segments) -> str | None:
    """The name of the kernel that inputs like these have been given; None as long as none has."""
    found = _chosen.get(_key(q, k, segments.mask is not None))
    return None if found is None else next(n for n, b in _CANDIDATES.items() if b is found)


def _key(q: Tensor, k: Tensor, masked: bool) -> _Key:
    shape = (*q.shape[:2], k.shape[1], *q.shape[2:])
    return shape, q.dtype, masked, q.requires_grad, q.device.index or 0


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[SDPBackend]:
    """The kernel for these inputs; all of them, for PyTorch to choose from, where nothing has been
    chosen and a capture forbids to measure."""
    key = _key(q, k, mask is not None)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return list(_CANDIDATES.values())
        found = recall("attention", _name(key))
        if found not in _CANDIDATES:
            found, lasting = _fastest(q, k, v, mask)
            if lasting:
                remember("attention", _name(key), found)
        _chosen[key] = _CANDIDATES[found]
    return [_chosen[key]]


def _name(key: _Key) -> str:
    """The key of a choice on the disk: what it depends on, versions included."""
    shape, dtype, masked, differentiated, device = key
    gpu = torch.cuda.get_device_name(device)
    parts = (gpu, torch.__version__, list(shape), dtype, f"{masked=}", f"{differentiated=}")
    return "; ".join(map(str, parts))


def _fastest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[str, bool]:
    """Times every candidate that takes these inputs, and says in the log what was found. The choice
    is not a lasting one if memory was too short to try all."""
    times: dict[str, float] = {}
    refused: dict[str, RuntimeError] = {}
    for name, backend in _CANDIDATES.items():
        if name == "math" and times:
            break  # the last resort
        try:
            times[name] = _milliseconds(_trial(q, k, v, mask, backend))
        except RuntimeError as error:  # says that it does not take such inputs
            _logger.debug("attention %s: %s", name, error)
            refused[name] = error
    if not times:
        raise RuntimeError(f"no attention kernel takes {list(q.shape)} {q.dtype}: {refused}")
    best = min(times, key=lambda name: times[name])
    shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    masked = "masked" if mask is not None else "unmasked"
    _logger.info("attention %s %s on %s: %s (%s)", list(q.shape), masked, q.device, best, shown)
    return best, not any(isinstance(e, torch.OutOfMemoryError) for e in refused.values())


def _trial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: SDPBackend
) -> Callable[[], object]:
    q, k, v = (t.detach().requires_grad_(q.requires_grad) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]

    def once() -> object:
        # Nobody else's hooks, such as those of activation checkpointing, may see the trial.
        with torch.enable_grad(), saved_tensors_hooks(_same, _same), sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
            return torch.autograd.grad(out, (q, k, v), out) if q.requires_grad else out

    return once


def _same(x: Tensor) -> Tensor:
    return x


def _milliseconds(run: Callable[[], object]) -> float:
    """Of one run, by a CUDA graph of it: launching takes longer than these kernels do."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        graph.replay()
    end.record()
    end.synchronize()
    del kept
    return start.elapsed_time(end) / _REPEATS
