"""The part of the README that shows the bench, written from the same rows as its page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvsplit.errors import UserError
from mvsplit.reproduce.depth.page import NAME, RESULTS, verdict_words
from mvsplit.reproduce.depth.page_parts import loss_words, table
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES, GPU, BenchSize
from mvsplit.reproduce.depth.table import Cell, cells, mean

BEGIN, END = "<!-- depth bench -->", "<!-- /depth bench -->"
SHOWN = 6  # entries, the best at the depth with the most seeds


def write_readme(readme: Path, folder: Path, size: BenchSize = GPU) -> bool:
    """Replaces what stands between the marks of the README, and says whether there was a result.

    Raises:
        UserError: the README has no such marks.
    """
    path = folder / RESULTS / f"{size.name}.json"
    if not path.exists():
        return False
    text = readme.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme}: needs {BEGIN} and {END}, between which the bench is shown")
    block = "\n".join(readme_block(size, json.loads(path.read_text("utf-8"))))
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")
    return True


def readme_block(size: BenchSize, result: Mapping[str, Any]) -> list[str]:
    """The picture, a table of the best entries, and what the rule of the verdicts says."""
    found = cells(size, (*ENTRIES, *CANDIDATES), result["rows"])
    here = [c for c in found if c.width == size.width and c.entry.kind != "control"]
    have = {(c.entry.name, c.depth): c for c in here}
    depths = [d for d in size.depths if any(depth == d for _, depth in have)]
    most = max(
        depths, key=lambda d: sum(len(c.best) for (_, depth), c in have.items() if depth == d)
    )
    ranked = sorted(
        (c for (_, depth), c in have.items() if depth == most),
        key=lambda c: (-min(len(c.best), len(size.seeds)), mean(c.losses or []) or math.inf),
    )
    rows = [
        [cell.entry.label, *(loss_words(have.get((cell.entry.name, d))) for d in depths)]
        for cell in ranked[:SHOWN]
    ]
    verdict = verdict_words(size, found)[0].partition(" By the rule")[0].replace("**", "")
    return [
        f"![Best validation loss of each rule](docs/experiments/{NAME}-{size.name}-best.png)",
        "",
        *table(("rule", *(f"{d} layers" for d in depths)), rows),
        f"Validation loss on captioned shapes after {size.steps} steps, {_rates(ranked[:SHOWN])}, "
        "± one standard deviation over seeds. "
        f"{verdict}",
        f"[The whole bench](docs/experiments/{NAME}.md), with its limits.",
    ]


def _rates(found: Sequence[Cell]) -> str:
    """How many learning rates each was tried at."""
    few, most = (pick(len(cell.tried) for cell in found) for pick in (min, max))
    if most == 1:
        return "at one learning rate as yet"
    return f"each at the best of its {few if few == most else f'{few} to {most}'} learning rates"
