"""Puts the results of benchmarks/video.py together, and writes them into docs/video.md.

    python benchmarks/video_page.py --collect OUT/*.json     # into one result
    python benchmarks/video_page.py [--check]                # tables and plots from it

In the page a part that begins with <!-- NAME --> and ends with <!-- end --> is that of the results.
--check writes nothing and fails where it is not. Takes two seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import clips_reader
from video_frames import FRAMES, LOOKS, exponent

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "video_h200_2026-11-28.json"
READER = ROOT / "benchmarks" / "results" / "clips_reader_h200_2026-11-28.json"
PAGE = ROOT / "docs" / "video.md"
PLOT = ROOT / "docs" / "video" / "frames.png"
WRITERS = {"attn": "W_O", "ffn": "W_2"}
Row = dict[str, Any]


def collect(paths: Sequence[Path]) -> None:
    """One result of all runs; a part that is run again replaces what was there."""
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for name in {part["part"] for part in parts}:
        same = sorted((p for p in parts if p["part"] == name), key=lambda p: str(p["runs"][:1]))
        about = {key: same[0][key] for key in ("date", "torch", "gpu", "gates")}
        result[name] = about | {"runs": [run for part in same for run in part["runs"]]}
    RESULT.write_text(compact(result) + "\n", encoding="utf-8")


def compact(result: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    parts = []
    for name, part in result.items():
        about = json.dumps({key: value for key, value in part.items() if key != "runs"})
        runs = ",\n    ".join(json.dumps(run) for run in part["runs"])
        parts.append(f'  "{name}": {about[:-1]}, "runs": [\n    {runs}\n  ]}}')
    return "{\n" + ",\n".join(parts) + "\n}"


def look(row: Row, step: int) -> Row:
    return next(look for look in row["looks"] if look["step"] == step)


def of(result: Row, variant: str, frames: int) -> list[Row]:
    """The runs of all seeds."""
    runs = result["frames"]["runs"]
    return [r for r in runs if (r["variant"], r["frames"]) == (variant, frames)]


def ratio(row: Row, writer: str, step: int = 1) -> float:
    there = look(row, step)
    return there[f"g_mean_{writer}"] / there[f"g_ctr_{writer}"]


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Mean, and half of the range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):{form}} ± {half:.1g}"


def start_table(result: Row) -> str:
    """The gradients of the networks as they were drawn."""
    lines = [
        "| frames | tokens | plain: F·G_mean in W_O | F·G_ctr | ratio, W_O | ratio, W_2 | plain, "
        "standard writers: ratio, W_O | ratio, W_2 | MV-Split: ratio, W_O |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for frames in FRAMES:
        plain, standard, split = (
            of(result, name, frames) for name in ("plain", "plain, standard writers", "mvsplit")
        )
        cells = [
            *(
                spread([frames * look(r, 1)[f"{g}_attn"] for r in plain])
                for g in ("g_mean", "g_ctr")
            ),
            *(spread([ratio(r, writer) for r in plain]) for writer in WRITERS),
            *(spread([ratio(r, writer) for r in standard]) for writer in WRITERS),
            f"{max(ratio(r, 'attn') for r in split):.0e}",
        ]
        lines.append(f"| {frames} | {16 * frames} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exponent_table(result: Row) -> str:
    """k of Fᵏ from 1 to 32 frames, mean over the seeds and half of their range."""
    lines = [
        "| network | writer | F·G_mean | F·G_ctr | ratio |",
        "|---|---|---|---|---|",
    ]
    for variant in ("plain", "plain, standard writers"):
        for writer, name in WRITERS.items():
            cells = []
            for value in (
                lambda r, w: r["frames"] * look(r, 1)[f"g_mean_{w}"],
                lambda r, w: r["frames"] * look(r, 1)[f"g_ctr_{w}"],
                lambda r, w: ratio(r, w),
            ):
                series = zip(*(of(result, variant, frames) for frames in FRAMES), strict=True)
                found = [
                    exponent(list(FRAMES), [value(row, writer) for row in rows]) for rows in series
                ]
                cells.append(spread(found, ".2f"))
            lines.append(f"| {variant} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(result: Row) -> str:
    """The first steps: the largest ratio met, and where the networks stand at the end."""
    lines = [
        "| frames | plain: largest ratio in W_O | in W_2 | similarity at the end | loss | "
        "MV-Split: largest ratio in W_O | in W_2 | similarity at the end | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for frames in FRAMES:
        cells = []
        for variant in ("plain", "mvsplit"):
            rows = of(result, variant, frames)
            for writer in WRITERS:
                peaks = [max(ratio(r, writer, x["step"]) for x in r["looks"]) for r in rows]
                cells.append(spread(peaks))
            cells.append(spread([look(r, LOOKS[-1])["tcs_deep"] for r in rows], ".2f"))
            cells.append(spread([statistics.mean(r["losses"][-8:]) for r in rows], ".3f"))
        lines.append(f"| {frames} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means_table(result: Row) -> str:
    """What each choice of mean reaches: mean over the seeds, and half of their range."""
    runs = result["means"]["runs"]
    scores = ("exact", "objects", "direction", "speed", "bounce")
    lines = [
        f"| `model.mean` | validation loss | {' | '.join(scores)} |",
        "|---|---|" + "---|" * len(scores),
    ]
    for mean in ("clip", "frame", "sequence"):
        rows = [run for run in runs if run["mean"] == mean]
        cells = [
            spread([100 * r["guidance 2"][f"clip_{score}"] for r in rows], ".1f")
            for score in scores
        ]
        loss = spread([r["validation_loss"] for r in rows], ".4f")
        lines.append(f"| `{mean}` | {loss} | {' | '.join(f'{c} %' for c in cells)} |")
    return "\n".join(lines)


def preset_table(result: Row) -> str:
    """What the presets draw."""
    lines = [
        "| preset | where | steps | seconds | validation loss | guidance | exact | objects | "
        "direction | speed | bounce | occlusion |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("exact", "objects", "direction", "speed", "bounce", "occlusion")
    for run in result["preset"]["runs"]:
        where = "H200" if run["device"] == "cuda" else f"{run['threads']} cores"
        for key in (key for key in run if key.startswith("guidance ")):
            found = [run[key].get(f"clip_{name}") for name in names]
            cells = ["" if v is None else f"{v:.0%}" for v in found]
            lines.append(
                f"| `{run['preset']}` | {where} | {run['step']:,} | {run['seconds']:.0f} | "
                f"{run['validation_loss']:.3f} | {key.removeprefix('guidance ')} | "
                f"{' | '.join(cells)} |"
            )
    return "\n".join(lines)


def reader_table(_: Row) -> str:
    rows = json.loads(READER.read_text(encoding="utf-8"))["rows"]
    return clips_reader.table(rows)


PARTS: dict[str, Callable[[Row], str]] = {
    "reader": reader_table,
    "start": start_table,
    "exponents": exponent_table,
    "training": training_table,
    "means": means_table,
    "presets": preset_table,
}


def page(text: str, result: Row) -> str:
    """The page with its parts written anew."""
    for name, table in PARTS.items():
        block = f"<!-- {name} -->\n{table(result)}\n<!-- end -->"
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, b=block: b, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{PAGE.name}: {found} parts are called {name}; there should be one")
    return text


def plot(result: Row, path: Path) -> None:
    """The ratio at the start over the frames, and over the first steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    styles = {"plain": ("tab:red", "-"), "plain, standard writers": ("tab:orange", "--")}
    for variant, (colour, line) in styles.items():
        for writer, name in WRITERS.items():
            seeds = zip(*(of(result, variant, frames) for frames in FRAMES), strict=True)
            for number, rows in enumerate(seeds):
                label = f"{variant}, {name}" if number == 0 else None
                marker = "o" if writer == "attn" else "x"
                values = [ratio(row, writer) for row in rows]
                left.plot(FRAMES, values, line, color=colour, marker=marker, label=label, alpha=0.7)
    first = statistics.mean(ratio(r, "attn") for r in of(result, "plain", 1))
    left.plot(FRAMES, [first * f**0.5 for f in FRAMES], ":", color="gray", label="√F")
    left.set(xscale="log", yscale="log", xlabel="frames F", title="as drawn")
    left.set_ylabel("G_mean / G_ctr")
    left.legend(frameon=False, fontsize=7)
    for variant, colours in (("plain", "Reds"), ("mvsplit", "Blues")):
        shade = pyplot.get_cmap(colours)
        for number, frames in enumerate(FRAMES):
            rows = of(result, variant, frames)
            values = [statistics.mean(ratio(r, "attn", s) for r in rows) for s in LOOKS]
            label = f"{variant}, {frames}" if frames in (FRAMES[0], FRAMES[-1]) else None
            right.plot(LOOKS, values, color=shade(0.35 + 0.12 * number), label=label, marker=".")
    right.set(
        xscale="log", yscale="log", xlabel="step", title="W_O, first steps", ylim=(1e-4, None)
    )
    right.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--collect", type=Path, nargs="+", help="parts that benchmarks/video.py wrote"
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
        return
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    written = page(text, result)
    if args.check:
        raise SystemExit(0 if written == text else f"{PAGE.name} is not what the results give")
    PAGE.write_text(written, encoding="utf-8")
    plot(result, PLOT)


if __name__ == "__main__":
    main()
