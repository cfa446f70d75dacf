"""The depth bench: every rule of the registry, at its own learning rate, to 1000 layers deep.

    python benchmarks/depth_bench.py --size gpu --together 24 --out FOLDER --json FILE --minutes 5

Runs come in the order of what they tell (`mvsplit.reproduce.depth.order`), until nothing is left or
the minutes are over; the same command goes on with the same --out. --json keeps all rows in one
file; --pages docs/experiments adds them to those that the page is drawn from, and --draw does no
more than that. --have FILE goes on from the rows in a file.

--together N trains up to N runs as one network (`mvsplit.reproduce.depth.ensemble`), which is what
a GPU is for: alone, a narrow network leaves it idle. Without it each run is a process, --workers at
a time, with looks into its layers, task scores and the memory that it takes. Gate: before the first
run a few short ones are trained on the device as one and alone, and must come to the same losses;
or one of them twice. `--gate only` does no more than that, each rule of --entries, and keeps what
it found in --json; processes that start beside it say `--gate elsewhere`, and their rows count if
it passes. --recompute has blocks compute again in backward what they would keep, which takes a
fifth of the memory; --graph-or-nothing stops where a step cannot be recorded as a CUDA graph.

`--time --json docs/experiments/results/depth-bench/timing-gpu.json` times steps instead, alone and
side by side.

Cost: for every row of --size small, the default, two to five hours on one CPU core, by the seconds
that its rows hold; for --size gpu as many minutes as --minutes says on one H200. The same command
goes on later. On an H200 shared with one other program six networks of 100 layers, trained as one,
take two minutes, six of 400 layers two, and nine of 1000 layers three, with 73 GiB. --time takes
two minutes on one H200.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvsplit.cli import status_of
from mvsplit.data.atomic import write_atomically
from mvsplit.reproduce.check import check_training
from mvsplit.reproduce.depth.gate import check_together
from mvsplit.reproduce.depth.groups import missing, study_together
from mvsplit.reproduce.depth.options import check_options, read_part, read_result, read_runs
from mvsplit.reproduce.depth.plan import (
    SIZES,
    BenchRun,
    BenchSize,
    get_entries,
    get_size,
    share,
)
from mvsplit.reproduce.depth.run import write_row
from mvsplit.reproduce.depth.study import RULE_FILE, DepthStudy, stopped_with_rows
from mvsplit.reproduce.depth.timing import time_sharing
from mvsplit.reproduce.depth.verdict import note_rule

NOTHING = "nothing is left to run"


def check(size: BenchSize) -> None:
    """Raises RuntimeError where a short run on the device does not repeat itself, or learn."""
    run = BenchRun(
        entry=get_entries(["mvsplit-root"])[0], depth=4, width=size.width, rate=3.2e-3, seed=0
    )
    print(check_training(run.experiment(replace(size, steps=40, warmup=5))), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES], default="small")
    parser.add_argument("--out", type=Path, default=Path("runs/depth-bench"))
    parser.add_argument("--json", type=Path, help="all rows in one file")
    parser.add_argument("--scratch", type=Path, help="run folders while they train")
    parser.add_argument("--entries", nargs="*", default=["all"], help="names, all, or candidates")
    parser.add_argument("--runs", nargs="*", help="names of runs, as rows have them, and no others")
    parser.add_argument(
        "--part", default="0/1", help="K/N: the entries of process K of N, K from 0"
    )
    parser.add_argument("--workers", type=int)
    parser.add_argument("--together", type=int, help="runs that are trained as one network")
    parser.add_argument("--recompute", action="store_true", help="--together: blocks keep less")
    parser.add_argument("--graph-or-nothing", action="store_true", help="--together: or an error")
    parser.add_argument("--gate", choices=("first", "only", "elsewhere"), default="first")
    parser.add_argument("--have", type=Path, nargs="*", default=[], help="earlier --json files")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--depths", type=int, nargs="*", help="instead of those of the size")
    parser.add_argument("--pages", type=Path, help="docs/experiments: keeps rows and page there")
    parser.add_argument("--readme", type=Path, help="--draw: whose table is written again, too")
    parser.add_argument("--draw", action="store_true", help="runs nothing: --have, then --pages")
    parser.add_argument("--time", action="store_true", help="times steps, alone and side by side")
    return parser.parse_args()


def main() -> int:
    """The exit status."""
    options = parse()
    size = get_size(options.size)
    check_options(options, size)
    have = [read_result(path, size) for path in options.have]
    if options.depths:
        size = replace(size, depths=tuple(options.depths), shapes=())  # and no others
    if options.draw:
        draw(size, have, options.pages, options.readme)
    elif options.time:
        keep(time_sharing(size), options.json)
    else:
        return run(options, size, have)
    return 0


def run(options: argparse.Namespace, size: BenchSize, have: list[dict[str, Any]]) -> int:
    """The gate and then what is left to run, or one of them; 1 where a run has failed."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    only = None if options.runs is None else read_runs(options.runs, size)
    named = [run.entry.name for run in only or ()]
    entries = share(get_entries([*options.entries, *named]), *read_part(options.part))
    only = only and [run for run in only if run.entry in entries]
    gate = stopped_with_rows(options.out, say, options.scratch)
    if options.gate == "only":
        with gate:
            check_together(size, entries, options.json) if entries else say(NOTHING)
        return 0
    for row in (row for result in have for row in result["rows"]):
        write_row(row, options.out)
    rule = note_rule(options.out / RULE_FILE)
    study = DepthStudy(
        options.out,
        size,
        entries,
        workers=options.workers,
        scratch=options.scratch,
        only=only,
        say=say,
    )
    left = study.left()  # where the rows of --have are not of such runs, it is said here
    if options.together:
        left = missing(size, entries, study.rows(), only)
    if not left:
        say(NOTHING)
    elif options.gate == "first":
        with gate:
            check_together(size, entries) if options.together else check(size)
    if options.together:
        minutes = options.minutes and options.minutes - (time.monotonic() - began) / 60
        rows = study_together(
            options.out,
            size,
            entries,
            most=options.together,
            minutes=minutes,
            only=only,
            recompute=options.recompute or None,
            graph_or_nothing=options.graph_or_nothing,
            say=say,
        )
    else:
        rows = study.run(minutes=options.minutes)
    if options.json is not None:
        keep({"size": size.name, "rule": rule, "rows": rows}, options.json)
    if options.pages is not None:
        draw(size, [{"rule": rule, "rows": rows}], options.pages)
    left = len(missing(size, entries, rows, only) if options.together else study.left())
    words = f"; {left} are left, and the same command goes on" if left else ""
    print(f"{len(rows)} runs, {len(study.failed)} failed{words}: {options.out}")
    return int(bool(study.failed))


def draw(
    size: BenchSize, have: list[dict[str, Any]], pages: Path, readme: Path | None = None
) -> None:
    """The page, and the table of a README, with some results added to those that they are drawn
    from."""
    # Here: what draws is missing where runs are run.
    from mvsplit.reproduce.depth.page import RESULTS, keep_rows, write_page
    from mvsplit.reproduce.depth.readme import write_table

    for result in have:
        keep_rows(size, result["rule"], result["rows"], pages)
    print(write_page(pages))
    if readme is not None:
        write_table(readme, pages / RESULTS)


def keep(result: object, path: Path | None) -> None:
    if path is None:
        print(json.dumps(result, indent=1))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(status_of(main))
