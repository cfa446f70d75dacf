"""The merge with means by form, as parts of docs/performance.md (`performance_page.py`).

Units: microseconds.
"""

from __future__ import annotations

from typing import Any

from performance_parts import CLUSTERS_FROM, markdown

LARGE, PIECE, LONG = "64 256 64", "26 256 64", "16 1024 256"  # samples, image and text tokens
SHOWN = (LARGE, "64 256 256", LONG, PIECE, "29 256 32", "8 256 64", "1 256 32")
Row = dict[str, Any]


def _by_form(rows: list[Row], direction: str) -> dict[tuple[str, str], Row]:
    chosen = [row for row in rows if row.get("direction", direction) == direction]
    return {(row["form"], " ".join(map(str, row["size"]))): row for row in chosen}


def forms(found: Row, ops: list[Row], long: Row) -> str:
    """A table of the forms, from `merge_clusters_h200`, beside the released code's times, and what
    long segments gained since, from `merge_long_h200`."""
    ways = [_by_form(found["rows"], direction) for direction in ("forward", "backward")]
    merges = [row for row in ops if row["op"] == "merge"]
    released = {" ".join(map(str, row["shape"])): row.get("released_ms") for row in merges}
    lines = []
    for size in SHOWN:
        ours = [way["clusters", size] for way in ways]
        others = [
            " + ".join(f"{way[form, size]['us']:.1f}" for way in ways)
            if all((form, size) in way for way in ways)
            else "–"
            for form in ("two launches", "waiting")
        ]
        batch, image, text = size.split()
        each = [f"{row['us']:.1f} ({row['us'] / row['floor_us']:.2f})" for row in ours]
        total = sum(row["us"] for row in ours)
        ratio = f"{1e3 * sum(released[size]) / total:.1f}×" if released.get(size) else "–"
        lines.append([f"{batch}, {image}+{text}", *each, *others, ratio])
    head = ("samples, tokens", "clusters, forward (× floor)", "backward (× floor)")
    table = markdown((*head, "two launches", "waiting", "released ÷ clusters"), lines)
    since = {row["form"]: _pair(row["us"]) for row in long["rows"]}
    return f"""### The merge with means by form

Its rows above are of the form that serves, but where they say otherwise. There are three, each direction timed by itself here, in an
earlier run ([figures](../benchmarks/results/merge_clusters_h200_2026-11-29.json)): *clusters* of blocks on
Hopper, which hold the rows of a segment in shared memory and read each tensor once, from {CLUSTERS_FROM:,} tokens on; *two
launches* where the L2 cache holds X and F; else one launch of blocks that *wait* for each other. Before a cluster
kernel serves on a machine it is compared with the formula there.

{table}
Segments of 1,024 rows have clusters of 16 blocks. All clusters had a long one first, so that all read and then all
wrote; since every other cluster begins with the short ones, 16 samples of 1024+256 take {since["clusters, alternate"]} µs instead of
{since["clusters"]} ([figures](../benchmarks/results/merge_long_h200_2026-11-30T1416.json)). Where the L2 cache is told as well to keep
the rows that are loaded twice, and nothing else, {since["clusters, hints, alternate, stores pass"]}, which serves backward; hints alone, {since["clusters, hints"]}. By
clusters of 8 blocks, which keep two fifths of such a segment, {since["clusters, long by 8"]}, with all of that {since["clusters, long by 8, hints, alternate, stores pass"]}.
What clusters give in a training step: [below](#what-the-cards-power-allows).
"""  # noqa: E501


GRADIENTS = ("attention_backward", "bprop", "dot_do_o", "convert_dq")  # kernels of either


def tried_in_a_block(found: Row, gradients: Row) -> str:
    """Lines on what a block of the step was tried with, from `step_tried_h200` and
    `attention_gradients_h200`."""
    (_, ours), (_, theirs) = gradients["rows"].items()
    kernels = [
        sum(us for name, us in row["by_kernel_us"].items() if any(w in name for w in GRADIENTS))
        for row in (ours, theirs)
    ]
    block, product = found["block"], dict(found["swiglu_product"])
    product.pop("what")
    apart = product.pop("product, then a pass")
    best, worst = min(product.values()), max(product.values())
    base, beside = block["as it is"]["us"], block["gradients of matrices on a stream beside"]["us"]
    again = abs(block["the same again"]["us"] / base - 1)
    return f"""- SwiGLU's backward inside the product that makes its gradient, so that this gradient never goes to memory
  ([figures](../benchmarks/results/step_tried_h200_2026-11-29.json)): a kernel of Triton's takes {best} to {worst} µs at 26 samples,
  by its tiles, where the library's product and a pass over memory take {apart}. Tiles that leave room for two blocks, one of
  which could multiply while the other moves bytes, are the slower ones: likely, not measured, because small tiles
  read more of their operands from the L2 cache. In CUDA C++ it serves since ([above](#products-with-what-follows-them)).
- Gradients of the matrices on a stream beside, to fill what kernels leave of the GPU when they begin and end:
  {base:.0f} → {beside:.0f} µs a block under load (the same block twice: ±{again:.1%}).
- Gradients of attention in CUDA C++, seven products in one launch where cuDNN has five in three: at 26 samples
  {kernels[0]:.0f} µs instead of {kernels[1]:.0f}, a block {ours["us"]:.0f} instead of {theirs["us"]:.0f} µs ({gradients["date"].replace("T", " ")}). {gradients.get("note", "")}
"""  # noqa: E501


