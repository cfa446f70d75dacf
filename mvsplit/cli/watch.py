"""`mvsplit monitor watch RUN… [--port PORT]`: the report of running runs, live in the browser.

Serves on localhost only and follows the runs: before they begin, while they are written, and
after they ended. Ctrl-C ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mvsplit.diagnostics.live import LiveReport
from mvsplit.diagnostics.live_server import serve
from mvsplit.errors import UserError, runs_near

_HIGHEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class _Options:
    # Run folders, shown side by side.
    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…", help_behavior_hint="")
    ]
    port: int = 8008  # where to serve; the next free one if it is taken, 0: any


def main(arguments: Sequence[str]) -> int:
    """Serves until Ctrl-C, then returns 0.

    Raises:
        UserError: no run named, a run that is a file, or a port that does not exist or is taken
            with all that follow it.
    """
    prog = "mvsplit monitor watch"
    options = tyro.cli(_Options, args=list(arguments), prog=prog, description=__doc__)
    _check(options)
    with serve(LiveReport(options.runs), options.port) as server:
        _say_where(server.url, options)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nno longer watching")
    return 0


def _check(options: _Options) -> None:
    if not options.runs:
        raise UserError("runs: name at least one run folder, for example runs/tiny")
    for run in options.runs:
        if run.exists() and not run.is_dir():
            raise UserError(f"run {str(run)!r} is a file; name the folder it lies in")
    if not 0 <= options.port <= _HIGHEST_PORT:
        raise UserError(f"port={options.port}: must be between 0 and {_HIGHEST_PORT}")


def _say_where(url: str, options: _Options) -> None:
    for run in options.runs:
        if not run.exists():
            known = runs_near(run)
            there = f"; runs that are there: {', '.join(known)}" if known else ""
            print(f"{run} does not exist yet; waiting for it{there}")
    if options.port and not url.endswith(f":{options.port}/"):
        print(f"port {options.port} is taken")
    print(f"watching at {url} (Ctrl-C ends it)", flush=True)
