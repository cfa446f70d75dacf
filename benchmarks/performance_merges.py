"""What was tried for the merge with means, as lines of docs/performance.md (`performance_page.py`).

Units: microseconds.
"""

from __future__ import annotations

from typing import Any

LARGE, PIECE = "64 256 64", "26 256 64"  # samples, image and text tokens


def tried(found: dict[str, Any], forms: dict[str, Any], clusters: dict[str, Any]) -> str:
    """Lines on the forms that did not stay, from `merge_tried_h200`, `merge_forms_h200` and
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
    timed = {(row["form"], " ".join(map(str, row["size"]))): row["us"] for row in forms["rows"]}
    once = {(row["form"], " ".join(map(str, row["size"]))): row for row in clusters["rows"]}
    best = once["c8 plain", LARGE]
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
- Forward by clusters of eight blocks ([figures](../benchmarks/results/merge_clusters_h200_2026-11-29.json)):
  rows stay in shared memory, sums go from block to block, loads go on meanwhile. A first version was right
  and took {best["us"]:.1f} µs at 64 samples, {best["us"] / best["floor_us"]:.2f} times its bytes ({once["package", LARGE]["us"]:.1f} by blocks that wait, same run), and
  {once["c8 plain", PIECE]["us"]:.1f} at 26 ({once["package", PIECE]["us"]:.1f}). Hints to the L2 cache cost {once["c8", LARGE]["us"] - best["us"]:.1f} µs, clusters of 16 take {once["c16 k12", LARGE]["us"]:.1f}. With
  segments of 1024 tokens it did not always end. A version in which no warp can miss what it waits for, and
  a backward, have not run on a GPU: `mvsplit bench merge_forms` gates and times them.
"""  # noqa: E501


def _pair(times: list[float]) -> str:
    return " + ".join(f"{t:.1f}" for t in times)
