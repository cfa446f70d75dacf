"""The results of `dpo.py`, collected from the lines of all seeds, and as docs/alignment.md shows
them: the tables, and a plot of the deep layers before and after.

    python benchmarks/dpo_page.py --collect SEED0.jsonl SEED1.jsonl … --json RESULT [--base LOG]
    python benchmarks/dpo_page.py --json RESULT [--plot docs/alignment.png]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SFT = "SFT"
Row = dict[str, Any]


def collected(files: Iterable[Path], base: Path | None) -> dict[str, Any]:
    """One result of the lines that each seed has written."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    machine = next(row for row in rows if row["way"] == "machine")
    stages = (
        [] if base is None else [line for line in base.read_text().splitlines() if line[:1] == "{"]
    )
    return {
        **{name: v for name, v in machine.items() if name not in ("way", "seed")},
        "base": [row for row in map(json.loads, stages) if "scores" in row and "stage" in row],
        "rows": [row for row in rows if row["way"] != "machine"],
    }


def of(result: dict[str, Any], way: str) -> list[Row]:
    """The rows of a way, a seed each."""
    return [row for row in result["rows"] if row["way"] == way]


def names(result: dict[str, Any]) -> list[str]:
    """The ways in the order in which they were run."""
    return list(dict.fromkeys(r["way"] for r in result["rows"] if "scores" in r))


def gains(result: dict[str, Any], way: str, score: str) -> list[float]:
    """By how much a score of each seed is above that of its SFT model."""
    before = {row["seed"]: row["scores"][score] for row in of(result, SFT)}
    return [row["scores"][score] - before[row["seed"]] for row in of(result, way)]


def best(result: dict[str, Any]) -> str:
    """The way of DPO that gains most on average; the two controls are no DPO."""
    ways = [way for way in names(result) if way.startswith("dpo")]
    return max(ways, key=lambda way: statistics.mean(gains(result, way, "geneval_mean")))


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Mean, and least and most."""
    return f"{form(statistics.mean(values))} ({form(min(values))} … {form(max(values))})"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(result: dict[str, Any]) -> str:
    """Each way: mean over the seeds, and in brackets least and most."""
    lines = [
        "| way | β | rate | steps | drawn right, % | gain, points | caption exact, % | Fréchet |"
        " its change |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in names(result):
        rows = of(result, way)
        fields = [str(rows[0].get(name, "")) for name in ("beta", "lr", "steps")]
        right, exact, frechet = (
            [row["scores"][name] for row in rows]
            for name in ("geneval_mean", "caption_exact", "shapes_frechet")
        )
        moved = gains(result, way, "shapes_frechet")
        cells = [
            spread(right, percent),
            "" if way == SFT else spread(gains(result, way, "geneval_mean"), percent),
            percent(statistics.mean(exact)),
            spread(frechet, "{:.4f}".format),
            "" if way == SFT else spread(moved, "{:+.4f}".format),
        ]
        lines.append(f"| {' | '.join([way, *fields, *cells])} |")
    return "\n".join(lines)


def task_table(result: dict[str, Any]) -> str:
    """SFT and the best way of DPO by task, means over the seeds."""
    way = best(result)
    lines = [f"| task | SFT, % | {way}, % | gain, points |", "|---|---|---|---|"]
    for task in TASKS:
        before, after = (
            statistics.mean(row["scores"][f"geneval_{task}"] for row in of(result, name))
            for name in (SFT, way)
        )
        cells = [percent(before), percent(after), percent(after - before)]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def deep(row: Row, field: str, other: str | None = None) -> float:
    """The mean over the deepest quarter of the layers of a field, or of its ratio to another;
    geometric where it is a ratio."""
    values = row["layers"][field]
    if other is None:
        return statistics.mean(values[-(len(values) // 4) :])
    ratios = [a / b for a, b in zip(values, row["layers"][other], strict=True)]
    return math.exp(statistics.mean(map(math.log, ratios[-(len(ratios) // 4) :])))


def layer_table(result: dict[str, Any]) -> str:
    """The mean mode of the deepest quarter, before and after each way."""
    lines = [
        "| way | TCS | ρ | G_mean / G_ctr, attention | G_mean / G_ctr, FFN |",
        "|---|---|---|---|---|",
    ]
    number = "{:.3f}".format
    for way in names(result):
        cells = [
            spread([deep(row, *fields) for row in of(result, way)], number)
            for fields in (
                ("tcs",),
                ("rho",),
                ("g_mean_attn", "g_ctr_attn"),
                ("g_mean_ffn", "g_ctr_ffn"),
            )
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pair_line(result: dict[str, Any]) -> str:
    """How many pairs the captions gave, in words."""
    rows = of(result, "pairs")
    pairs, asked = (sum(row[name] for row in rows) for name in ("pairs", "captions"))
    kinds = " and ".join(
        f"{sum(row.get(kind, 0) for row in rows) / pairs:.0%} {kind}"
        for kind in ("2 over 0", "1 over 0", "2 over 1")
    )
    return f"{pairs:,} pairs of {asked:,} captions (points: {kinds})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Layers of SFT and of the best way; and the shares over all ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2))
    way = best(result)
    for name, colour in ((SFT, "tab:gray"), (way, "tab:blue")):
        for number, row in enumerate(of(result, name)):
            label, layers = (name if number == 0 else None), row["layers"]
            axes[0].plot(layers["layer"], layers["tcs"], color=colour, label=label, linewidth=1)
            pairs = zip(layers["g_mean_ffn"], layers["g_ctr_ffn"], strict=True)
            axes[1].plot(layers["layer"], [a / b for a, b in pairs], color=colour, linewidth=1)
    for row in of(result, way):
        steps = [line["step"] for line in row["curve"]]
        for field, colour in (("chosen", "tab:green"), ("rejected", "tab:red")):
            moved = [line[f"loss_{field}"] - line[f"reference_{field}"] for line in row["curve"]]
            label = field if row is of(result, way)[0] else None
            axes[2].plot(steps, moved, color=colour, label=label, linewidth=1)
    axes[0].set(xlabel="layer", ylabel="token cosine similarity")
    axes[1].set(xlabel="layer", ylabel="G_mean / G_ctr, FFN writer", yscale="log")
    axes[2].set(xlabel="step", ylabel="loss − loss of the reference")
    for axis in (axes[0], axes[2]):
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collect", type=Path, nargs="*", help="lines that dpo.py has written")
    parser.add_argument("--base", type=Path, help="what it printed of the base's training")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.collect:
        result = collected(options.collect, options.base)
        options.json.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    result = json.loads(options.json.read_text())
    for part in (table, task_table, layer_table, pair_line):
        print(part(result), end="\n\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
