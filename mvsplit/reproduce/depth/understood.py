"""What was understood from the rows, in words whose figures are read from the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import fill
from typing import Any

# A figure stands as [[FILE RUN FIELD FORMAT]], of a row of FILE.json, or with the lowest and the
# highest of several runs, [[FILE RUN* FIELD FORMAT]]. Where a row is missing, its paragraph is.
_FIGURE = re.compile(r"\[\[(\S+) (\S+) (\S+) (\S+)\]\]")

UNDERSTOOD = """## Understood so far

- **β = 1/√L instead of 1.** It is ahead where both have three seeds, at 4 and 16 layers after 150
  steps of 4 samples, and in the single runs at 100. At 400 neither lives at 3.2e-3. It is the
  default where β is not given; the presets `mvsplit-400l` and `mvsplit-1000l` keep the paper's
  start.

- **Other settings** – α, free λ, the gains' own rate, warm-up, ε – are entries of the bench
  (`--entries candidates`).

## What did not work

- Twenty processes on one H200 and 16 cores: every run of 400 layers ran out of memory, and 100
  layers took [[gpu-300-steps *-100x64-* seconds_a_step .2f]] s a step where six processes took
  [[gpu *-100x64-* seconds_a_step .2f]].

- Six runs of 400 layers at a time, beside other work on the GPU:
  [[gpu *-400x64-* seconds_a_step .2f]] s a step. Eight with the device to themselves took half of
  that (Time, above), so the rest was the other work. What limits a single process is the host: it
  takes a third of the steps that eight take together. Hence the ensembles.
"""


def understood(folder: Path) -> list[str]:
    """The paragraphs whose rows are all in `folder`, and the headings that have some."""
    rows: dict[str, list[dict[str, Any]]] = {
        path.stem: json.loads(path.read_text("utf-8"))["rows"]
        for path in folder.glob("*.json")
        if not path.stem.startswith("timing")
    }
    lines: list[str] = []
    heading: str | None = None
    for paragraph in UNDERSTOOD.strip().split("\n\n"):
        if paragraph.startswith("#"):
            heading = paragraph
            continue
        text = _filled(paragraph, rows)
        if text is not None:
            lines += [*([heading, ""] if heading else []), text, ""]
            heading = None
    return lines


def _filled(paragraph: str, rows: dict[str, list[dict[str, Any]]]) -> str | None:
    """The paragraph with its figures; None where a row is missing."""
    text = paragraph
    for match in _FIGURE.finditer(paragraph):
        file, run, field, form = match.groups()
        pattern = re.compile(re.escape(run).replace(r"\*", ".*"))
        found = [r.get(field) for r in rows.get(file, []) if pattern.fullmatch(r["run"])]
        values = [value for value in found if value is not None]
        if not values:
            return None
        ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
        text = text.replace(match.group(), "–".join(ends), 1)
    text = " ".join(text.split())
    indent = "  " if text.startswith("- ") else ""
    return fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
