"""Puts the results of benchmarks/video.py together, and writes them into docs/video.md.

    python benchmarks/video_page.py --collect OUT/*.json --into RESULT     # into one result
    python benchmarks/video_page.py [--check]                              # tables and plots

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
from video_frames import FRAMES, exponent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GPU, CPU = RESULTS / "video_h200_2026-11-29.json", RESULTS / "video_cpu_2026-11-28.json"
SHARED = RESULTS / "video_h200_2026-11-29_shared.json"  # beside a dozen of other processes
EARLIER = RESULTS / "video_h200_2026-11-28.json"
READER = RESULTS / "clips_reader_h200_2026-11-28.json"
PAGE = ROOT / "docs" / "video.md"
PLOT = ROOT / "docs" / "video" / "frames.png"
WRITERS = {"attn": "W_O", "ffn": "W_2"}
MEANS = ("clip", "frame", "sequence")
READ = {
    "objects": "objects",
    "direction": "direction",
    "speed": "speed",
    "bounce": "bounce",
    "in front": "occlusion",
    "all right": "exact",
}
ORDER = ("plain", "plain, standard writers", "mvsplit")
STEPS = (1, 2, 4, 8, 16)
Row = dict[str, Any]
Results = tuple[Row, ...]  # of the GPU, the last first, and of the CPU
WHERE = ("H200, D = 192", "H200, D = 192", "H200, D = 192", "CPU, D = 64")


def collect(paths: Sequence[Path], place: Path) -> None:
    """One result of all runs; a part that is run again replaces what was there."""
    result = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for name in {part["part"] for part in parts}:
        same = sorted((p for p in parts if p["part"] == name), key=lambda p: str(p["runs"][:1]))
        about = {key: same[0][key] for key in ("date", "torch", "gpu", "gates")}
        if any(p["gpu"] != about["gpu"] or p.get("note") != same[0].get("note") for p in same):
            raise SystemExit(f"{name}: on other GPUs, or beside other processes on them")
        about |= {"note": note} if (note := same[0].get("note")) else {}
        result[name] = about | {"runs": [run for part in same for run in part["runs"]]}
    place.write_text(compact(result) + "\n", encoding="utf-8")


def compact(result: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    parts = []
    for name, part in result.items():
        about = json.dumps({key: value for key, value in part.items() if key != "runs"})
        runs = ",\n    ".join(json.dumps(run) for run in part["runs"])
        parts.append(f'  "{name}": {about[:-1]}, "runs": [\n    {runs}\n  ]}}')
    return "{\n" + ",\n".join(parts) + "\n}"


def runs_of(result: Row, part: str) -> list[Row]:
    """The runs of a part, none where it was not run."""
    return result.get(part, {"runs": []})["runs"]


def look(row: Row, step: int) -> Row:
    return next(look for look in row["looks"] if look["step"] == step)


def rows_of(results: Results, variant: str, frames: int) -> list[Row]:
    """The runs of all seeds, of the first result that has them of all frames."""
    for result in results:
        runs = [run for run in runs_of(result, "frames") if run["variant"] == variant]
        if {run["frames"] for run in runs} == set(FRAMES):
            found = {run["seed"]: run for run in runs if run["frames"] == frames}
            return [found[seed] for seed in sorted(found)]
    raise SystemExit(f"no result has {variant} at all numbers of frames")


def ratio(row: Row, writer: str, step: int = 1) -> float:
    there = look(row, step)
    return there[f"g_mean_{writer}"] / there[f"g_ctr_{writer}"]


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Mean, and half of the range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):{form}} ± {half:.2g}"


def start_table(results: Results) -> str:
    """The gradients of the networks as they were drawn."""
    lines = [
        "| frames | tokens | writers zero: F·G_mean, W_O | F·G_ctr, W_O | ratio, W_O | ratio, W_2 "
        "| writers standard: ratio, W_O | ratio, W_2 | MV-Split: ratio, W_O |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for frames in FRAMES:
        plain, standard, split = (rows_of(results, name, frames) for name in ORDER)
        parts = ("g_mean_attn", "g_ctr_attn")
        cells = [
            *(spread([frames * look(r, 1)[part] for r in plain]) for part in parts),
            *(spread([ratio(r, writer) for r in plain]) for writer in WRITERS),
            *(spread([ratio(r, writer) for r in standard]) for writer in WRITERS),
            f"{max(ratio(r, 'attn') for r in split):.0e}",
        ]
        lines.append(f"| {frames} | {16 * frames} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exponent_table(results: Results) -> str:
    """k of Fᵏ from 1 to 32 frames, mean over the seeds and half of their range."""
    lines = [
        "| plain network, writers | writer | F·G_mean | F·G_ctr | ratio |",
        "|---|---|---|---|---|",
    ]
    values: tuple[Callable[[Row, str], float], ...] = (
        lambda row, writer: row["frames"] * look(row, 1)[f"g_mean_{writer}"],
        lambda row, writer: row["frames"] * look(row, 1)[f"g_ctr_{writer}"],
        ratio,
    )
    for variant, start in zip(ORDER[:2], ("zero", "standard"), strict=True):
        for writer, name in WRITERS.items():
            cells = []
            for value in values:
                seeds = zip(*(rows_of(results, variant, f) for f in FRAMES), strict=True)
                found = [exponent(list(FRAMES), [value(r, writer) for r in rows]) for rows in seeds]
                cells.append(spread(found, ".2f"))
            lines.append(f"| {start} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(results: Results) -> str:
    """The first steps: the ratio in W_O and the similarity, means over the seeds."""
    lines = [
        f"| network | where | frames | seeds | {' | '.join(f'step {s}' for s in STEPS)} "
        "| loss at the end (step) |",
        "|---|---|---|---|" + "---|" * (len(STEPS) + 1),
    ]
    known: set[tuple[str, str, int]] = set()
    for result, where in zip(results, WHERE, strict=True):
        runs = [run for run in runs_of(result, "frames") if len(run["losses"]) >= STEPS[-1]]
        for variant, frames in sorted({(run["variant"], run["frames"]) for run in runs}):
            if (where, variant, frames) in known:
                continue
            known.add((where, variant, frames))
            rows = [r for r in runs if (r["variant"], r["frames"]) == (variant, frames)]
            cells = [
                f"{statistics.geometric_mean([ratio(r, 'attn', s) for r in rows]):.2g}, "
                f"{statistics.mean(look(r, s)['tcs_deep'] for r in rows):.2f}"
                for s in STEPS
            ]
            ends = [row["losses"][-1] for row in rows]
            cells.append(f"{min(ends):.2f} … {max(ends):.2f} ({len(rows[0]['losses'])})")
            lines.append(f"| {variant} | {where} | {frames} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means_table(results: Results, size: str) -> str:
    """The validation loss with each choice of mean, of each seed, of the last results that compare
    them at this size; and the share of clips whose direction the reader found to be as asked, where
    samples were drawn."""
    parts = [runs_of(result, "means") for result in results]
    runs = next(p for p in parts if {r["mean"] for r in p if r.get("size") == size} == {*MEANS})
    seeds = sorted({run["seed"] for run in runs})
    drawn = all("guidance 2" in run for run in runs)
    heads = [*(f"seed {seed}" for seed in seeds), *(["direction as asked"] if drawn else [])]
    lines = [f"| `model.mean` | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for mean in MEANS:
        rows = sorted((r for r in runs if r["mean"] == mean), key=lambda run: run["seed"])
        cells = [f"{row['validation_loss']:.4f}" for row in rows]
        if drawn:
            shares = [row["guidance 2"]["clip_direction"] for row in rows]
            cells.append(f"{statistics.mean(shares):.0%} ({min(shares):.0%} … {max(shares):.0%})")
        lines.append(f"| `{mean}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def preset_table(results: Results) -> str:
    """What a preset has learned, in which time."""
    lines = [
        f"| preset | learning rate | steps | validation loss | guidance | {' | '.join(READ)} |",
        "|---" * (5 + len(READ)) + "|",
    ]
    for run in (run for result in results for run in runs_of(result, "preset")):
        for key in (key for key in run if key.startswith("guidance ")):
            scores = [run[key].get(f"clip_{name}") for name in READ.values()]
            lines.append(
                f"| `{run['preset']}` | {run['lr']:g} | {run['step']:,} | "
                f"{run['validation_loss']:.3f} | {key.removeprefix('guidance ')} | "
                f"{' | '.join('' if score is None else f'{score:.0%}' for score in scores)} |"
            )
    return "\n".join(lines)


def prompts_line(results: Results) -> str:
    """What the contact sheet shows, row by row."""
    run = next(run for r in results for run in runs_of(r, "preset") if run["preset"] == "clips-12l")
    return "\n".join(f"{row}. {prompt}" for row, prompt in enumerate(run["prompts"], start=1))


def reader_table(_: Results) -> str:
    rows = json.loads(READER.read_text(encoding="utf-8"))["rows"]
    return clips_reader.table(rows)


def times_line(results: Results) -> str:
    """How long painting and a step take, in words."""
    painted, step = results[-1]["times"]["runs"]
    minutes = 1500 * step["seconds"] / 60
    return (
        f"{painted['painted']} clips of {painted['frames']} frames take "
        f"{1000 * painted['seconds']:.0f} ms of one core, and a step of `{step['step_of']}` with "
        f"{step['clips']} clips\n{step['seconds']:.2f} s of processor time (medians), so that its "
        f"1,500 steps are {minutes:.0f} minutes."
    )


PARTS: dict[str, Callable[[Results], str]] = {
    "times": times_line,
    "reader": reader_table,
    "start": start_table,
    "exponents": exponent_table,
    "training": training_table,
    "means": lambda results: means_table(results, "cpu"),
    "means of 12 layers": lambda results: means_table(results, "gpu"),
    "prompts": prompts_line,
    "presets": preset_table,
}


def page(text: str, results: Results) -> str:
    """The page with its parts written anew."""
    for name, table in PARTS.items():
        block = f"<!-- {name} -->\n{table(results)}\n<!-- end -->"
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        text, found = re.subn(pattern, lambda _, b=block: b, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{PAGE.name}: {found} parts are called {name}; there should be one")
    return text


def load() -> Results:
    """All results."""
    return tuple(
        json.loads(path.read_text(encoding="utf-8")) for path in (SHARED, GPU, EARLIER, CPU)
    )


def plot(results: Results, path: Path) -> None:
    """The ratio as the networks were drawn, over the frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.8))
    styles = (("tab:red", "zero"), ("tab:orange", "standard"))
    for variant, (colour, start) in zip(ORDER[:2], styles, strict=True):
        for writer, name in WRITERS.items():
            seeds = zip(*(rows_of(results, variant, frames) for frames in FRAMES), strict=True)
            for number, rows in enumerate(seeds):
                label = f"writers {start}, {name}" if number == 0 else None
                values = [ratio(row, writer) for row in rows]
                marker = "o" if writer == "attn" else "x"
                axis.plot(FRAMES, values, color=colour, marker=marker, label=label, alpha=0.7)
    first = statistics.mean(ratio(r, "attn") for r in rows_of(results, "plain", 1))
    axis.plot(FRAMES, [first * f**0.5 for f in FRAMES], ":", color="gray", label="√F")
    axis.set(xscale="log", yscale="log", xlabel="frames F", ylabel="G_mean / G_ctr, as drawn")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collect", type=Path, nargs="+", help="what benchmarks/video.py wrote")
    parser.add_argument("--into", type=Path, default=GPU, help="where that goes")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.into)
        return
    results, text = load(), PAGE.read_text(encoding="utf-8")
    written = page(text, results)
    if args.check:
        raise SystemExit(0 if written == text else f"{PAGE.name} is not what the results give")
    PAGE.write_text(written, encoding="utf-8")
    plot(results, PLOT)


if __name__ == "__main__":
    main()
