"""The time of a training step by part, on a GPU: a model of a block's kernels, added up.

How long the kernels take is in `kernel_times`, and what a GPU can do in `gpus`. Of the constants
here and there none is fitted to the time of a step; that is what the model is tested against.

| constant | from |
|---|---|
| `Gpu.products` | FLOPs of a block over the time of its matrix products, profile of `train_step_eager_h200` |
| `Gpu.under_load` | the same of a block that has been running for seconds, of what its other kernels and nodes leave, `step_classes_h200`: random numbers, clock held down by the card's power |
| `Gpu.alone` | the same of a library's products with nothing between them, `ffn_products_h200_2026-11-30T1341`; another card reached 7 % less in that of 09:37, with which a planned step would take 1 % longer; between that and `_SHARE` a line |
| `_TILE` | the profile of `train_step_eager_h200`: the names of the kernels |
| `_FEW_TOKENS` | the four products of a block at several numbers of tokens, `reference_h200` |
| `LAUNCH` | wall time of a block in the profile, where it is longer than its kernels |
| `_NODE` | an assumption: what a kernel in a CUDA graph costs beside its work |
| `_UNIT` | an assumption: what FSDP2 costs the CPU, a unit and pass (pytorch issue 173680) |

Shapes: n tokens of a piece, T tokens of a sample. Units: seconds.
"""  # noqa: E501

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mvsplit.kernels.block_parts import RECOMPUTE, Recompute
from mvsplit.kernels.dispatch import needs_no_mean
from mvsplit.models import DiTConfig
from mvsplit.residuals import PostNorm, build_rule
from mvsplit.training.config import TrainConfig
from mvsplit.training.gpus import Gpu
from mvsplit.training.kernel_times import (
    COPY,
    KERNELS,
    MEASURED,
    Kernels,
    Kind,
    own_attention,
    served,
)
from mvsplit.training.memory_plan import cast_bytes
from mvsplit.training.step_memory import count_parameters, runs_as_one_node

_WIDTH = 1024

# Rate of a block's products over that at 8,448 tokens; below, it falls with the tokens.
_FEW_TOKENS = ((576, 0.43), (1024, 0.64), (4224, 0.95), (8448, 1.0))
_PROFILED = 8320  # tokens of the profile
_TILE = (256, 128)  # of its products, as the names of their kernels say
_SHARE = 0.59  # of products in the time of the blocks that `Gpu.under_load` is from
_CAST = 1.32  # time of the casts of fp32 weights over that of their bytes
_CASTS = 8  # kernels that cast the fp32 weights of a block
_NODE = 1.3e-6
LAUNCH = 2.65e-3  # of a block, forward and backward, kernels launched one by one
_FORWARD_SHARE = 1 / 3  # of `LAUNCH`: backward has twice the operations
_UNIT = 1e-3
WAITING = "waiting for launches"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a GPU works on at a time.

    Attributes:
        samples: of a piece on one GPU, the largest.
        length: T, tokens of a sample, padding included.
        pieces: forward and backward passes for an update.
        share: samples of all pieces; None where all are as large.
    """

    samples: int
    length: int
    pieces: int
    share: int | None = None

    @property
    def tokens(self) -> int:
        """n, of a piece."""
        return self.samples * self.length


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of an optimiser step on each GPU.

    Attributes:
        parts: seconds by name, which add up to the step.
        communication: seconds that collectives take, hidden or not.
        bytes_sent: of each GPU.
        tokens_per_second: of all GPUs together.
        mfu: model FLOPs (6N and attention, nothing computed again) over the peak.
    """

    parts: dict[str, float]
    tokens_per_second: float
    mfu: float
    communication: float = 0.0
    bytes_sent: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def model_flops(model: DiTConfig, tokens: int, length: int) -> float:
    """FLOPs of forward and backward of `tokens` tokens in samples of `length`: 6N, attention."""
    return tokens * (6.0 * count_parameters(model).all + 12.0 * model.depth * length * model.width)


