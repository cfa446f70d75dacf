"""Whether the merge in clusters serves: what it takes, and whether it is right on this machine.

Before a kernel serves on a machine, its results are compared with the reference in fp32 and with
themselves, in a process of its own, for a kernel that faults takes the GPU from its process. The
verdict is kept on the disk (merge.json, see `choices`): a run that goes on computes by the same
kernels. Any other word there than "right" keeps a kernel from serving.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mvsplit.kernels import reference
from mvsplit.kernels.fused.merge_parts import Merged, Weights, gradients, merged, weights
from mvsplit.kernels.hopper import child, merge
from mvsplit.kernels.segments import Segments

# B·T from which on clusters are the fastest, on an H200: a block of 8,320 gains 2.6 %, one of 4,608
# nothing that is told from noise, and at 2,560 they are slower.
FEWEST_TOKENS = 8192
AGREEMENT = 1e-2  # ‖found − wanted‖/‖wanted‖; bf16 rounds by 2⁻⁹, and at most 2e-3 was measured
PATIENCE = (
    120.0  # seconds for a comparison; compiling takes a few, the waits of kernels are bounded
)
_EPS = 1e-5


class Class(NamedTuple):
    """Merges that one kernel serves: dtype, segments, type of counts ("" without any), whether a
    segment is a long one, whether gains learn."""

    direction: str
    dtype: torch.dtype
    segments: int
    counts: str
    long: bool
    learns: bool


def obstacle(
    direction: str, x: Tensor, f: Tensor | None, found: Merged, gains: Weights,
    valid: Tensor | None, lengths: list[int],
) -> str | None:  # fmt: skip
    """Why clusters do not serve, if so.

    Args:
        direction: "forward" or "backward".
        x: [B, T, D], X or the upstream gradient.
        f: [B, T, D]; None where no gain learns.
        found: the results of the forward, filled or not.
    """
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return "clusters need a Hopper GPU"
    if x.dtype not in merge.NAMES or x.shape[-1] != merge.WIDTH:
        return f"clusters take bf16 and fp16 with D = {merge.WIDTH}"
    if x.shape[0] * x.shape[1] < FEWEST_TOKENS:
        return f"clusters gave nothing below {FEWEST_TOKENS} tokens"
    if found.r.numel() == 0 or found.mean_x.numel() == 0:
        return "clusters take a merge with a norm and a leak"
    if any(g is not None and g.dtype not in (x.dtype, torch.float32) for g in gains.pointers):
        return "clusters take gains in fp32 or the dtype of X"
    if valid is not None and valid.dtype not in (torch.int32, torch.int64):
        return "clusters take counts in int32 and int64"
    tensors = [t for t in (x, f, found.y) if t is not None]
    if any(t.data_ptr() % 16 or t.stride(0) % 8 or t.stride(1) % 8 for t in tensors):
        return "clusters take rows at multiples of 16 bytes"
    if x.shape[0] >= 1 << 16:
        return "clusters take fewer than 65,536 samples"
    counts = "" if valid is None else merge.counts_of(valid)
    long = merge.cut_for(direction, lengths).cluster > 8
    return _untrusted(
        Class(direction, x.dtype, len(lengths), counts, long, f is not None), x.device
    )


_verdicts: dict[tuple[Class, torch.device], child.Verdict] = {}


def _untrusted(kind: Class, device: torch.device) -> str | None:
    """Why a kernel is not trusted on a device, if so. What a capture holds by then stays in its
    graph, so that it does not change to clusters in the middle."""
    if (kind, device) not in _verdicts and torch.cuda.is_current_stream_capturing():
        return "clusters were not compared on this machine before a graph was captured"
    words, _ = child.known(_verdicts, kind, device, "merge", _name, _verdict_elsewhere)
    return None if words == child.RIGHT else f"clusters: {words}"


def _name(kind: Class, device: torch.device) -> str:
    """The key of a verdict on the disk: what it depends on."""
    cut = merge.cut_for(kind.direction, _lengths(kind))
    source = merge.source(cut, kind.dtype, kind.segments, kind.counts or "long long")
    return child.key(kind, device, source)


def _verdict_elsewhere(kind: Class, device: torch.device) -> child.Verdict:
    """`_verdict`, found by another process."""
    code = "from mvsplit.kernels.hopper.merge_choice import _tell_verdict; _tell_verdict()"
    dtype = str(kind.dtype).partition(".")[2]
    told = json.dumps([str(device), kind.direction, dtype, *kind[2:]])
    return child.verdict(code, told, PATIENCE)


def _tell_verdict() -> None:
    """In the other process."""
    name, direction, dtype, *rest = json.loads(sys.argv[1])
    device = child.take(name)
    kind = Class(direction, getattr(torch, dtype), *rest)
    child.tell(lambda: _verdict(kind, device))


def _verdict(kind: Class, device: torch.device) -> child.Verdict:
    def judge() -> child.Verdict:
        try:
            off = _off_by(kind, device)
        except _VainWaitError:
            return "a wait in a kernel did not end, as may be beside another process", False
        return (child.RIGHT if off < AGREEMENT else f"off by {off:.1e}"), True

    return child.judged(judge)


class _VainWaitError(Exception):
    """A wait in a kernel did not end."""


def _lengths(kind: Class) -> list[int]:
    """Lengths of the comparison: rows that fill no slot."""
    return [1203 if kind.long else 301, *[70] * (kind.segments - 1)]


def _off_by(kind: Class, device: torch.device) -> float:
    """The largest ‖found − wanted‖/‖wanted‖; infinite where launches differ or give NaN. There are
    several segments for each cluster. Raises _VainWaitError."""
    lengths, batch = _lengths(kind), 10 if kind.long else 24
    noise = torch.Generator(device).manual_seed(0)  # nobody else's numbers are drawn
    shape = (batch, sum(lengths), merge.WIDTH)
    x, f, g = (torch.randn(shape, device=device, generator=noise).to(kind.dtype) for _ in range(3))
    beta, alpha = torch.rand(2, merge.WIDTH, device=device, generator=noise) + 0.5
    valid = _some_counts(kind, batch, lengths, device)
    segments = Segments(tuple(lengths), valid)
    clean = [reference.zero_padding(t.float(), segments) for t in (x, f, g)]
    forward, backward = _truth(clean, beta, alpha, segments)
    if segments.mask is not None:
        padding = ~segments.mask[..., None]
        x, f, g = (t.masked_fill(padding, float("nan")) for t in (x, f, g))
    gains = weights(beta, alpha, None, [0.0] * 3, tied=True)
    noted_before, merge.fault = merge.fault, torch.zeros(1, dtype=torch.int32, device=device)
    try:
        if kind.direction == "forward":
            found = [_forward(x, f, gains, valid, lengths) for _ in range(3)]
            off = _distance(found, forward)
        else:
            kept = Merged(forward[0].to(kind.dtype), *forward[1:])
            other = f if kind.learns else None
            found = [_backward(g, other, kept, gains, valid, lengths) for _ in range(3)]
            off = _distance(found, backward)
        if merge.fault.item():
            raise _VainWaitError
        return off
    finally:
        merge.fault = noted_before


def _some_counts(
    kind: Class, batch: int, lengths: list[int], device: torch.device
) -> Tensor | None:
    if not kind.counts:
        return None
    dtype = torch.int32 if kind.counts == "int" else torch.int64
    rows = [lengths, [n // 3 for n in lengths], [n - 1 for n in lengths], [0, *lengths[1:]]]
    return torch.tensor([rows[b % 4] for b in range(batch)], dtype=dtype, device=device)


def _truth(
    inputs: list[Tensor], beta: Tensor, alpha: Tensor, segments: Segments
) -> tuple[list[Tensor], list[Tensor]]:
    """By the reference with λ = α: Y, 1/RMS, means of F and X; then ∂L/∂X, ∂L/∂F, ∂L/∂β and ∂L/∂α.
    `inputs` X, F and ∂L/∂Y in fp32, zero on padding."""
    x, f, g = inputs
    out = reference.merge_forward(x, f, beta, alpha, alpha, segments, _EPS)
    grads = reference.merge_backward(g, out, f, beta, alpha, alpha, segments)
    y, r, *means = cast(tuple[Tensor, ...], out)  # a norm, means and gains: nothing is None
    dx, df, d_beta, d_alpha, d_leak = cast(tuple[Tensor, ...], grads)
    return [y, r.squeeze(-1), *means], [dx, df, d_beta, d_alpha + d_leak]


def _forward(
    x: Tensor, f: Tensor, gains: Weights, valid: Tensor | None, lengths: list[int]
) -> list[Tensor]:
    out = merged(x, len(lengths), leaks=True, norm=True)
    merge.forward(x, f, out, gains, valid, lengths, _EPS)
    return list(out)


def _backward(
    g: Tensor, f: Tensor | None, kept: Merged, gains: Weights, valid: Tensor | None,
    lengths: list[int],
) -> list[Tensor]:  # fmt: skip
    out = gradients(g, gains.pointers, f is not None)
    merge.backward(g, f, kept, out, gains, valid, lengths)
    return list(out[: 2 if f is None else 4])


def _distance(found: list[list[Tensor]], wanted: list[Tensor]) -> float:
    first = found[0]
    if not all(all(map(torch.equal, first, other)) for other in found[1:]):
        return float("inf")
    pairs = zip(first, wanted[: len(first)], strict=True)
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in pairs]
    return max(float("inf") if e != e else e for e in errors)
