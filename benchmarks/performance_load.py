"""The section of docs/performance.md on what the card's power allows (`performance_page.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from performance_parts import WAITS, markdown

from mvsplit.training.gpus import GPUS

Found = dict[str, Any]
KINDS = (
    "matrix products", "products with what follows", "attention", "merges", "SwiGLU",
    "QK-norm and rotation",
)  # fmt: skip
# Their forward stays in the product.
_CALLED = {"norm and rotation on their own": "gradients of norm and rotation on their own"}


def together(results: Iterable[Found]) -> Found:
    """The rows of step_classes, the latest of each name; `zero`: of one run, a block with writers
    of zeros and the same with others; `pairs`: a block as it is and with one thing otherwise, both
    of one run, the latest of each thing and of each that changed nothing."""
    found: Found = {}
    for result in results:
        found.pop("note", None)  # it is of an earlier run
        names = [name for name in result["rows"] if name.endswith(", zero writers")]
        pairs = [(name, name.removesuffix(", zero writers")) for name in names]
        pair = {"zero": [[result["rows"][n] for n in pair] for pair in pairs]} if pairs else {}
        rows = {name: row | {"run": result["date"]} for name, row in result["rows"].items()}
        both = {
            "rows": found.get("rows", {}) | rows,
            "pairs": found.get("pairs", {}) | _pairs(rows),
        }
        found = found | result | both | pair
    return found


def _pairs(rows: Found) -> dict[tuple[str, bool], tuple[Found, Found]]:
    """Of one run, by the name of what was otherwise and whether that is what serves anyway."""
    found = {}
    for name, row in rows.items():
        way = _way(name)
        base = rows.get(name.removesuffix(f", {way}")) if way else None
        if base is not None:
            backends = [r.get("attention_backend") for r in (row, base)]
            same = "attention" in way and None not in backends and backends[0] == backends[1]
            found[name, same] = (base, row)
    return found


def under_load(found: Found) -> str:
    """A block of the training step after seconds of work."""
    if not found.get("rows"):
        return ""
    if any("run" not in row for row in found["rows"].values()):  # one result alone
        found = together([found])
    shown = {name: row for name, row in found["rows"].items() if not _way(name)}
    kinds = [kind for kind in KINDS if any(kind in row["by_kind_us"] for row in shown.values())]
    rows = [_row(name, row, kinds) for name, row in shown.items()]
    head = ("samples × tokens, computed again", "run", "µs a block", "a 1,000 tokens", "MHz", "W")
    gpu = GPUS["h200"]
    return f"""## What the card's power allows

Blocks of D = 1024 forward and backward from a graph, after a second of the same: time, clock and power,
then kernels by kind in a short profile, whose clock is higher. Masked: captions of unequal lengths. Merges:
without the launch that adds up the gradients of gains, which begins while the merge runs and waits for it.
Runs differ in their kernels. –: none, for another does it, as [products](#products-with-what-follows-them) do, or gradients
of attention, which go on to the projection.

{markdown((*head, *kinds), rows)}
The card's power, 700 W at most, holds its clock down in every row{_zeros(found)}. Under load products reach {gpu.under_load / 1e12:.0f} TFLOP/s instead of {gpu.products / 1e12:.0f},
whether 3,456 tokens or 8,352. So pieces that fill the GPU a whole number of times gain little
(29 samples at 1000 layers were no faster than 32), and what takes energy takes time.
{_rule_cost(found)}{_changes(found)}{_notes(found)}"""  # noqa: E501


def _rule_cost(found: Found) -> str:
    """What part of a block the rule's two merges are, of the latest row as it is."""
    rows = [(n, r) for n, r in found["rows"].items() if not _way(n) and "zero writers" not in n]
    if not rows:
        return ""
    name, row = max(rows, key=lambda each: (each[1]["run"], each[1]["tokens"]))
    mine = row["by_kind_us"].get("merges", 0.0)
    waits = sum(t for kernel, t in row["by_kernel_us"].items() if WAITS in kernel)
    return f"""
What the rule costs in a step: of {row["kernels_us"]:.0f} µs of kernels of a block ({name}; {row["run"].replace("T", " ")}) its two merges,
norms in them, take {mine - waits:.0f} µs, {(mine - waits) / row["kernels_us"]:.1%}, forward and backward.
"""  # noqa: E501


def _notes(found: Found) -> str:
    """What is to be known of the latest run."""
    if "note" not in found:
        return ""
    return f"\nOf the run of {found['date'].replace('T', ' ')}: {found['note']}\n"


def _zeros(found: Found) -> str:
    """What writers of zeros are worth, of one run's rows."""
    if "zero" not in found:
        return ""
    ((zero, full),) = found["zero"]
    more = full["us"] / zero["us"] - 1
    return (
        f", least in the first: with random\nnumbers a block took {more:.0%} longer than where the "
        "writers are zero, as they are when training begins, and\nhalf of backward's products "
        "multiply zeros"
    )


def _way(name: str) -> str:
    """What is otherwise in a row, the third part of its name."""
    _, _, *rest = name.split(", ", 2)
    return rest[0] if rest and rest[0] != "zero writers" else ""


def _changes(found: Found) -> str:
    """What each change gives, of rows of one run: with everything, and with one thing otherwise."""
    lines = []
    for (name, same), (base, row) in sorted(found.get("pairs", {}).items(), key=lambda p: p[0]):
        samples, again, way = name.split(", ", 2)
        way = _CALLED.get(way, way) + (" (as it is anyway: a repeat)" if same else "")
        us = [f"{r['us']:.0f}" for r in (base, row)]
        run = row["run"].replace("T", " ")
        lines.append([samples, again, run, way, *us, f"{row['us'] / base['us'] - 1:+.1%}"])
    if not lines:
        return ""
    head = ("samples × tokens", "computed again", "run", "otherwise", "µs as it is")
    head = (*head, "µs otherwise", "")
    return f"""
What a change gives, under load: a block as it is, and with one thing otherwise, one after the other in one run, the
latest in which both were. A repeat shows what two times of the same block differ by.

{markdown(head, lines)}"""  # noqa: E501


def _row(name: str, row: Found, shown: Sequence[str]) -> list[str]:
    load = row["load"]
    us = dict(row["by_kind_us"])
    us["merges"] -= sum(t for kernel, t in row["by_kernel_us"].items() if WAITS in kernel)
    kinds = [f"{us[kind]:.0f}" if kind in us else "–" for kind in shown]
    each = [f"{row['us']:.0f}", f"{row['us_per_1000_tokens']:.0f}"]
    run = row["run"].replace("T", " ")
    return [name, run, *each, f"{load['sm_mhz']:.0f}", f"{load['watts']:.0f}", *kinds]