def step_time(
    model: DiTConfig,
    config: TrainConfig,
    shape: Shape,
    levels: Sequence[Recompute],
    gpu: Gpu,
    *,
    ranks: int = 1,
    graph: bool = True,
    kernels: Kernels = KERNELS,
) -> StepTime:
    """The time of a step.

    Args:
        levels: what the backward of each block computes again.
        ranks: GPUs that the network lies on, by `train.parallel`; `auto` counts as replicated.
        graph: whether pieces are replayed as CUDA graphs, where the network is not sharded.
        kernels: those that run, or ran.
    """
    low = config.precision == "bf16"
    each = _Block(model, config, shape, gpu, kernels)
    depth = model.depth
    parts = {
        "matrix products": depth * each.all_products(),
        "attention": depth * (each.attention("forward") + each.attention("backward")),
        "element-wise kernels": depth * (each.elements("forward") + each.elements("backward")),
        "casts of weights": depth * each.casts() if low and config.weights == "fp32" else 0.0,
        "recompute": sum(n * each.again(level) for level, n in Counter(levels).items()),
    }
    busy = sum(parts.values())
    sharded = ranks > 1 and config.parallel.layout == "shard"
    graphs = graph and not sharded
    parts["graph nodes" if graphs else WAITING] = (
        _node_time(model, config, levels, kernels, each.fused)
        if graphs
        else max(0.0, _launch_time(model, config, levels, sharded, kernels) - busy)
    )
    share = shape.samples * shape.pieces if shape.share is None else shape.share
    parts = {name: shape.pieces * seconds for name, seconds in parts.items()}
    for name in ("attention", "element-wise kernels"):  # a smaller piece saves no wave of products
        parts[name] *= share / (shape.samples * shape.pieces)
    sent = _bytes_sent(model, config, shape, ranks) if sharded else _exchanged(model, config, ranks)
    communication = sum(sent.values()) / gpu.link
    hidden = sum(parts.values()) if sharded else 0.0
    parts["communication not hidden"] = max(0.0, communication - hidden)
    parts["optimiser"] = optimiser_bytes(model, config, ranks) / gpu.copy
    seconds = sum(parts.values())
    tokens = share * shape.length * ranks
    return StepTime(
        parts={name: value for name, value in parts.items() if value},
        tokens_per_second=tokens / seconds,
        mfu=model_flops(model, tokens, shape.length) / (seconds * ranks * gpu.peak),
        communication=communication,
        bytes_sent=sent,
    )


