"""Whether the products of a block with what follows in them serve: which of their cuts are right on
this machine, and whether the fastest of these is faster than what it replaces.

Before a kernel serves on a machine, the results of each cut are compared with fp64 and with
themselves, and their times with that of a library's product and the kernel that follows it, in a
process of its own, for a kernel that faults takes the GPU from its process. The verdict is kept on
the disk (block_product.json, see `choices`): a run that goes on computes by the same kernels. Any
other words there than "right" and a cut keep the kernels from serving.

Shapes: as in `block_product`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.kernels.capture import by_turns
from mvsplit.kernels.choices import remember
from mvsplit.kernels.fused import qk_norm_rope, swiglu
from mvsplit.kernels.hopper import block_product, child
from mvsplit.kernels.hopper.block_product import (
    CUTS,
    DOWN,
    HEAD,
    HEADS,
    UP,
    Cut,
    Turns,
    columns_of,
    width_of,
)
from mvsplit.kernels.hopper.driver import DriverError, FaultError

_logger = logging.getLogger(__name__)
NAMES = {
    UP: "w13 and SwiGLU",
    DOWN: "w2 backward and SwiGLU",
    HEADS: "W_QKV, rotation and QK-norm",
}
# From so many rows on, the rows that a kernel is timed with: steps of 8,320 and 4,608 tokens are
# common. What fewer rows take was not measured.
SIZES = ((8000, 8320), (4000, 4608))
# ‖found − wanted‖/‖wanted‖ of each 16 rows of 64 columns: rounding alone gives at most 2⁻⁹.
AGREEMENT = 4e-3
PATIENCE = 120.0  # seconds for a comparison; the waits of kernels are bounded
_LESS = 37  # rows than are timed: the last tile is not whole
_AT_ONCE = 1024  # rows of the truth, in fp64
_TOKENS, _EPS = (320, 288), 1e-6  # of a sample, of a norm, in what is compared and timed
_STORE, _SLOWER, _OFF = "block_product", "slower", "off by"
_AROUND = tuple(  # what launches them, and what they are timed with
    Path(str(module.__file__)) for module in (block_product, swiglu, qk_norm_rope)
)


class Class(NamedTuple):
    """Products that one verdict serves.

    Attributes:
        which: UP, DOWN or HEADS.
        width: D.
        columns: of H, or of all heads.
        rows: as timed.
    """

    which: int
    dtype: torch.dtype
    width: int
    columns: int
    rows: int


_verdicts: dict[tuple[Class, torch.device], child.Verdict] = {}


def serving(which: int, x: Tensor, w: Tensor, packed: Tensor | None = None) -> Cut | str:
    """The cut that serves, or why none does; arguments as of `block_product.obstacle`. What a
    capture holds by then stays in its graph, so that it does not change in the middle."""
    reason = block_product.obstacle(which, x, w, packed)
    if reason is not None:
        return reason
    kind = _class_of(which, x, w)
    if kind is None:
        return f"it was not timed with fewer than {SIZES[-1][0]} tokens"
    return _served(kind, x.device)


def questions(x: Tensor, weights: dict[int, Tensor]) -> list[child.Question]:
    """Those of all products that kernels take.

    Args:
        x: [N, D].
        weights: by product.
    """
    takes = (w for w in weights.items() if block_product.obstacle(w[0], x, w[1]) is None)
    kinds = [kind for which, w in takes if (kind := _class_of(which, x, w)) is not None]
    return [
        child.Question(_verdicts, kind, _STORE, _name, *_task(kind, x.device), _after)
        for kind in kinds
    ]


def _class_of(which: int, x: Tensor, w: Tensor) -> Class | None:
    rows = next((timed for least, timed in SIZES if x.shape[0] >= least), None)
    if rows is None:
        return None
    return Class(which, x.dtype, x.shape[1], columns_of(which, w), rows)


def _served(kind: Class, device: torch.device) -> Cut | str:
    if (kind, device) not in _verdicts and torch.cuda.is_current_stream_capturing():
        return "it was not compared on this machine before a graph was captured"
    words, _ = child.known(_verdicts, kind, device, _STORE, _name, _verdict_elsewhere)
    by_words = {_right(cut): cut for cut in cuts_for(kind)}
    return by_words.get(words, words)


def cuts_for(kind: Class) -> list[Cut]:
    """Those that take so many columns."""
    return [cut for cut in CUTS[kind.which] if kind.columns % width_of(cut, kind.which) == 0]


def _right(cut: Cut) -> str:
    """The words of a verdict for it."""
    return f"{child.RIGHT}, {cut}"


def _name(kind: Class, device: torch.device) -> str:
    """The key of a verdict on the disk: what it depends on."""
    given = (kind.which, kind.width, kind.dtype)
    sources = "\0".join(block_product.source(cut, *given) for cut in cuts_for(kind))
    return child.key(kind, device, sources, *_AROUND)


def _verdict_elsewhere(kind: Class, device: torch.device) -> child.Verdict:
    """`_verdict`, found by another process."""
    return _after(kind, device, child.verdict(*_task(kind, device), PATIENCE))


def _after(kind: Class, device: torch.device, found: child.Verdict) -> child.Verdict:
    """What was found; where that process ended by a fault or a wait in vain, what one more says of
    the last cut alone, the plainest."""
    if not child.was_ended(found[0]) or len(cuts_for(kind)) == 1:
        return found
    words, lasting = child.verdict(*_task(kind, device, plainest=True), PATIENCE)
    _logger.warning("%s in CUDA C++, all cuts: %s; the plainest: %s", _STORE, found[0], words)
    return words, lasting and found[1]


def _task(kind: Class, device: torch.device, *, plainest: bool = False) -> tuple[str, str]:
    """The code and the argument of another process that tells `_verdict`."""
    dtype = str(kind.dtype).partition(".")[2]
    told = json.dumps([str(device), kind.which, dtype, *kind[2:], plainest])
    return f"from {__name__} import _tell_verdict; _tell_verdict()", told


def _tell_verdict() -> None:
    """In the other process."""
    name, which, dtype, *rest, plainest = json.loads(sys.argv[1])
    device = child.take(name)
    kind = Class(which, getattr(torch, dtype), *rest)
    child.tell(lambda: _verdict(kind, device, plainest=plainest))


def _verdict(kind: Class, device: torch.device, *, plainest: bool = False) -> child.Verdict:
    def judge() -> child.Verdict:
        cuts = cuts_for(kind)[-1:] if plainest else cuts_for(kind)
        block_product.compile_all(cuts, kind.which, kind.width, kind.dtype)
        with child.alone(device):
            right, wrong = _compared(kind, cuts, device)
            if not right:
                return wrong, True
            *ours, theirs = _times(kind, right, device)
        return words_for(dict(zip(right, ours, strict=True)), theirs), True

    return child.judged(judge)


def words_for(ours: dict[Cut, float], theirs: float) -> str:
    """The words of a verdict on cuts that are right, from their times and that of what they
    replace, in µs."""
    best = min(ours, key=lambda cut: ours[cut])
    if ours[best] < theirs:
        return _right(best)
    return f"{_SLOWER}: {ours[best]:.0f} µs where libraries take {theirs:.0f} µs"


def keep(kind: Class, device: torch.device, words: str) -> None:
    """Keeps the words of a verdict for later processes."""
    remember(_STORE, _name(kind, device), words)


def _compared(kind: Class, cuts: list[Cut], device: torch.device) -> tuple[list[Cut], str]:
    """Those that are right, and what is wrong with the others. Raises DriverError where none can be
    made."""
    given, right, wrong = draw(kind, kind.rows - _LESS, device), [], []
    refused: list[DriverError] = []
    for cut in cuts:
        try:
            off = off_by(kind, given, partial(run, given, cut))
        except FaultError:
            raise
        except DriverError as error:
            refused.append(error)
            continue
        if off < AGREEMENT:
            right.append(cut)
        else:
            wrong.append(f"{_OFF} {off:.1e}")
    if refused and not right and not wrong:
        raise refused[0]
    return right, ", ".join(wrong)


class Inputs(NamedTuple):
    """Of a product: Y, dF or X [N, D]; its weights; (gate, value) of DOWN; of HEADS what turns."""

    x: Tensor
    w: Tensor
    packed: Tensor | None = None
    turns: Turns | None = None


def draw(kind: Class, rows: int, device: torch.device, seed: int = 0) -> Inputs:
    """Numbers as a step has them, nobody else's."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=noise).to(kind.dtype)

    x, scale = normal(rows, kind.width), kind.width**-0.5
    if kind.which == UP:
        return Inputs(x, normal(2 * kind.columns, kind.width) * scale)
    if kind.which == DOWN:
        w = normal(kind.width, kind.columns) * kind.columns**-0.5
        return Inputs(x, w, normal(rows, 2 * kind.columns))
    tokens = next((n for n in _TOKENS if rows % n == 0), _TOKENS[0])
    angle = torch.rand(tokens, HEAD // 2, device=device, generator=noise) * 6
    turns = Turns(angle.cos(), angle.sin(), kind.columns // HEAD * 2 // 3, _EPS)
    return Inputs(x, normal(kind.columns, kind.width) * scale, None, turns)


def run(given: Inputs, cut: Cut) -> tuple[Tensor, Tensor]:
    """By the kernel: (gate, value) or its gradient, and H; or heads and 1/RMS."""
    if given.turns is not None:
        return block_product.heads(given.x, given.w, given.turns, cut=cut)
    if given.packed is not None:
        return block_product.down(given.x, given.w, given.packed, cut=cut)
    packed, hidden = block_product.up(given.x, given.w, cut=cut)
    assert hidden is not None
    return packed, hidden


def by_libraries(given: Inputs) -> tuple[Tensor, Tensor]:
    """What the kernel replaces; of rows that are whole samples, where heads are turned."""
    if given.packed is not None:
        return swiglu.swiglu_backward(given.x @ given.w, given.packed)
    product = functional.linear(given.x, given.w)
    if given.turns is None:
        return product, swiglu.swiglu(product)
    cos, sin, heads, eps = given.turns
    kv_heads = given.w.shape[0] // HEAD - heads
    samples = product.unflatten(0, (-1, len(cos)))
    return product, qk_norm_rope.qk_norm_rope_(samples, cos, sin, heads - kv_heads, kv_heads, eps)[
        3
    ]


def off_by(kind: Class, given: Inputs, way: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """The largest ‖found − wanted‖/‖wanted‖ of 16 rows of 64 columns; infinite where launches on
    the same inputs differ in any bit, give NaN, or leave memory as it was."""
    with _poisoned():
        first, *others = [way() for _ in range(3)]
    if not all(all(map(torch.equal, first, other)) for other in others):
        return float("inf")
    largest = 0.0
    for start in range(0, len(given.x), _AT_ONCE):
        found = [t[start : start + _AT_ONCE] for t in first]
        for ours, wanted in zip(found, _truth(given, start, found[0]), strict=True):
            norms = _block_norms if ours.dtype == kind.dtype else torch.abs  # of each 1/RMS
            worst = float((norms(ours.double() - wanted) / norms(wanted)).max())
            largest = max(largest, float("inf") if worst != worst else worst)
    return largest


def _truth(given: Inputs, start: int, found: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows from `start` on: (gate, value), and H of what was found for it; the gradient of
    (gate, value), and H; or heads and 1/RMS."""
    part = slice(start, start + len(found))
    x, w = given.x[part].double(), given.w.double()
    if given.turns is not None:
        return _turned(x @ w.T, given.turns, start)
    packed = found if given.packed is None else given.packed[part]
    gate, value = packed.double().chunk(2, 1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    if given.packed is None:
        return x @ w.T, silu * value
    grad = x @ w
    of_gate = grad * value * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((of_gate, grad * silu), 1), silu * value


def _turned(product: Tensor, turns: Turns, start: int) -> tuple[Tensor, Tensor]:
    """Heads side by side, and 1/RMS of those that are turned, of the rows from `start` on."""
    at = (start + torch.arange(len(product), device=product.device)) % len(turns.cos)
    cos, sin = (t[at, None].double() for t in (turns.cos, turns.sin))
    heads = product.unflatten(-1, (-1, HEAD))
    first, second = heads[:, : turns.heads].chunk(2, -1)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
    inverse = (turned.square().mean(-1, keepdim=True) + turns.eps).rsqrt()
    whole = torch.cat((turned * inverse, heads[:, turns.heads :]), 1)
    return whole.flatten(-2), inverse[..., 0]


def _block_norms(x: Tensor) -> Tensor:
    """Of 16 rows of 64 columns each."""
    x = functional.pad(x, (0, 0, 0, -x.shape[0] % 16))
    return x.unflatten(0, (-1, 16)).unflatten(-1, (-1, 64)).square().sum((1, 3)).sqrt()


@contextmanager
def _poisoned() -> Iterator[None]:
    """What is allocated holds NaN. Products of libraries may refuse to run here."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _times(kind: Class, cuts: list[Cut], device: torch.device) -> list[float]:
    """Of cuts, and of what they replace, in µs."""
    given = draw(kind, kind.rows, device)
    ways = [*(partial(run, given, cut) for cut in cuts), partial(by_libraries, given)]
    return [1e6 * seconds for seconds in by_turns(ways)]
