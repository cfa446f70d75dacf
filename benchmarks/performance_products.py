"""Products of a block that do what follows them, as parts of docs/performance.md
(`performance_page.py`).

Units: microseconds.
"""

from __future__ import annotations

from typing import Any

from performance_parts import PRODUCTS_SINCE, day, markdown

Found = dict[str, Any]
LIBRARY, ALONE = "library", "library, the product alone"
NAMES = {
    "up": "w13, SwiGLU",
    "down": "w2's input gradient, SwiGLU's",
    "heads": "W_QKV, rotation and QK-norm",
}
BLOCK = "26 × (256+64), nothing"  # of step_classes
# The last step before products did what follows them, and the first.
BEFORE, FIRST_FORM = "2026-11-30T0844", "2026-11-30T1015"


def products(found: Found) -> str:
    """Each product at each size, of the latest result of ffn_products."""
    best = best_of(found)
    if not best:
        return ""
    rows = []
    for (name, n), ways in best.items():
        ours = ways["best"]
        each = [f"{us:.0f}" for us in (ways[LIBRARY]["us"], ways[ALONE]["us"], ours["us"])]
        rates = [f"{ours['tflops']:.0f}", f"{ours['load']['sm_mhz']:.0f}"]
        rows.append([NAMES[name], f"{n:,}", *each, ours["way"], *rates])
    head = ("product, what follows", "rows", "by libraries, µs", "product alone", "best form, µs")
    head = (*head, "its tile, stages, blocks that load together", "TFLOP/s", "MHz")
    gates = [row for row in found["rows"] if "gate" in row]
    worst = max(max(row["off"].values()) for row in gates)
    right = sum(row["right"] for row in gates)
    note = f" {found['note']}" if "note" in found else ""
    return f"""## Products with what follows them

On Hopper GPUs SwiGLU, its gradients, and rotation with QK-norm are done inside the product before them
([how](../mvsplit/kernels/hopper/block_product.py)), and gradients of attention go on to the projection in their
own kernel, each where a machine finds it right and faster than libraries and the kernel that follows. Under load,
by turns; *by libraries*: the library's product, then that kernel; FLOPs are those of the product alone; *beside*: what
follows a tile is done beside the products of the next.{_slower(best)}

{markdown(head, rows)}
Gate: {right} of {len(gates)} forms agree with fp64, in every 16 rows of 64 columns to {worst:.4f} at most, and with themselves bit by bit.
Of {day(found["date"])}.{note}
"""  # noqa: E501


def _slower(best: dict[tuple[str, int], Found]) -> str:
    """Which products no form of ours does faster than libraries."""
    found = [
        f"{NAMES[name]}, at {n:,} rows"
        for (name, n), ways in best.items()
        if ways["best"]["us"] >= ways[LIBRARY]["us"]
    ]
    return (
        f" Not faster than libraries, so that these may serve: {'; '.join(found)}." if found else ""
    )


def best_of(found: Found) -> dict[tuple[str, int], Found]:
    """By product and rows: the rows of the libraries, and the fastest of ours as `best`."""
    timed: dict[tuple[str, int], Found] = {}
    for row in found.get("rows", ()):
        if "us" in row:  # older results have another word for the product
            key = row.get("product") or row["direction"], row["rows"]
            timed.setdefault(key, {})[row["way"]] = row
    for ways in timed.values():
        ours = [row for way, row in ways.items() if way not in (LIBRARY, ALONE)]
        ways["best"] = min(ours, key=lambda row: row["us"]) if ours else None
    return {key: ways for key, ways in timed.items() if ways["best"]}


def product_ideas(runs: Found, found: Found, classes: Found) -> list[list[str]]:
    """Rows of the table of ideas. `runs`: results by the name of their file."""
    loaded = [run for run in runs.values() if "load" in (run.get("step bf16") or ())]
    shown = [runs[f"train_step_h200_{name}"] for name in (BEFORE, FIRST_FORM)]
    steps = map(_mfu, [*shown, max(loaded, key=lambda run: run["date"])])
    rows = [
        [
            "products that do what follows them, and gradients of attention that go on to the "
            "projection",
            f"MFU of 400 layers {' → '.join(steps)}, with all changes since; cards and batches "
            f"differ{_in_one_run(classes)}",
        ]
    ]
    pairs = {key: (w[LIBRARY]["us"], w["best"]["us"]) for key, w in best_of(found).items()}
    most = max(n for _, n in pairs)
    each = [
        f"{NAMES[name]} {a:.0f} → {b:.0f} µs" for (name, n), (a, b) in pairs.items() if n == most
    ]
    rows.append(
        [
            "the same products by themselves",
            f"{', '.join(each)} at {most:,} rows ({day(found['date'])})",
        ]
    )
    return rows


def _mfu(run: Found) -> str:
    step = run["step bf16"]
    of = f"{day(run['date'])}, {step['samples']} samples, {step['load']['sm_mhz']:.0f} MHz"
    return f"{step['mfu']:.1%} ({of})"


def _in_one_run(classes: Found) -> str:
    """What a block takes with all such products by libraries, against the same card's."""
    pair = classes.get("pairs", {}).get((f"{BLOCK}, all products by libraries", False))
    if pair is None:
        return ""
    base, other = (row["us"] for row in pair)
    return f"; a block of one run, by libraries and so: {other:.0f} → {base:.0f} µs"


def in_block(row: Found) -> bool:
    """Whether products did what follows them in a row of step_classes."""
    return "products with what follows" in row.get("by_kind_us", {})


def since(classes: Found, found: Found, deep: Found) -> Found:
    """Of which of the results with such products there is one, for `performance_not_run`."""
    rows = classes.get("rows", {})
    late = found if found.get("date", "") >= PRODUCTS_SINCE else {}
    thousand = deep.get("thousand", {})
    thousand = thousand if thousand.get("date", "") >= PRODUCTS_SINCE else {}
    masked = {
        name: row
        for name, row in rows.items()
        if "masked" in name
        and in_block(row)
        and not any("qk_norm_rope_bwd" in kernel for kernel in row["by_kernel_us"])
    }
    return {
        "products": late,
        "products in a block": {name: row for name, row in rows.items() if in_block(row)},
        "products at 1000 layers": thousand,
        "turned and masked": masked,
        "cold start with products": thousand if "cold_start_seconds" in thousand else {},
    }