class _Block:
    """The time of a block's kernels for one piece."""

    def __init__(
        self, model: DiTConfig, config: TrainConfig, shape: Shape, gpu: Gpu, kernels: Kernels
    ) -> None:
        self.model, self.gpu, self.shape, self.kernels = model, gpu, shape, kernels
        self.low = config.precision == "bf16"
        given = (kernels, model, config.precision, shape.samples, shape.length, gpu)
        self.fused = served(*given)
        self.own = own_attention(kernels, model, config.precision, shape.length, gpu)
        self.matrices = cast_bytes(model) // 2  # elements
        packed = (model.heads + 2 * model.groups) * model.head_width
        width, hidden = model.width, model.ffn_width
        self.shapes = {  # of the matrices: what comes out of them, what goes in
            "qkv": (packed, width),
            "proj": (width, width),
            "w13": (2 * hidden, width),
            "w2": (width, hidden),
        }
        rule = build_rule(model.rule, width=model.width, depth=model.depth, branch="ffn")
        self._scaled = isinstance(rule, PostNorm) and needs_no_mean(*rule.gains())
        self._most = gpu.under_load
        self._most = self._under_load()

    def _under_load(self) -> float:
        """The rate of products, which power holds down the more, the less lies between them."""
        gpu, alone = self.gpu, self.gpu.alone
        if alone is None or gpu.under_load >= gpu.products:  # power does not hold them down
            return gpu.under_load
        nodes = _NODE * (self.kernels.forward + self.kernels.backward - len(self.fused))
        others = sum(self.attention(way) + self.elements(way) for way in ("forward", "backward"))
        busy = self.all_products()
        more = max(0.0, busy / (busy + others + nodes) - _SHARE) / (1 - _SHARE)
        return gpu.under_load + more * (alone - gpu.under_load)

    def all_products(self) -> float:
        """Forward, gradients of the inputs and of the matrices, [E, D] each: n·E, n·D and E·D
        numbers come out, and only where they grow with n may the last of them fill the GPU badly.
        """
        forward = sum(self.product(*shape) for shape in self.shapes.values())
        inputs = sum(self.product(inner, out) for out, inner in self.shapes.values())
        return forward + inputs + self._products(self.matrices)

    def product(self, out: int, inner: int) -> float:
        """x·Wᵀ, of which [n, out] comes out."""
        n = self.shape.tokens
        most = _FEW_TOKENS[-1][0]
        waste = _waste(n, out, self.gpu) / _waste(_PROFILED, out, self.gpu) if n > most else 1.0
        return self._products(out * inner, waste)

    def _products(self, elements: float, waste: float = 1.0) -> float:
        """`waste` costs time, but hardly power: processors that wait leave it to the others."""
        n = self.shape.tokens
        work = n * (self.model.width / _WIDTH) ** 2
        rate = min(self.gpu.products * _relative_rate(work) / waste, self._most)
        return 2 * elements * n / (rate if self.low else min(rate, self.gpu.products_fp32))

    def attention(self, way: str) -> float:
        """cuDNN's grows with the tokens while samples are short, with their square where they are
        long; ours always with their square."""
        each, rate = self.kernels.attention[way]
        width, length = self.model.width, self.shape.length
        if way in self.own:
            each, rate = 0.0, self.own[way]
        else:
            length += -length % self.kernels.rounded
        n = self.shape.samples * length
        flops = (4 if way == "forward" else 10) * n * length * width
        slower = _REFERENCE_PRODUCTS / (self.gpu.products if self.low else self.gpu.products_fp32)
        return max(each * n * width / _WIDTH, flops / rate) * slower

    def elements(self, way: str) -> float:
        """Two merges, the rotation with QK-norm, SwiGLU and what is small; of what another kernel
        does what is left."""
        found = 2 * self.merge(way)
        found += self._pass("rotation", way, self.model.width)
        found += self._pass("swiglu", way, self.model.ffn_width)
        return found + self._pass("other", way, self.model.width)

    def merge(self, way: str) -> float:
        if self._scaled:
            return self._pass("scaled merge", way, self.model.width)
        column = 1 if way == "forward" else 2
        clusters = self.gpu.hopper and self.low and self.model.width == _WIDTH
        table = self.kernels.merge if clusters else self.kernels.apart
        rows = [(row[0], row[column]) for row in table]
        n = self.shape.tokens * self.model.width / _WIDTH
        return merge_seconds(rows, n) * self._slower()

    def again(self, level: Recompute) -> float:
        """What the backward of a block computes again."""
        matrix = {name: self.product(*shape) for name, shape in self.shapes.items()}
        others = matrix["qkv"] + matrix["proj"] + self.attention("forward")
        swiglu = self._pass("swiglu", "forward", self.model.ffn_width)
        small = self.elements("forward") - 2 * self.merge("forward") - swiglu
        each = {
            "nothing": 0.0,
            "packed": matrix["w13"],
            "attention": others + small,
            "trunk": self.merge("forward"),
            "all": swiglu + matrix["w2"],
        }
        return sum(each[name] for name in RECOMPUTE[: RECOMPUTE.index(level) + 1])

    def casts(self) -> float:
        """fp32 weights are read and written in half precision, once forward and once backward."""
        return _CAST * 2 * 6 * self.matrices / self.gpu.copy

    def _pass(self, name: str, way: str, width: int) -> float:
        n = self.shape.tokens
        if (name, way) in self.fused:
            left = left_seconds(self.fused[name, way], n * width / MEASURED[name])
            return left * self._slower()
        bytes_, slower = self.kernels.passes[name][way]
        return slower * bytes_ * 2 * n * width / COPY * self._slower()

    def _slower(self) -> float:
        """Of this GPU and precision, beside that of the measurements."""
        return COPY / self.gpu.copy * (1 if self.low else 2)


_REFERENCE_PRODUCTS = 784e12  # of the GPU that attention was measured on


def _waste(n: int, out: int, gpu: Gpu) -> float:
    """Time of a product over that of one whose [n, out] fills the GPU: its tiles are worked on in
    waves of one a processor, and a last wave of a few takes as long as a full one."""
    tiles = math.ceil(n / _TILE[0]) * math.ceil(out / _TILE[1])
    waves = math.ceil(tiles / gpu.processors)
    return waves * gpu.processors * _TILE[0] * _TILE[1] / (n * out)


def _relative_rate(work: float) -> float:
    """Of matrix products at so many tokens of D = 1024, in proportion to them where few."""
    (first, rate), (last, most) = _FEW_TOKENS[0], _FEW_TOKENS[-1]
    if work <= first:
        return rate * work / first
    return most if work >= last else _between(_FEW_TOKENS, work)


def merge_seconds(rows: Sequence[tuple[float, float]], n: float) -> float:
    """Of n tokens; no less than at the fewest measured, in proportion beyond the most."""
    (first, least), (last, most) = rows[0], rows[-1]
    if n <= first:
        return least
    return most * n / last if n >= last else _between(rows, n)


def left_seconds(rows: Sequence[tuple[float, float]], n: float) -> float:
    """Of n tokens; with fewer and with more than were measured in proportion."""
    (first, least), (last, most) = rows[0], rows[-1]
    if n <= first:
        return least * n / first
    return most * n / last if n >= last else _between(rows, n)


