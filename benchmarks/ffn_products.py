"""Claim: products of a block with what follows them in the same kernel
(`kernels/hopper/block_product.cu`) take less time in a training step on a Hopper GPU than a
library's product and the kernel that follows it.

    up     (gate, value) = Y·W13ᵀ and H = silu(gate)⊙value
    down   dH = dF·W2; from it and (gate, value) their gradients, and H once more
    heads  X·W_QKVᵀ, its queries and keys turned, then normalised

Gate: outputs agree with fp64 in every 16 rows of 64 columns as closely as rounding can, on memory
that held NaN, bit by bit the same in three launches, at rows that fill the last tile and at rows
that do not. Then the times of every cut beside those of libraries, by turns and under load, from
graphs of several sets of inputs; what is found is kept as the choice of this machine, which the
first step of a training need not make any more. Variants run in a process that is ended when it
hangs; the next ones go on in another.

    python benchmarks/ffn_products.py [--seconds 60] [--json FILE]

Cost: about half a minute on one H200; another Hopper GPU will do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from card_load import CardLoad
from step_parts import free, keep_busy
from torch import Tensor
from torch.nn import functional

from mvsplit.kernels.capture import recorded
from mvsplit.kernels.hopper import block_product as product
from mvsplit.kernels.hopper import block_product_choice as choice
from mvsplit.kernels.hopper.block_product_choice import Class, Inputs

WIDTH, COLUMNS, DTYPE = 1024, 3072, torch.bfloat16  # of H, and of all heads
ROWS = (8320, 4608)  # 26 and 16 samples or so, that are timed
AWKWARD = (4609, 1283)  # rows of the gate beside those
NAMES = {product.UP: "up", product.DOWN: "down", product.HEADS: "heads"}
SETS, ROUNDS, BUSY = 6, 3, 0.15  # inputs by turns; rounds of so many seconds for each way
SILENCE = 25.0  # seconds after which a variant hangs
CUTS = [(which, cut) for which in NAMES for cut in product.CUTS[which]]


def kind_of(which: int, rows: int) -> Class:
    return Class(which, DTYPE, WIDTH, COLUMNS, rows)


def gate(which: int, cut: product.Cut) -> dict[str, Any]:
    """The error at each number of rows, and whether one is too large."""
    off = {}
    for rows in (*ROWS, *AWKWARD):
        kind = kind_of(which, rows)
        given = choice.draw(kind, rows, torch.device("cuda"))
        off[rows] = choice.off_by(kind, given, lambda: choice.run(given, cut))  # noqa: B023
    return {"off": off, "right": all(e < choice.AGREEMENT for e in off.values())}


def shown(cut: product.Cut) -> str:
    beside = ", beside" if cut.beside else ""
    return f"{cut.rows} × {cut.columns}, {cut.stages} stages, {cut.cluster} block(s){beside}"


def ways(which: int, cuts: list[product.Cut]) -> dict[str, Callable[[Inputs], object]]:
    """By name: what takes a set of inputs."""

    def alone(given: Inputs) -> Tensor:
        return given.x @ given.w if which == product.DOWN else functional.linear(given.x, given.w)

    def fused(cut: product.Cut) -> Callable[[Inputs], object]:
        return lambda given: choice.run(given, cut)

    found: dict[str, Callable[[Inputs], object]] = {
        "library": choice.by_libraries,
        "library, the product alone": alone,
    }
    return found | {shown(cut): fused(cut) for cut in cuts}


def times(which: int, rows: int, cuts: list[product.Cut]) -> list[dict[str, Any]]:
    """A row for each way: median µs of one product, of rounds in which all run by turns."""
    free()
    device, kind = torch.device("cuda"), kind_of(which, rows)
    sets = [choice.draw(kind, rows, device, seed) for seed in range(SETS)]
    graphs = {}
    for name, way in ways(which, cuts).items():
        graph, _ = recorded(lambda: [way(given) for given in sets] and None)  # noqa: B023
        graphs[name] = graph
    found: dict[str, list[float]] = {name: [] for name in graphs}
    with CardLoad() as load:
        for _ in range(ROUNDS):
            for name, graph in graphs.items():
                count, seconds = keep_busy(graph.replay, BUSY)
                found[name].append(1e6 * seconds / count / SETS)
    columns = 2 * COLUMNS if which == product.UP else COLUMNS
    flops = 2 * rows * WIDTH * columns
    result, medians = [], {name: statistics.median(us) for name, us in found.items()}
    if cuts:  # as the first step of a training would find it, which need not any more
        ours = {cut: medians[shown(cut)] for cut in cuts}
        choice.keep(kind, torch.device("cuda", 0), choice.words_for(ours, medians["library"]))
    for name, us in found.items():
        middle = medians[name]
        row = {"product": NAMES[which], "rows": rows, "way": name, "us": middle}
        row |= {"all_us": us, "tflops": flops / middle / 1e6, "load": load.found}
        result.append(row)
    return result


def tasks() -> list[tuple[str, Any]]:
    """What is done, in order: gates, then times."""
    gates: list[tuple[str, Any]] = [("gate", i) for i in range(len(CUTS))]
    return gates + [("times", (which, rows)) for rows in ROWS for which in NAMES]


def worker(first: int, right: list[int]) -> None:
    """Does the tasks from `first` on; a line in JSON for each. `right`: cuts that passed."""
    print(f"START {first}", flush=True)  # what ends it from here on is said of this task
    if first < len(CUTS):
        for which in NAMES:
            product.compile_all(list(product.CUTS[which]), which, WIDTH, DTYPE)
    for i, (what, of) in list(enumerate(tasks()))[first:]:
        print(f"START {i}", flush=True)
        if what == "gate":
            which, cut = CUTS[of]
            row = gate(which, cut)
            right += [of] if row["right"] else []
            rows = [{"product": NAMES[which], "gate": shown(cut), "cut": of, **row}]
        else:
            which, count = of
            own = [cut for n, (d, cut) in enumerate(CUTS) if d == which and n in right]
            rows = times(which, count, own)
        for row in rows:
            print("ROW " + json.dumps(row), flush=True)


def guarded(first: int, until: float, rows: list[dict[str, Any]]) -> int:
    """Runs a worker; returns the task at which it ended."""
    right = [str(row["cut"]) for row in rows if row.get("right")]
    command = [sys.executable, "-u", __file__, "--worker", str(first), "--right", *right]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    at, heard = first - 1, time.perf_counter()

    def listen() -> None:
        nonlocal at, heard
        assert child.stdout is not None
        for line in child.stdout:
            heard = time.perf_counter()
            if line.startswith("START"):
                at = int(line.split()[1])
            elif line.startswith("ROW"):
                rows.append(json.loads(line[4:]))
                print(said(rows[-1]), flush=True)

    listener = threading.Thread(target=listen)
    listener.start()
    while child.poll() is None:
        time.sleep(0.1)
        now = time.perf_counter()
        if now - heard > SILENCE or now > until:
            child.kill()
    listener.join()
    if child.returncode == 0:
        return len(tasks())
    at = max(at, first)  # it may have ended before it said anything
    rows.append({"failed": tasks()[at], "ended_with": child.returncode})
    print(json.dumps(rows[-1]), flush=True)
    return at


def said(row: dict[str, Any]) -> str:
    if "gate" in row:
        worst = ", ".join(f"{rows}: {off:.1e}" for rows, off in row["off"].items())
        verdict = "right" if row["right"] else "WRONG"
        return f"{row['product']:5} {row['gate']}: {verdict} ({worst})"
    figures = f"{row['us']:7.1f} µs {row['tflops']:4.0f} TFLOP/s"
    return f"{row['product']:5} {row['rows']} {row['way']:40} {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--right", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.right)
        return
    rows: list[dict[str, Any]] = []
    result = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "width": WIDTH,
        "columns": COLUMNS,
        "rows": rows,
    }
    until, first = time.perf_counter() + args.seconds, 0
    while first < len(tasks()) and time.perf_counter() < until:
        first = guarded(first, until, rows) + 1
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for row in rows if row.get("right") is False]
    if wrong:  # no time was taken of these
        raise SystemExit(f"gate failed: {wrong}")
    failed = [row for row in rows if "failed" in row]
    if failed or first < len(tasks()):
        sys.exit(f"{len(rows)} rows, failed: {failed}")


if __name__ == "__main__":
    main()
