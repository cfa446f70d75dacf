"""The results of `dpo_digits.py` and `dpo.py` as docs/alignment.md shows them.

python benchmarks/dpo_page.py --collect SEED0.jsonl SEED1.jsonl … --json RESULT
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

SFT = "SFT"
Row = dict[str, Any]
RIGHT = {"digits": "digit_accuracy", "shapes": "held_right"}
FRECHET = {"digits": "digit_frechet", "shapes": "held_frechet"}
DIGITS = {"digits": 3, "shapes": 4}  # behind the point of a Fréchet distance


def collected(files: Iterable[Path]) -> dict[str, Any]:
    """One result of the lines that each seed of `dpo.py` has written.

    Raises AssertionError where DPO did not begin at log 2, or the seeds are no repeats of one run.
    """
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert all(row.get("gate", True) for row in rows), "DPO did not begin at log 2"
    every = [row for row in rows if row["way"] == "machine"]
    fields = {name: v for name, v in every[0].items() if name not in ("way", "seed")}
    for name in fields.keys() - {"command", "date"}:
        assert all(other.get(name) == fields[name] for other in every), f"{name} differs"
    return {**fields, "rows": [row for row in rows if row["way"] != "machine"]}


def kind(result: dict[str, Any]) -> str:
    """Digits or shapes."""
    scored = next(row for row in result["rows"] if "scores" in row)
    return next(name for name, score in RIGHT.items() if score in scored["scores"])


def of(result: dict[str, Any], way: str) -> list[Row]:
    """The rows of a way, a seed each."""
    return [row for row in result["rows"] if row["way"] == way]


def names(result: dict[str, Any]) -> list[str]:
    """The ways that all seeds had time for, in the order in which they were run."""
    seeds = {row["seed"] for row in of(result, SFT)}
    ways = dict.fromkeys(r["way"] for r in result["rows"] if "scores" in r)
    return [way for way in ways if {row["seed"] for row in of(result, way)} == seeds]


def validated(result: dict[str, Any]) -> bool:
    """Whether there are captions of which one way was chosen."""
    return "valid_right" in of(result, SFT)[0]["scores"]


def shown(result: dict[str, Any]) -> list[str]:
    """The ways that the tables have: all, but of those part of the way the chosen one alone."""
    best = reported(result)
    return [way for way in names(result) if way == best or "share" not in of(result, way)[0]]


def reported(result: dict[str, Any]) -> str:
    """The way that is spoken of: the chosen one, or the last."""
    return chosen(result) if validated(result) else names(result)[-1]


def gains(result: dict[str, Any], way: str, score: str) -> list[float]:
    """By how much a score of each seed is above that of its SFT model."""
    before = {row["seed"]: row["scores"][score] for row in of(result, SFT)}
    return [row["scores"][score] - before[row["seed"]] for row in of(result, way)]


def chosen(result: dict[str, Any]) -> str:
    """The way that the validation prefers: of the DPO ways whose Fréchet distance there is above
    that of SFT by no more than other noise makes of it, the one that gains most there, both as
    means over the seeds; where there is none, the one whose Fréchet distance rises least. Written
    before the runs that it chooses from."""
    noise = max(map(abs, gains(result, "SFT, other noise", "valid_frechet")))

    def gain(way: str, score: str) -> float:
        return statistics.mean(gains(result, way, f"valid_{score}"))

    ways = [way for way in names(result) if way.startswith("DPO")]
    kept = [way for way in ways if gain(way, "frechet") <= noise]
    if not kept:
        return min(ways, key=lambda way: gain(way, "frechet"))
    return max(kept, key=lambda way: gain(way, "right"))


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Mean, and least and most."""
    return f"{form(statistics.mean(values))} ({form(min(values))} … {form(max(values))})"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(result: dict[str, Any]) -> str:
    """Each way: mean over the seeds, and in brackets least and most; the validation as means."""
    right, frechet = RIGHT[kind(result)], FRECHET[kind(result)]
    digits = DIGITS[kind(result)]
    heads = ["way", "drawn right, %", "gain, points", "Fréchet", "its change"]
    heads += ["ℓ_θ − ℓ_ref, w", "… l"]
    heads += ["validation: gain", "Fréchet's change"] if validated(result) else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way in shown(result):
        rows, later = of(result, way), way != SFT
        lasts = [last for row in rows if "margin" in (last := last_of(row))]
        moved = [
            f"{statistics.mean(r[f'loss_{w}'] - r[f'reference_{w}'] for r in lasts):+.4f}"
            if lasts
            else ""
            for w in ("chosen", "rejected")
        ]
        cells = [
            spread([row["scores"][right] for row in rows], percent),
            spread(gains(result, way, right), lambda v: f"{100 * v:+.1f}") if later else "",
            spread([row["scores"][frechet] for row in rows], f"{{:.{digits}f}}".format),
            spread(gains(result, way, frechet), f"{{:+.{digits}f}}".format) if later else "",
        ]
        if validated(result):
            gained, changed = (
                statistics.mean(gains(result, way, f"valid_{score}"))
                for score in ("right", "frechet")
            )
            moved += [f"{100 * gained:+.1f}", f"{changed:+.{digits}f}"] if later else ["", ""]
        lines.append(f"| {' | '.join([way, *cells, *moved])} |")
    return "\n".join(lines)