def _between(rows: Sequence[tuple[float, float]], x: float) -> float:
    (a, low), (b, high) = next(pair for pair in pairwise(rows) if x <= pair[1][0])
    return low + (high - low) * (x - a) / (b - a)


# Where backward begins to run a kernel of forward again.
_RUN_AGAIN: dict[Kind, Recompute] = {
    ("rotation", "forward"): "attention",
    ("swiglu", "forward"): "all",
}


def _node_time(
    model: DiTConfig,
    config: TrainConfig,
    levels: Sequence[Recompute],
    kernels: Kernels,
    fused: Collection[Kind],
) -> float:
    """What lies between the kernels of a graph, for one piece; those of `fused` are none."""
    casts = config.weights == "fp32" and config.precision == "bf16"
    count = kernels.forward + kernels.backward + (_CASTS if casts else 0) - len(fused)
    again = sum(kernels.again[level] for level in levels)
    since = [RECOMPUTE.index(level) for kind, level in _RUN_AGAIN.items() if kind in fused]
    again -= sum(RECOMPUTE.index(level) >= least for level in levels for least in since)
    return _NODE * (model.depth * count + again)


def _launch_time(
    model: DiTConfig,
    config: TrainConfig,
    levels: Sequence[Recompute],
    sharded: bool,
    kernels: Kernels,
) -> float:
    """What the CPU takes to launch a piece's kernels one by one."""
    again = sum(kernels.again[level] for level in levels) / kernels.again["all"] * _FORWARD_SHARE
    units = math.ceil(model.depth / config.parallel.unit) if sharded else 0
    return LAUNCH * (model.depth + again) + 2 * _UNIT * units


def _bytes_sent(
    model: DiTConfig, config: TrainConfig, shape: Shape, ranks: int
) -> dict[str, float]:
    """Of each GPU under FSDP2: weights are gathered in the precision of the arithmetic, once more
    in backward where they were let go; gradients go once a step in fp32."""
    shards = ranks // config.parallel.replicas
    count = count_parameters(model).all
    there = (shards - 1) / shards
    bytes_each = 2 if config.precision == "bf16" else 4
    gathers = shape.pieces * (2 if config.parallel.reshard else 1)
    sent = {
        "all-gather": there * bytes_each * count * gathers,
        "reduce-scatter": there * 4 * count,
    }
    if config.parallel.replicas > 1:
        share = (config.parallel.replicas - 1) / config.parallel.replicas
        sent["all-reduce"] = 2 * share * 4 * count / shards
    return sent


def _exchanged(model: DiTConfig, config: TrainConfig, ranks: int) -> dict[str, float]:
    """Of each GPU where every one holds the network whole: gradients there and back once a step,
    and the weights that were updated."""
    if ranks == 1:
        return {}
    there = (ranks - 1) / ranks
    low, full = _low_and_full(model, config)
    size = 2.0 * low + 4.0 * full
    return {"all-reduce": 2 * there * size, "all-gather": there * size}


def optimiser_bytes(model: DiTConfig, config: TrainConfig, ranks: int = 1) -> float:
    """Bytes that an update moves on a GPU, all of them read or written once: AdamW, zeroing, the
    norm, and the averages where they are kept (clipping, which is rare, is not counted)."""
    low, full = _low_and_full(model, config)
    looked_at = (4 + 4) * full + (2 + 2) * low  # by zeroing and the norm
    updated = 28 * full + (26 if config.weights == "split" else 10) * low
    if config.ema_decay:
        updated += (8 + 4) * full + (8 + 2 + 8) * low  # bf16 weights through an fp32 copy
    shards = ranks // config.parallel.replicas
    sharded = ranks > 1 and config.parallel.layout == "shard"
    return updated / shards + looked_at / (shards if sharded else 1)


def _low_and_full(model: DiTConfig, config: TrainConfig) -> tuple[int, int]:
    """Parameters in bf16 and in fp32."""
    count = count_parameters(model)
    low = count.low if config.bf16_weights else 0
    return low, count.all - low


def is_rough(model: DiTConfig, config: TrainConfig) -> str | None:
    """Why the times of this experiment are no more than an order of magnitude, if they are."""
    if not runs_as_one_node(model, config.precision):
        return "blocks run part by part (fp32, biases, fewer key heads or a rule of another kind)"
    if model.width < _WIDTH / 2 or model.width > 2 * _WIDTH:
        return f"the kernels were measured at a width of {_WIDTH}, this network has {model.width}"
    return None
