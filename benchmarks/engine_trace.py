"""Where the time of a block goes: the GPU's clock at six places of every kernel in CUDA C++.

The plan is the engine's own (from its cache, or measured now), or --plan's; blocks run as a CUDA
graph. For each of these kernels in the last block, in µs after the end of the one before it:

    begins   its first block begins, and its last
    waited   what it reads is there (programmatic dependent launch), in the middle block
    loaded   the first products can begin, multiplied: those of the first tile have ended; written:
             its first tile has left; these three in the middle block
    ends     its first block ends, and its last

    python benchmarks/engine_trace.py [--pictures 1] [--json FILE]
    python benchmarks/engine_trace.py --table FILE    # of docs/sampling.md, of the products

Cost: about half a minute on one H200; another Hopper GPU will do.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from pathlib import Path
from typing import Any, ClassVar

import torch
from engine import inputs, network

from mvsplit.kernels.capture import recorded
from mvsplit.kernels.choices import choice_file
from mvsplit.kernels.hopper import attention, driver, product
from mvsplit.sampling.engine_apart import measured
from mvsplit.sampling.engine_plan import Network, Plan
from mvsplit.sampling.engine_tune import LAYERS, load_plan

PLACES = ("begins", "waited", "loaded", "multiplied", "written", "ends")
BLOCKS, MARKS = 256, 8


class Traced(driver.Kernel):
    """A kernel with marks (common.cu), and the stages that it ran in."""

    now = ""
    launched: ClassVar[list[tuple[str, Traced, int]]] = []  # of all kernels, in order

    def launch(self, clusters: int, arguments: Any, *, pdl: bool) -> None:
        Traced.launched.append((Traced.now, self, clusters))
        super().launch(clusters, arguments, pdl=pdl)

    def marks(self, blocks: int) -> list[list[int]]:
        """Nanoseconds [blocks, MARKS] of the last launch, of no more than BLOCKS."""
        place, size = ctypes.c_void_p(), ctypes.c_size_t()
        cuda = driver._driver()
        driver._check(
            cuda.cuModuleGetGlobal_v2(
                ctypes.byref(place), ctypes.byref(size), self.module, b"marks"
            ),
            "marks",
        )
        words = (ctypes.c_uint64 * (BLOCKS * MARKS))()
        driver._check(cuda.cuMemcpyDtoH_v2(words, place, ctypes.sizeof(words)), "copy")
        return [list(words[i * MARKS : (i + 1) * MARKS]) for i in range(min(blocks, BLOCKS))]


def traced_kernels() -> None:
    """Has all kernels compiled with marks from here on."""
    for module in (product, attention):
        module.Kernel = Traced  # type: ignore[attr-defined]
        module.compiled = lambda text, folder: driver.compiled("#define TRACE\n" + text, folder)  # type: ignore[attr-defined]
        module._kernel.cache_clear()


def plan_for(shape: Network) -> Plan:
    return load_plan(shape, choice_file("engine")) or measured(shape).plan


def trace(shape: Network, plan: Plan) -> list[dict[str, Any]]:
    """The kernels of the last of LAYERS blocks, in order."""
    blocks = list(shape.model.blocks)[:LAYERS]
    run = Network.run

    def named(self: Network, stage: str, *args: Any, **options: Any) -> None:
        Traced.now = stage
        run(self, stage, *args, **options)

    Network.run = named  # type: ignore[method-assign]
    shape.trunk.normal_()
    shape.x = shape.trunk
    graph, _ = recorded(lambda: shape.run_blocks(blocks, plan))  # type: ignore[arg-type]
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    driver.check_waits()
    stages = list(dict.fromkeys(stage for stage, _, _ in Traced.launched))
    last = {stage: (kernel, n) for stage, kernel, n in Traced.launched}
    rows, before = [], None
    for stage in stages:
        kernel, n = last[stage]
        marks = kernel.marks(n)
        rows.append(row(stage, marks, before))
        before = max(max(block) for block in marks)
    return rows


def row(stage: str, marks: list[list[int]], before: int | None) -> dict[str, Any]:
    """One kernel's places, µs after the end of the kernel before it."""
    start = before or min(block[0] for block in marks)

    def micro(nanoseconds: float) -> float:
        return round((nanoseconds - start) / 1e3, 2)

    found: dict[str, Any] = {"stage": stage, "blocks": len(marks)}
    for i, name in enumerate(PLACES):
        times = [block[i] for block in marks if block[i]]
        if times:
            found[name] = [micro(f(times)) for f in (min, statistics.median, max)]
    return found


NAMES = {
    "qkv": "qkv, rotation, QK-norm", "proj": "W_O and the merge", "w13": "w13 and SwiGLU",
    "w2": "W_2 and the merge",
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """What a block waits for, from the middle one of each product's blocks, in Markdown."""
    lines = [
        "| µs | until loads are there | the first tile's products | its way out | in all |",
        "|---|---|---|---|---|",
    ]
    for found in rows:
        if found["stage"] in NAMES:
            start = found["waited"][0] if found is rows[0] else 0.0  # the first has none before it
            loaded, multiplied, written, ends = (
                found[place][1] - start for place in ("loaded", "multiplied", "written", "ends")
            )
            times = (loaded, multiplied - loaded, written - multiplied, ends)
            figures = " | ".join(f"{micro:.1f}" for micro in times)
            lines.append(f"| {NAMES[found['stage']]} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--plan", type=Path, help="as benchmarks/engine.py writes one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())["pictures_8"]["rows"]))
        return
    noise, text, _ = inputs(2 * args.pictures, torch.bfloat16)
    with torch.no_grad():
        shape = Network(network(LAYERS), noise.bfloat16(), text, padded=False)
        plan = Plan.from_json(json.loads(args.plan.read_text())) if args.plan else plan_for(shape)
        traced_kernels()
        rows = trace(shape, plan)
    for found in rows:
        print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps({"plan": plan.to_json(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
