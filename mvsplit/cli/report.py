"""Draws one HTML page that shows runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mvsplit.diagnostics.report import write_report
from mvsplit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Options:
    # Run folders, shown side by side.
    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…", help_behavior_hint="")
    ]
    # Where the page goes; report.html in the first run if not given.
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None


def main(arguments: Sequence[str]) -> int:
    """Writes the page, prints where it is, and returns 0.

    Raises:
        UserError: no run named, a folder that is no run, or a place that cannot be written to.
    """
    options = tyro.cli(_Options, args=list(arguments), prog="mvsplit report", description=__doc__)
    if not options.runs:
        raise UserError("runs: name at least one run folder, for example runs/tiny")
    page = write_report(options.runs, options.out or options.runs[0] / "report.html")
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0
