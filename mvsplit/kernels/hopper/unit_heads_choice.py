"""Whether attention of unit heads in CUDA C++ is right on this machine.

Before its kernels serve for samples of some length, output and gradients are compared with fp32
there, in a process of its own, for a kernel that faults takes the GPU from its process. The verdict
is kept on the disk (unit_heads.json, see `choices`). Any other word there than "right" keeps them
from serving. The gradients of the projection by the same kernel have to be faster, too, than those
of the heads and what leads on from there.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvsplit.kernels.capture import by_turns
from mvsplit.kernels.hopper import attention, child, unit_heads
from mvsplit.kernels.masked_attention import Obstacle, by_unit_heads_in_cuda, off_by
from mvsplit.kernels.reference import qk_norm_rope_backward, qk_norm_rope_forward
from mvsplit.kernels.segments import Segments

AGREEMENT = 2.0  # of `off_by`, as in `kernels/attention.py`
PATIENCE = 120.0  # seconds for a comparison
SAMPLES, HEADS = 20, 8  # more blocks than a GPU holds at once
_HERE = Path(__file__).parent
_AROUND = (  # what launches them, and what they are timed with
    _HERE / "unit_heads.py", _HERE / "attention.py", _HERE.parent / "fused/qk_norm_rope.py",
)  # fmt: skip
_STORE = "unit_heads"
_OTHERS = ("a mask", "the two kernels that it replaces")


class Class(NamedTuple):
    """What one pair of kernels serves: rows of a sample, whether some are padding, whether the
    gradients are theirs too, and whether these are of the projection, to which padding is nothing
    special."""

    rows: int
    masked: bool
    gradients: bool
    turned: bool = False


_verdicts: dict[tuple[Class, torch.device], child.Verdict] = {}


def untrusted(kind: Class, device: torch.device) -> Obstacle | None:
    """Why kernels are not trusted on a device, if so. Forward is asked about by itself only where
    it is not right together with backward."""
    reason = obstacle(kind._replace(gradients=True), device)
    return reason if reason is None or kind.gradients else obstacle(kind, device)


def obstacle(kind: Class, device: torch.device) -> Obstacle | None:
    """Why just these kernels are not trusted on a device, if so."""
    found = child.known(_verdicts, kind, device, _STORE, _name, _verdict_elsewhere)
    words, lasting = found
    return None if words == child.RIGHT else Obstacle(f"attention in CUDA C++: {words}", lasting)


def questions(
    rows: int, masked: bool, device: torch.device, *, learns: bool
) -> list[child.Question]:
    """Those that attention of unit heads asks: of forward and its gradients and, if the projection
    `learns`, of its gradients."""
    kinds = [Class(rows, masked, True), *([Class(rows, False, True, turned=True)] * learns)]
    return [child.Question(_verdicts, kind, _STORE, _name, *_task(kind, device)) for kind in kinds]


def _name(kind: Class, device: torch.device) -> str:
    """The key of a verdict on the disk: what it depends on."""
    sources = unit_heads.forward_source(kind.rows, kind.masked)
    if kind.gradients:
        sources += unit_heads.source(kind.rows, kind.turned)
    return child.key(kind, device, sources, *_AROUND)


def _verdict_elsewhere(kind: Class, device: torch.device) -> child.Verdict:
    """`_verdict`, found by another process."""
    return child.verdict(*_task(kind, device), PATIENCE)


def _task(kind: Class, device: torch.device) -> tuple[str, str]:
    """The code and the argument of another process that tells `_verdict`."""
    code = f"from {__name__} import _tell_verdict; _tell_verdict()"
    return code, json.dumps([str(device), *kind])


def _tell_verdict() -> None:
    """In the other process."""
    name, *rest = json.loads(sys.argv[1])
    device = child.take(name)
    child.tell(lambda: _verdict(Class(*rest), device))


def _verdict(kind: Class, device: torch.device) -> child.Verdict:
    def judge() -> child.Verdict:
        if device.type == "cuda":
            own = {"gradients": kind.gradients, "turned": kind.turned}
            unit_heads.compile_all(kind.rows, kind.masked, **own)
        with child.alone(device):
            return compare()

    def compare() -> child.Verdict:
        times = (_projection_off_by if kind.turned else _off_by)(kind, device)
        if not times < AGREEMENT:
            return f"off {times:.1f} times as far as {_OTHERS[kind.turned]}", True
        if kind.turned and device.type == "cuda":
            return _faster(kind, device)
        return child.RIGHT, True

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


class _Given(NamedTuple):
    """What the gradients of a projection are made from; y [B, T, 3H, K] are q, k and v."""

    grad: Tensor  # [B, H, T, K]
    y: Tensor
    out: Tensor
    lse: Tensor
    r: Tensor  # [B, T, 2H]
    cos: Tensor  # [T, K/2]
    sin: Tensor

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return self.y.transpose(1, 2).split(HEADS, 1)

    def by_one_kernel(self) -> Tensor:
        q, k, v = self.heads
        return unit_heads.backward_of_projection(
            self.grad, q, k, v, self.out, self.lse, self.r, self.cos, self.sin
        )

    def by_two_kernels(self) -> Tensor:
        from mvsplit.kernels.fused import qk_norm_rope

        q, k, v = self.heads
        grads = unit_heads.backward(self.grad, q, k, v, self.out, self.lse)
        return qk_norm_rope._backward_op(*grads, q, k, self.r, self.cos, self.sin)

    def right(self) -> Tensor:
        """In fp32."""
        q, k, v = (t.float().requires_grad_() for t in self.heads)
        with torch.enable_grad():
            out = scaled_dot_product_attention(q, k, v)
            grads = torch.autograd.grad(out, (q, k, v), self.grad.float())
        of_q, of_k, of_v = (g.transpose(1, 2) for g in grads)
        y, r = self.y[:, :, : 2 * HEADS].float(), self.r.unsqueeze(-1)
        of_heads = torch.cat((of_q, of_k), 2)
        return qk_norm_rope_backward(of_heads, of_v, y, r, self.cos, self.sin)


def _draw(rows: int, device: torch.device) -> _Given:
    """Of a projection whose heads have unequal lengths; a quarter of the tokens is not turned."""
    noise = torch.Generator(device).manual_seed(0)  # nobody else's numbers are drawn
    shape = (SAMPLES, rows, 3 * HEADS, attention.HEAD)
    x = torch.randn(shape, device=device, generator=noise)
    x *= torch.rand(*shape[:3], 1, device=device, generator=noise) + 0.1
    angles = 6 * torch.rand(rows, attention.HEAD // 2, device=device, generator=noise)
    angles[rows - rows // 4 :] = 0
    turned = qk_norm_rope_forward(x.flatten(-2), angles.cos(), angles.sin(), HEADS, HEADS, 1e-6)
    y = torch.cat((turned.y, turned.v), 2).bfloat16()
    q, k, v = y.transpose(1, 2).split(HEADS, 1)
    out, lse = unit_heads.forward(q, k, v, None)
    grad = torch.randn(q.shape, device=device, generator=noise).bfloat16()
    return _Given(grad, y, out, lse, turned.r[..., 0].contiguous(), angles.cos(), angles.sin())


def _projection_off_by(kind: Class, device: torch.device) -> float:
    """How many times as far from fp32 as by two kernels the gradients of the projection are, of the
    head of which the ratio is largest; infinite where two launches differ in any bit."""
    given = _draw(kind.rows, device)
    found, again = given.by_one_kernel(), given.by_one_kernel()
    if not torch.equal(found, again) or not found.isfinite().all():
        return float("inf")
    right, theirs = given.right(), given.by_two_kernels()
    ours, others = (
        (t.float() - right).unflatten(-1, (3 * HEADS, -1)).norm(dim=-1).norm(dim=1).amax(0)
        for t in (found, theirs)
    )
    ratios = ours / others.clamp(min=torch.finfo(torch.float32).eps)
    return float(ratios.max()) if ratios.isfinite().all() else float("inf")


def _faster(kind: Class, device: torch.device) -> child.Verdict:
    """Whether one kernel takes less time than two."""
    given = _draw(kind.rows, device)
    one, two = (1e6 * t for t in by_turns((given.by_one_kernel, given.by_two_kernels)))
    if one < two:
        return child.RIGHT, True
    return f"not faster than two kernels ({one:.1f} µs against {two:.1f})", True


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
