"""Writes docs/performance.md from the results in benchmarks/results/, or shows one as a table.

    mvsplit bench page [--check]    # writes docs/what-you-get.md as well, from the same results
    python benchmarks/performance_page.py --table FILE…    # of a script in `mvsplit bench`

--check writes nothing and fails where the page is not what the results give. Takes a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from performance_engine import engine
from performance_load import together, under_load
from performance_merges import forms, tried, tried_in_a_block
from performance_not_run import BACKEND, IN_CUDA, not_run, served, served_since
from performance_parallel import several
from performance_parts import NAMES, distance, fused, ideas, plans
from performance_planned import planned
from performance_products import product_ideas, products, since
from performance_step import (
    layers,
    learning,
    low_precision,
    masked,
    more_ideas,
    recipes,
    thousand,
    updates,
)
from performance_training import training
from performance_watch import watch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

Written by `mvsplit bench page` from [`benchmarks/results/`](../benchmarks/results),
so every figure is that of a file there. One NVIDIA H200, torch {torch}, Triton {triton}, bf16, D = 1024,
8 heads of 128, FFN 3072. *Released* is the code that came with the paper, run as it is; its figures and
those of cuDNN's attention were measured once by hand ([reference_h200.json](../benchmarks/results/reference_h200.json)).
`mvsplit bench --list` shows what can be measured again.
"""  # noqa: E501


def load(pattern: str) -> list[dict[str, Any]]:
    """The results whose names match, the oldest first; `_first` in a name means the older of a
    day."""
    paths = sorted(RESULTS.glob(pattern), key=lambda p: (not p.stem.endswith("_first"), p.stem))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(found, key=lambda result: result.get("date", ""))


def by_name() -> dict[str, dict[str, Any]]:
    """Results of which something is said for good, whatever is measured later."""
    paths = RESULTS.glob("train_step*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def merged(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One result in which later stages replace earlier ones, but for those that were not run; one
    with seconds or losses says of which run it is."""
    together: dict[str, Any] = {}
    for result in results:
        kept = {k: v for k, v in result.items() if not str(v).startswith("not run")}
        for name, stage in kept.items():
            if "date" in result and isinstance(stage, dict) and {"seconds", "gaps"} & stage.keys():
                kept[name] = stage | {"run": result["date"]}
        together |= kept
    return together


def beside_the_rival(results: Sequence[dict[str, Any]]) -> list[str]:
    """The stages of the latest run in which torch.compile was timed: no others are compared."""
    timed = [r for r in results if "seconds" in (r.get("compiled") or ())]
    return list(timed[-1]) if timed else []


def rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of fused_ops, the latest of each op and shape."""
    latest = {
        (r["op"], *r["shape"]): r
        | {"clusters_from": result.get("clusters_from"), "run": result.get("date")}
        for result in results
        for r in result["rows"]
    }
    return sorted(latest.values(), key=lambda row: list(NAMES).index(row["op"]))


def ways_together(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The rows of masked_attention, each with the latest measurement of every way."""
    found: dict[str, Any] = {}
    for result in results:
        before = {tuple(row["shape"]): row["ways"] for row in found.get("rows", [])}
        rows = [r | {"ways": before.get(tuple(r["shape"]), {}) | r["ways"]} for r in result["rows"]]
        found = result | {"rows": rows}
    return found


def page() -> str:
    ops = load("fused_ops_*h200_*.json")
    steps = load("train_step_h200_*.json")
    graphs = merged(steps) | {
        "beside the rival": beside_the_rival(steps),
        "runs": load("train_step*_h200_*.json"),
    }
    eager = merged(load("train_step_eager_h200_*.json"))
    reference = json.loads((RESULTS / "reference_h200.json").read_text(encoding="utf-8"))
    padded = ways_together(load("masked_attention_h200_*.json"))
    recipe = recipes(load("recipe_h200_*.json"))
    all_deep = load("thousand_layers_h200_*.json")
    deep = merged(all_deep) | {"thousand": learning(all_deep)}
    clusters = merged(load("merge_clusters_h200_*.json"))
    classes = together(load("step_classes_h200_*.json"))
    fused_products = load("ffn_products_h200_*.json")[-1]
    head = HEAD.format(torch=graphs["torch"].partition("+")[0], triton=ops[-1]["triton"])
    parts = (
        head,
        fused(rows(ops))
        + "\n"
        + forms(clusters, rows(ops), *load("merge_long_h200_2026-11-30T1416.json")),
        products(fused_products),
        training(graphs, reference) + updates(graphs) + layers(graphs),
        thousand(deep, all_deep),
        under_load(classes),
        masked(
            padded,
            *load("masked_attention_h200_*_first.json"),
            *load("masked_race_h200_*.json"),
            since=served_since(load("step_classes_h200_*.json"), BACKEND),
        ),
        low_precision(recipe, graphs, merged(load("low_moments_cpu_*.json"))),
        plans(graphs, eager, deep)
        + planned(load("ffn_products_h200_*.json"), load("step_classes_h200_*.json")),
        distance(graphs, eager, classes),
        engine(load("engine_h200_*.json")),
        watch(merged(load("watch_cost_h200_*.json"))),
        several(
            merged(load("parallel_step_h200*.json")),
            merged(load("eight_gpus_h200x*.json")),
            merged(load("eight_gpus_predicted.json")),
        ),
        ideas(
            by_name(),
            eager,
            reference,
            rows(ops),
            product_ideas(by_name(), fused_products, classes) + more_ideas(deep, padded),
        )
        + tried(
            merged(load("merge_tried_h200_*.json")),
            merged(load("merge_forms_h200_*.json")),
            clusters,
            *load("merge_clusters_h200_*_first.json"),
        )
        + tried_in_a_block(
            *load("step_tried_h200_*.json"), load("attention_gradients_h200_*.json")[-1]
        ),
        not_run(
            {
                **graphs,
                **deep,
                "masked": padded,
                "recipe": recipe,
                **since(classes, fused_products, deep),
                IN_CUDA: served(
                    together([classes, *load("attention_gradients_h200_*.json")]), BACKEND
                ),
            }
        ),
    )
    return "\n".join(part for part in parts if part)


def table(paths: Sequence[Path]) -> str:
    """What the page says of such results."""
    found = merged(json.loads(path.read_text(encoding="utf-8")) for path in paths)
    if any("gate" in row for row in found.get("rows", ())):
        return products(found) or json.dumps(found, indent=1)
    if any("ways" in row for row in found.get("rows", ())):
        return masked(found, {})
    if "rows" in found and isinstance(found["rows"], dict):
        return under_load(found)
    if "step bf16" not in found and ("thousand" in found or "resume" in found):
        return thousand(found) or json.dumps(found, indent=1)
    if "share_at_cadence" in found:
        return watch(found)
    if "gaps" in found:
        return low_precision(found, {})
    if "copy_bytes_per_second" in found:
        return fused(found["rows"])
    if any(name.startswith("pictures") for name in found):
        return engine([found])
    reference = json.loads((RESULTS / "reference_h200.json").read_text(encoding="utf-8"))
    return training(found, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--table", type=Path, nargs="+")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.check:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE.name} is not what the results give: mvsplit bench page writes it")
    else:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