def tried(found: Row, timed_forms: Row, clusters: Row, first: Row) -> str:
    """Lines on what did not stay, from `merge_tried_h200`, `merge_forms_h200` and both results of
    `merge_clusters_h200`."""
    us = {run["form"]: run["us"] for run in found["runs"]}
    waits = us["one launch, two reads, blocks that wait"]
    held = us["one read, tiles of 256 x 32 values in registers"]
    rows = us["one read, tiles of 8 whole rows, sums added by the last block"]
    flags = us["one read, tiles of 256 x 64, values that are their own flags"]
    turns = us["the same, one tile of each processor loading at a time"]
    few, many = (
        us[f"one launch, two reads, {n} blocks of a processor between the reads"] for n in (4, 12)
    )
    timed = {
        (row["form"], " ".join(map(str, row["size"]))): row["us"] for row in timed_forms["rows"]
    }
    once = _by_form(first["rows"], "forward")
    hints = once["c8", LARGE]["us"] - once["c8 plain", LARGE]["us"]
    way, back = (_by_form(clusters["rows"], name) for name in ("forward", "backward"))

    def pair(form: str, size: str) -> str:
        return _pair([way[form, size]["us"], back[form, size]["us"]])

    early, halves = (
        "clusters, first rows taken before the means are known",
        "clusters, slots of 2 rows",
    )
    return f"""- A merge that reads once: a block keeps its tile in registers, tells its sums to the other tiles of
  its segment and waits for theirs ([figures](../benchmarks/results/merge_tried_h200_2026-11-28.json)).
  Forward and backward {_pair(held[LARGE])} µs at 64 samples of 256+64, where the merge that reads twice takes
  {_pair(waits[LARGE])}; {_pair(held[PIECE])} against {_pair(waits[PIECE])} at 26 samples. Loads, sums, waits and stores
  of a block follow each other; that registers hold too few tiles to cover this is likely, not
  measured. Tiles of 8 whole rows, whose partial sums are many: {_pair(rows[LARGE])} at 64 samples. Values that are their own flags
  instead of counters and fences, tiles of 256×64: {_pair(flags[LARGE])}; with one tile of each processor
  loading at a time: {_pair(turns[LARGE])}.
- More blocks between the two reads of the merge: {few[PIECE][0]:.1f} → {many[PIECE][0]:.1f} µs forward at 26 samples, which is
  kept, but {few[LARGE][0]:.1f} → {many[LARGE][0]:.1f} at 64. The table above is from before that.
- A merge of two plain launches, the second from the last sample to the first
  ([figures](../benchmarks/results/merge_forms_h200_2026-11-29.json)), serves where the L2 cache holds
  X and F: {_pair(timed["fewer warps", PIECE])} µs at 26 samples instead of {_pair(timed["package", PIECE])}. At 64 it is slower:
  {_pair(timed["fewer warps", LARGE])} against {_pair(timed["package", LARGE])}, with eight warps a block {_pair(timed["two launches", LARGE])}, without
  loads ahead {_pair(timed["no pipeline", LARGE])}, with chunks of 16 rows {_pair(timed["short chunks", LARGE])}.
- Clusters otherwise (64 samples of 256+64, where they take {pair("clusters", LARGE)}): the first rows of a segment taken
  out of shared memory before its means are known, {pair(early, LARGE)}; slots of 2 rows instead of 4,
  {pair(halves + ", first rows early", LARGE)}; 16 blocks, {once["c16 k12", LARGE]["us"]:.1f} forward where 8 took {once["c8", LARGE]["us"]:.1f}; hints to the L2 cache cost {hints:.1f}
  ([figures](../benchmarks/results/merge_clusters_h200_2026-11-29_first.json)). Starting while the kernel before ends
  gave {way["clusters", LARGE]["us"]:.1f} → {way["clusters, started while the kernel before ends, first rows early", LARGE]["us"]:.1f} forward after a kernel of the same kind; what it does after others was not measured.
"""  # noqa: E501


def _pair(times: list[float]) -> str:
    return " + ".join(f"{t:.1f}" for t in times)
