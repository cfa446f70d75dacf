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

- **How large β is at the start.** β = 1 is behind at 4 and 16 layers. Between β = 1/√L and a
  quarter of it nothing is told: with three seeds the quarter was ahead at 4 layers, with six it is
  not (the others were added once that was seen, to these two at 4 and 16 layers, and one at 64 to
  them and Keel). At 64 layers and a rate of 1e-2 the quarter lives
  ([[small beta-quarter-64x48-lr1.0e-02-seed0 validation_loss .2f]]) and 1/√L does not
  ([[small mvsplit-root-64x48-lr1.0e-02-seed0 validation_loss .2f]]), one seed each; at 400 layers
  and 3.2e-3 neither 1/√L ([[gpu mvsplit-root-400x64-lr3.2e-03-seed0 validation_loss .2f]]) nor 1
  ([[gpu mvsplit-1-400x64-lr3.2e-03-seed0 validation_loss .2f]]) does, where ReZero and LayerScale
  reach [[gpu rezero-400x64-lr3.2e-03-seed0 validation_loss .2f]] and
  [[gpu layerscale-*-400x64-lr3.2e-03-seed0 validation_loss .2f]]. Deeper networks seem to need a
  smaller β for a rate as high as their rivals stand; whether MV-Split reaches these at 400 layers
  with a smaller one, or at a lower rate, has not been run.

- **The default** stays β = 1/√L, which the rule admits at the small size; a quarter of it is
  admitted as well, and the runs at 100 layers and more that would decide are not there. The presets
  `mvsplit-400l` and `mvsplit-1000l` keep the paper's starts, 1 and 0.03, under their names.

- **By depth**, on these runs: to 16 layers MV-Split with β = 1/√L; at 64 nothing is ahead of Keel
  at 1e-2, with which MV-Split at β = 0.25/√L ties at 3.2e-3; at 400 and a rate of 3.2e-3 ReZero or
  LayerScale, one seed each.

- **Other settings** – α, free λ, the gains' own rate, warm-up, ε – are entries of the bench
  (`--entries candidates`); of them only β = 0.25/√L has a sweep, and writers of standard size one
  run at 64 layers ([[small standard-64x48-lr3.2e-03-seed0 validation_loss .3f]]).

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
        path.stem: json.loads(path.read_text("utf-8")).get("rows", [])
        for path in folder.glob("*.json")
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
