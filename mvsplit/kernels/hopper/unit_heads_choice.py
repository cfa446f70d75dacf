"""Whether attention of unit heads in CUDA C++ is right on this machine.

Before its kernels serve for samples of some length, output and gradients are compared with fp32
there, in a process of its own, for a kernel that faults takes the GPU from its process. The verdict
is kept on the disk (unit_heads.json, see `choices`). Any other word there than "right" keeps them
from serving.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvsplit.kernels.hopper import attention, child, unit_heads
from mvsplit.kernels.masked_attention import Obstacle, by_unit_heads_in_cuda, off_by
from mvsplit.kernels.segments import Segments

AGREEMENT = 2.0  # of `off_by`, as in `kernels/attention.py`
PATIENCE = 120.0  # seconds for a comparison
SAMPLES, HEADS = 20, 8  # more blocks than a GPU holds at once


class Class(NamedTuple):
    """What one pair of kernels serves: rows of a sample, whether some are padding, whether the
    gradients are theirs too."""

    rows: int
    masked: bool
    gradients: bool


_verdicts: dict[tuple[Class, torch.device], child.Verdict] = {}


def untrusted(kind: Class, device: torch.device) -> Obstacle | None:
    """Why kernels are not trusted on a device, if so. Forward is asked about by itself only where
    it is not right together with backward."""
    reason = _untrusted(kind._replace(gradients=True), device)
    return reason if reason is None or kind.gradients else _untrusted(kind, device)


def _untrusted(kind: Class, device: torch.device) -> Obstacle | None:
    found = child.known(_verdicts, kind, device, "unit_heads", _name, _verdict_elsewhere)
    words, lasting = found
    return None if words == child.RIGHT else Obstacle(f"attention in CUDA C++: {words}", lasting)


def _name(kind: Class, device: torch.device) -> str:
    """The key of a verdict on the disk: what it depends on."""
    sources = unit_heads.forward_source(kind.rows, kind.masked)
    if kind.gradients:
        sources += unit_heads.source(kind.rows)
    digest = hashlib.sha256(sources.encode()).hexdigest()[:16]
    return "; ".join(
        map(str, (torch.cuda.get_device_name(device), torch.__version__, digest, *kind))
    )


def _verdict_elsewhere(kind: Class, device: torch.device) -> child.Verdict:
    """`_verdict`, found by another process."""
    code = f"from {__name__} import _tell_verdict; _tell_verdict()"
    return child.verdict(code, json.dumps([str(device), *kind]), PATIENCE)


def _tell_verdict() -> None:
    """In the other process."""
    name, *rest = json.loads(sys.argv[1])
    device = child.take(name)
    child.tell(lambda: _verdict(Class(*rest), device))


def _verdict(kind: Class, device: torch.device) -> child.Verdict:
    def judge() -> child.Verdict:
        times = _off_by(kind, device)
        right = times < AGREEMENT
        return (child.RIGHT if right else f"off {times:.1f} times as far as a mask"), True

    return child.judged(judge)


def _off_by(kind: Class, device: torch.device) -> float:
    """As `masked_attention.off_by`, of heads in the packed rows that a block has; infinite where
    two launches on the same inputs differ in any bit."""
    noise = torch.Generator(device).manual_seed(0)  # nobody else's numbers are drawn
    shape = (SAMPLES, kind.rows, 3 * HEADS, attention.HEAD)
    packed = torch.randn(shape, device=device, generator=noise).bfloat16()
    q, k, v = packed.transpose(1, 2).split(HEADS, 1)
    segments = Segments((kind.rows,))
    if kind.masked:
        text = kind.rows // 4
        counts = torch.arange(SAMPLES, device=device) * 7 % (text + 1)
        segments = Segments.image_and_text(kind.rows - text, text, counts)
    way = partial(by_unit_heads_in_cuda, gradients=kind.gradients)
    if not _repeats(q, k, v, segments, kind.gradients):
        return float("inf")
    return off_by(way, q.requires_grad_(), k, v, segments, _by_a_mask)


def _repeats(q: Tensor, k: Tensor, v: Tensor, segments: Segments, gradients: bool) -> bool:
    """Whether all results of our kernels are the same bits a second time. Padding may hold
    anything."""
    heads = [t / t.float().norm(dim=-1, keepdim=True) * attention.HEAD**0.5 for t in (q, k)]
    q, k, v = (t.bfloat16() for t in (*heads, v))
    runs = []
    for _ in range(2):
        out, lse = unit_heads.forward(q, k, v, segments.first_tokens())
        grads = unit_heads.backward(v, q, k, v, out, lse) if gradients else ()
        runs.append((out, lse, *grads))
    return all(map(torch.equal, *runs))


def _by_a_mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=segments.key_bias(q))
