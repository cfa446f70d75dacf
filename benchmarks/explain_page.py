"""Writes the example of docs/explain.md: the plain 400-layer network dies, and why is explained.

    python benchmarks/explain_page.py [--check]
    python benchmarks/explain_page.py --run      # anew; about 75 seconds on one CPU core

--run gives the commands of the page in a folder of its own and keeps their numbers in
benchmarks/results/explain_example_cpu.json. Without it the example is written from these, in the
words that the package has today. --check writes nothing and fails where the page differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from mvsplit.cli.explain import show
from mvsplit.diagnostics.attribution import conclude, removed_share
from mvsplit.training.explanation import Explanation, largest_mean
from mvsplit.training.typed_json import read_as

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explain.md"
RESULT = ROOT / "benchmarks" / "results" / "explain_example_cpu.json"
FLIGHT = "runs/plain/flights/step_00000022"
COMMANDS = (
    "mvsplit train digits-400l-plain --steps 26 --run-dir runs/plain",
    f"mvsplit monitor explain {FLIGHT} --step 20",
)
WIDTH = 100  # columns
DIGITS = 6  # that the result keeps
BLOCK = "<!-- example -->\n```\n{}```\n<!-- end -->"


def run() -> dict[str, Any]:
    """The numbers of the commands; those that come back to the bit are kept once."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            words = [sys.executable, "-m", *command.split()]
            subprocess.run(words, cwd=folder, env=environment, check=True)
        text = (Path(folder) / FLIGHT / "explain.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_float=lambda word: float(f"{float(word):.{DIGITS}g}"))
    if found["reproduction"]["exact"]:
        found["reproduction"]["again"] = None
    return found


def example(found: dict[str, Any]) -> str:
    """What the command shows of these numbers; the conclusion is drawn from them today."""
    again = found["reproduction"]
    if again["again"] is None:
        found = {**found, "reproduction": {**again, "again": again["recorded"]}}
    kept: Explanation = read_as(Explanation, found, "")
    first, *others = kept.trials
    today = dataclasses.replace(
        kept,
        removed={t.name: removed_share(first.grad_norm, t.grad_norm, kept.calm) for t in others},
        conclusion=conclude(
            kept.trials,
            calm=kept.calm,
            reproduced=kept.reproduction.close,
            dropped=kept.dropped,
            split=largest_mean(kept.trace.mode_split),
        ),
    )
    file = io.StringIO()
    show(today, Console(file=file, width=WIDTH, force_terminal=False))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def page() -> str:
    """The page with the example in its place."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    block = BLOCK.format(example(found))
    pattern = re.escape(BLOCK).replace(re.escape("{}"), ".*?")
    text = PAGE.read_text(encoding="utf-8")
    text, places = re.subn(pattern, lambda _: block, text, flags=re.DOTALL)
    if places != 1:
        sys.exit(f"{PAGE.name} has {places} places for the example, not one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--run", action="store_true")
    args = parser.parse_args()
    if args.run:
        RESULT.write_text(json.dumps(run()) + "\n", encoding="utf-8")
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE}")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(
            f"{PAGE.name} is out of date: python benchmarks/explain_page.py writes its example"
        )


if __name__ == "__main__":
    main()
