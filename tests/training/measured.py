"""Steps and blocks that were measured on an H200, and what to plan for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mvsplit.kernels.block_parts import Recompute
from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.gpus import GPUS
from mvsplit.training.kernel_times import APART, FIRST, KERNELS, Kernels
from mvsplit.training.step_time import Shape

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = GPUS["h200"]
# The writers of these runs were zero, so that half of backward's products were of zeros, which
# draw less power; as the card is before it gets warm.
IDLE = replace(H200, under_load=H200.products)


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


GRAPHS = result("train_step_h200_2026-11-24.json")
EAGER = result("train_step_eager_h200_2026-11-24.json")
# A stage of the benchmark: its figures, depth, weights, and whether it was replayed as graphs.
RUNS = {
    "graphs, bf16 weights": (GRAPHS["step bf16"], 400, "bf16", True),
    "graphs, fp32 weights": (GRAPHS["step fp32"], 400, "fp32", True),
    "launched, bf16 weights": (EAGER["step bf16"], 400, "bf16", False),
    "launched, fp32 weights": (EAGER["step fp32"], 400, "fp32", False),
    "launched, 1000 layers": (EAGER["thousand"], 1000, "bf16", False),
}


def network(depth: int) -> DiTConfig:
    """That of benchmarks/train_step.py."""
    return DiTConfig(
        depth=depth,
        width=1024,
        heads=8,
        ffn_width=3072,
        channels=128,
        text_width=1024,
        rule=RuleConfig(name="mvsplit"),
    )


def train(weights: str = "fp32", **other: Any) -> TrainConfig:
    given = {"steps": 1, "batch_size": 1, "precision": "bf16", "ema_decay": 0.0, **other}
    return TrainConfig(weights=weights, **given)


def shape_of(found: dict[str, Any]) -> Shape:
    """Of a step."""
    samples = found.get("piece", 26)
    pieces = found["samples"] // samples
    return Shape(samples=samples, length=found.get("length", 320), pieces=pieces)


def levels_of(found: dict[str, Any]) -> list[Recompute]:
    return [level for level, count in found["recompute"].items() for _ in range(count)]


class Block(NamedTuple):
    """A row of step_classes under load; `way`: what was otherwise in it."""

    run: str
    shape: Shape
    level: Recompute
    way: str
    row: dict[str, Any]
    ran: Kernels


# What `ran` knows; other rows have merges, copies or an attention that no plan is made for.
_WAYS = (
    "", "attention by libraries", "gradients of attention by cudnn", "all products by libraries",
    "FFN by libraries", "norm and rotation on their own",
)  # fmt: skip
# Where no kernel before them does it.
_OF_THEIR_OWN = {
    ("swiglu", "forward"): "swiglu_fwd_kernel",
    ("swiglu", "backward"): "swiglu_bwd_kernel",
    ("rotation", "forward"): "qk_norm_rope_in_place_kernel",
    ("rotation", "backward"): "qk_norm_rope_bwd_kernel",
}
_COPIES = "qk_norm_rope_fwd_kernel"
_ATTENTION = {"forward": "attention", "backward": "attention_backward"}


def ran(row: dict[str, Any]) -> Kernels:
    """The kernels that a row's profile names."""
    names = {name.rpartition(" ×")[0] for name in row["by_kernel_us"]}
    if _COPIES in names:
        return FIRST
    own = {way: KERNELS.own[way] for way, name in _ATTENTION.items() if name in names}
    left = {k: KERNELS.fused[k] for k, name in _OF_THEIR_OWN.items() if name not in names}
    return replace(APART, own=own, fused=left)


def blocks() -> Iterator[Block]:
    for path in sorted(RESULTS.glob("step_classes_h200_*.json")):
        run = path.stem.partition("h200_")[2]
        for name, row in result(path.name)["rows"].items():
            size, level, *other = name.split(", ", 2)
            samples, way = int(size.split()[0]), "".join(other)
            if way in _WAYS:
                shape = Shape(samples=samples, length=row["tokens"] // samples, pieces=1)
                yield Block(run, shape, level, way, row, ran(row))