def last_of(row: Row) -> Row:
    """The numbers of the last steps."""
    return row["last"] if "last" in row else row.get("curve", [{}])[-1]


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
    for way in shown(result):
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
    return f"{pairs:,} pairs of {asked:,} captions over {len(rows)} seeds"


def gain_line(result: dict[str, Any], way: str) -> str:
    """What a way gains and what it does to fidelity and to the mean mode, in words."""
    which = kind(result)
    right, frechet, digits = RIGHT[which], FRECHET[which], DIGITS[which]

    def means(value: Callable[[Row], float], form: str) -> str:
        before, after = (statistics.mean(map(value, of(result, name))) for name in (SFT, way))
        return f"{before:{form}} → {after:{form}}"

    gained = [100 * v for v in gains(result, way, right)]
    noise = max(map(abs, gains(result, "SFT, other noise", frechet)))
    ratios = [
        means(lambda row, w=w: deep(row, f"g_mean_{w}", f"g_ctr_{w}"), ".2f")
        for w in ("attn", "ffn")
    ]
    return (
        f"{way}: {statistics.mean(gained):+.1f} points ({min(gained):+.1f} … {max(gained):+.1f}); "
        f"Fréchet {means(lambda row: row['scores'][frechet], f'.{digits}f')}, where other noise "
        f"moves it by {noise:.{digits}f} at most; "
        f"TCS {means(lambda row: deep(row, 'tcs'), '.3f')}; "
        f"G_mean / G_ctr {ratios[0]} in attention and {ratios[1]} in the FFN."
    )


def cost_line(result: dict[str, Any]) -> str:
    """The seconds of all that was run for each seed, in words."""
    seeds = sorted({row["seed"] for row in of(result, SFT)})
    spent = [sum(r.get("seconds", 0.0) for r in result["rows"] if r["seed"] == s) for s in seeds]
    return f"{', '.join(f'{seconds:.0f}' for seconds in spent)} s for the seeds"


def plot(result: dict[str, Any], path: Path) -> None:
    """What each way gains and what it does to the Fréchet distance, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 3.6))
    for way in shown(result)[1:]:
        right = [100 * v for v in gains(result, way, RIGHT[kind(result)])]
        axis.scatter(gains(result, way, FRECHET[kind(result)]), right, label=way, s=28)
    axis.axhline(0, color="gray", linewidth=0.6)
    axis.axvline(0, color="gray", linewidth=0.6)
    axis.set(xlabel="change of the Fréchet distance", ylabel="gain in drawn right, points")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collect", type=Path, nargs="*", help="lines that dpo.py has written")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.collect:
        result = collected(options.collect)
        options.json.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    result = json.loads(options.json.read_text())
    for part in (table, layer_table, pair_line, cost_line):
        print(part(result), end="\n\n")
    for way in shown(result)[2:] if "SFT, other noise" in names(result) else ():
        print(gain_line(result, way))
    if validated(result):
        print(f"\nchosen on the validation: {chosen(result)}")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
