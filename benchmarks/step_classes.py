"""Question: where the time of a block goes in training, by kind of kernel, and at what clock.

Blocks of D = 1024 with writers that are not zero run forward and backward from a CUDA graph for
seconds, so that the card is as warm and as short of power as in training; then the time of a block,
the card's clock and power, and its kernels by kind. Pieces of several sizes, captions of unequal
lengths masked, and every level of what is computed again. `zero writers`: the network as it starts,
half of whose products multiply zeros. Last, what each of several changes gives, left out by itself.

    python benchmarks/step_classes.py [--only NAME…] [--budget 100] [--json FILE]
    python benchmarks/step_classes.py --small        (a trial of the code on a CPU)

Cost: about five seconds on one H200 for each row, under three minutes for all. Rows are written as
they come.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from card_load import CardLoad
from step_parts import Size, Trainer, free, keep_busy, synchronise
from torch import Tensor
from torch.nn import functional

from mvsplit.kernels import attention, masked_attention
from mvsplit.kernels.block_parts import Recompute
from mvsplit.kernels.fused import products, qk_norm_rope
from mvsplit.kernels.hopper import block_product_choice, merge_choice
from mvsplit.kernels.hopper.block_product import DOWN, HEADS, UP
from mvsplit.training import TrainConfig
from mvsplit.training.step import add_gradients
from mvsplit.training.step_time import model_flops

DEPTH, BETA = 40, 0.03
WARM, MEASURED = 1.0, 1.4  # seconds under load
KINDS = {  # the first whose word is in a kernel's name
    "zero keys": ("zero_keys", "lost_rows"),
    "attention": ("unit_attention", "sdpa", "flash", "fmha", "attention", "dot_do_o", "convert_dq"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk"),
    "merges": ("merge",),
    "products with what follows": ("block_product",),
    "SwiGLU": ("swiglu",),
    "QK-norm and rotation": ("qk_norm", "rope"),
    "copies and fills": ("copy", "memset", "memcpy", "fill"),
}


def _left_out(*_: Any) -> str:
    return "left out to see what it gives"


def _but(*left_out: int) -> Any:
    """What serves of the products in CUDA C++, but for these."""
    serving = block_product_choice.serving
    return lambda which, *given: _left_out() if which in left_out else serving(which, *given)


def _copied(x: Tensor, w_qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, eps: float) -> Any:
    """`products.heads`, not in place."""
    qkv = functional.linear(x, w_qkv)
    return qk_norm_rope._forward_op(qkv, cos, sin, n_heads, n_heads, eps)


def _without(beginning: str, all_ways: Callable[..., dict[str, Any]] = attention.ways) -> Any:
    """Ways of attention, but for those whose name begins so."""
    return lambda *which: {n: w for n, w in all_ways(*which).items() if not n.startswith(beginning)}


# What can be otherwise: the attribute that is replaced, and what by.
WAYS: dict[str, tuple[Any, str, Any]] = {
    "merge without clusters": (merge_choice, "obstacle", _left_out),
    "merge in clusters": (merge_choice, "FEWEST_TOKENS", 0),
    "attention by libraries": (attention, "ways", _without("unit heads")),
    "attention without CUDA C++": (attention, "ways", _without("unit heads in CUDA C++")),
    "gradients of attention by cudnn": (
        attention,
        "ways",
        _without("unit heads in CUDA C++, gradients by it"),
    ),
    "norm and rotation on their own": (masked_attention, "turns_back", lambda _: False),
    "all products by libraries": (block_product_choice, "serving", _left_out),
    "FFN by libraries": (block_product_choice, "serving", _but(UP, DOWN)),
    "QKV by libraries": (block_product_choice, "serving", _but(HEADS)),
    "q, k, v copied": (products, "heads", _copied),
}


@contextmanager
def changed(way: str) -> Iterator[None]:
    """With one of `WAYS`, or none. Nothing serves yet, so that a row names its own."""
    with mock.patch.object(attention, "_chosen", {}), mock.patch.object(products, "_ways", {}):
        if not way:
            yield
            return
        owner, name, value = WAYS[way]
        with (
            mock.patch.object(owner, name, value),
            mock.patch.object(attention, "remember"),  # no choice for later processes
        ):
            yield


@dataclass(frozen=True)
class Row:
    """What is measured."""

    samples: int
    text: int
    masked: bool
    level: Recompute = "nothing"
    writers: str = "standard"
    way: str = ""

    @property
    def name(self) -> str:
        zero = ", zero writers" if self.writers == "zero" else ""
        mask = " masked" if self.masked else ""
        way = f", {self.way}" if self.way else ""
        return f"{self.samples} × (256+{self.text}{mask}), {self.level}{zero}{way}"


def rows() -> list[Row]:
    long, short = partial(Row, 26, 64, False), partial(Row, text=32, masked=True)
    found = [long(writers="zero"), long(), short(29), short(14), short(29, level="attention")]
    found += [short(14, level="packed"), short(14, level="attention"), short(29, level="trunk")]
    found += [short(22), short(16), short(12), short(29, level="packed"), short(8), short(44)]
    found += [short(18, level="packed")]
    found += [long(way=way) for way in WAYS if way != "merge in clusters"]  # as it is
    found += [short(16, level="packed"), short(16, level="attention")]
    found += [short(16, level="packed", way=w) for w in WAYS if w != "merge without clusters"]
    return found


def small_rows() -> list[Row]:
    return [*rows()[:2], *(Row(2, 5, False, way=way) for way in WAYS)]


def measure(row: Row, depth: int, width: int, device: str) -> dict[str, Any]:
    """Time of a block, the card's load, its kernels by kind, and what served as attention."""
    free()
    size = Size(width=width, heads=max(2, width // 128), side=16, text=row.text)
    model = size.model(depth, BETA, writers=row.writers)
    precision = {"precision": "bf16", "weights": "bf16"} if device == "cuda" else {}
    config = TrainConfig(steps=1, batch_size=1, recompute=row.level, **precision)
    trainer = Trainer(model, config, size, device)
    trainer.planner.before(row.samples * size.tokens)
    piece = trainer.piece(row.samples, masked=row.masked)
    run = partial(add_gradients, trainer.model, config, [piece], trainer.graphs)
    run()
    run()  # recorded
    keep_busy(run, WARM)
    with CardLoad() as load:
        count, seconds = keep_busy(run, MEASURED)
    tokens = row.samples * size.tokens
    block = seconds / count / depth
    found = {
        "tokens": tokens,
        "us": 1e6 * block,
        "us_per_1000_tokens": 1e9 * block / tokens,
        "flops": model_flops(model, tokens, size.tokens) / depth,
        "load": load.found,
        "attention_backend": attention.backends_so_far(),
        "products": products.ways_so_far(),
    }
    if device == "cuda":
        found |= by_kind(run, depth)
    return found


def by_kind(run: Any, depth: int, repeats: int = 2) -> dict[str, Any]:
    """µs a block of kernels by kind, and of the longest by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            run()
        synchronise()
    kernels = [e for e in recorded.key_averages() if e.device_type.name == "CUDA"]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    kinds: dict[str, float] = {}
    for e in kernels:
        kind = kind_of(e.key)
        kinds[kind] = kinds.get(kind, 0.0) + e.self_device_time_total / depth / repeats
    longest = {
        f"{e.key[:90]} ×{e.count / depth / repeats:.3g}": e.self_device_time_total / depth / repeats
        for e in kernels[:30]
    }
    return {"kernels_us": sum(kinds.values()), "by_kind_us": kinds, "by_kernel_us": longest}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="rows by name, in this order")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--small", action="store_true", help="a trial of the code on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cpu" if args.small else "cuda"
    began = time.perf_counter()
    result: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": " ".join(["python", *sys.argv]),
        "device": "cpu" if args.small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "depth": 2 if args.small else DEPTH,
        "rows": {},
    }
    known = {row.name: row for row in (small_rows() if args.small else rows())}
    for row in [known[name] for name in args.only or known if name in known or not args.small]:
        if time.perf_counter() - began > args.budget:
            print(f"not run, beyond the budget: {row.name}", flush=True)
            continue
        width = 64 if args.small else 1024
        with changed(row.way):
            found = measure(row, result["depth"], width, device)
        result["rows"][row.name] = found
        kinds = {k: round(v) for k, v in found.get("by_kind_us", {}).items()}
        print(f"[{time.perf_counter() - began:5.1f} s] {row.name}: {found['us']:.0f} µs a block, "
              f"{found['load']} {kinds}", flush=True)  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
