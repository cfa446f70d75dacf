"""What `mvsplit plan` makes of products and gradients of attention that do what follows them, as a
part of docs/performance.md (`performance_page.py`).

Units: microseconds, but for the seconds of `Kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from performance_parts import day, markdown, network
from performance_products import ALONE, BLOCK, NAMES, best_of

from mvsplit.training import TrainConfig
from mvsplit.training.gpus import GPUS
from mvsplit.training.kernel_times import FEWEST_ROWS, KERNELS, Kernels, Kind
from mvsplit.training.step_time import Shape, left_seconds, step_time

Found = dict[str, Any]
KINDS: dict[str, Kind] = {
    "up": ("swiglu", "forward"),
    "down": ("swiglu", "backward"),
    "heads": ("rotation", "forward"),
}
GRADIENTS: Kind = ("rotation", "backward")
SMALL = "16 × (256+32 masked), packed"  # of step_classes
APART = f"{BLOCK}, norm and rotation on their own"
BY_LIBRARIES = f"{BLOCK}, all products by libraries"
BACKWARD = "attention_backward ×1"
# The runs that `Kernels.fused` is of: ffn_products; step_classes, and that before gradients of the
# same attention went on to the projection.
PRODUCTS, CLASSES, BEFORE = "2026-11-30T13:41", "2026-11-30T13:43", "2026-11-30T08:46"
LONG = 10.0  # shorter kernels do not tell how alike two runs are


def planned(products: Sequence[Found], classes: Sequence[Found]) -> str:
    """Of all results of ffn_products and of step_classes."""
    own = {found["date"]: found for found in products}[PRODUCTS]
    late, before = ({found["date"]: found for found in classes}[run] for run in (CLASSES, BEFORE))
    rows = [*_of_products(own), *_of_gradients(late, before)]
    head = ("what follows", "tokens", "left of it, µs", "by repetitions", "planned", "runs")
    return f"""
Where products and gradients of attention do what follows them ([above](#products-with-what-follows-them); in the table, as CUDA
graphs with bf16 weights), the plan has what is left of it: what the best form takes beyond the library's product alone, and what
gradients of attention take beyond those that do not go on to the projection. Between two sizes it draws a line, beyond them it counts in
proportion; how good that is no third size says. *By repetitions*: the least and the most that those of both kernels leave. W_QKV with what follows
is planned from {FEWEST_ROWS["rotation"]:,} tokens on, the other products from {FEWEST_ROWS["swiglu"]:,}; with fewer, libraries serve.

{markdown(head, rows)}
{_in_a_block(late)}

Power holds products down the more, the less lies between them: a library's alone reach {_alone(products)}
under load, {GPUS["h200"].under_load / 1e12:.0f} in a block of 2026-11-29; cards differ. The plan takes {(GPUS["h200"].alone or 0) / 1e12:.0f} for those alone.
"""  # noqa: E501


def _planned(kind: Kind, tokens: int) -> str:
    if kind in KINDS.values() and tokens < FEWEST_ROWS[kind[0]]:
        return "by libraries"
    return f"{1e6 * left_seconds(KERNELS.fused[kind], tokens):.1f}"


def _of_products(found: Found) -> list[list[str]]:
    rows = []
    for (name, n), ways in best_of(found).items():
        ours, alone = ways["best"], ways[ALONE]
        least = min(ours["all_us"]) - max(alone["all_us"])
        most = max(ours["all_us"]) - min(alone["all_us"])
        left = f"{ours['us'] - alone['us']:.1f}"
        given = (NAMES[name], f"{n:,}", left, f"{least:.1f} to {most:.1f}")
        rows.append([*given, _planned(KINDS[name], n), day(found["date"])])
    return rows


def _of_gradients(late: Found, before: Found) -> list[list[str]]:
    """Of one run where it has both, else of two."""
    rows = []
    for name, other, run in ((BLOCK, APART, late), (SMALL, SMALL, before)):
        row, alone = late["rows"][name], run["rows"][other]
        left = row["by_kernel_us"][BACKWARD] - alone["by_kernel_us"][BACKWARD]
        runs = f"{day(CLASSES)}, one run"
        if run is before:
            runs = f"{day(CLASSES)} less {day(BEFORE)}, two runs: {_alike(row, alone)}"
        what = "gradients of attention, those of rotation and QK-norm"
        given = (what, f"{row['tokens']:,}", f"{left:.1f}", "–")
        rows.append([*given, _planned(GRADIENTS, row["tokens"]), runs])
    return rows


def _alike(row: Found, other: Found) -> str:
    """How long what both ran alike took in the one, of the other."""
    here, there = (each["by_kernel_us"] for each in (row, other))
    ratios = [
        us / there[name]
        for name, us in here.items()
        if us > LONG and name != BACKWARD and name in there
    ]
    return f"kernels of both differ by {min(ratios) - 1:+.0%} to {max(ratios) - 1:+.0%}"


def _in_a_block(run: Found) -> str:
    """What all products with what follows take more in a block, and what the block gains."""
    block, libraries = run["rows"][BLOCK], run["rows"][BY_LIBRARIES]
    ours, theirs = (_products(row) for row in (block, libraries))
    tokens = block["tokens"]
    left = sum(1e6 * left_seconds(KERNELS.fused[kind], tokens) for kind in KINDS.values())
    apart = replace(KERNELS, fused={GRADIENTS: KERNELS.fused[GRADIENTS]})
    gains = 1e6 * (_block(apart, tokens) - _block(KERNELS, tokens))
    gave = libraries["us"] - block["us"]
    return f"""In a block at {tokens:,} tokens ({day(run["date"])}, one run) all products with what follows take {ours - theirs:.0f} µs more in a
profile than those of libraries alone; planned are {left:.0f}. Under load, by the clock, the block takes {gave:.0f} µs less than with all
products by libraries; planned are {gains:.0f}."""  # noqa: E501


def _products(row: Found) -> float:
    kinds = row["by_kind_us"]
    both: float = kinds["matrix products"] + kinds.get("products with what follows", 0.0)
    return both


def _block(kernels: Kernels, tokens: int) -> float:
    """Seconds of a block under load."""
    config = TrainConfig(steps=1, batch_size=1, precision="bf16", weights="bf16", ema_decay=0.0)
    shape = Shape(samples=tokens // 320, length=320, pieces=1)
    time = step_time(network(1), config, shape, ["nothing"], GPUS["h200"], kernels=kernels)
    return time.seconds - time.parts["optimiser"]


def _alone(products: Sequence[Found]) -> str:
    """TFLOP/s of the library's products with nothing between them, of most rows, by run."""
    words = []
    for found in products:
        best = best_of(found)
        most = max(n for _, n in best)
        rates = sorted(ways[ALONE]["tflops"] for (_, n), ways in best.items() if n == most)
        words.append(f"{rates[0]:.0f} to {rates[-1]:.0f} TFLOP/s ({day(found['date'])})")
    return ", ".join(words)
