"""The report: one HTML file that shows runs side by side and reads nothing from the network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mvsplit.diagnostics.report_pack import pack_runs
from mvsplit.diagnostics.report_run import read_run
from mvsplit.errors import UserError

PAGE_BUDGET = 7_800_000  # bytes of the whole page; only many long runs come near it
_PLACE = re.compile(r"\{\{([a-z._:-]+)\}\}")


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """Writes the page for one or more run folders and returns where it is.

    Any subset of config.json, metrics.jsonl, layers.jsonl, events.jsonl and samples/*.png is
    shown. The file appears whole or not at all.

    Raises:
        UserError: no run given, a folder that is no run, or a place that cannot be written to.
    """
    if not run_dirs:
        raise UserError("run_dirs=[] names no run; give at least one run folder")
    runs = [read_run(folder) for folder in run_dirs]
    frame = render({}, title="")
    data = pack_runs(runs, budget=PAGE_BUDGET - len(frame.encode()))
    page = render(data, title=" · ".join(run.name for run in runs))
    return _write_whole(Path(out), page)


def render(data: dict[str, Any], title: str, *, live: bool = False) -> str:
    """The template with its style, scripts and data put in. A live page asks the server that it
    came from for news; any other asks nobody for anything."""
    parts = {
        "connect": "'self'" if live else "'none'",
        "live": _asset("report_live.js") if live else "",
        "title": escape(title),
        "data": _script_safe(json.dumps(data, allow_nan=False, separators=(",", ":"))),
        "captions": _script_safe(_asset("captions.json")),
    }

    def put(place: re.Match[str]) -> str:
        name = place[1]
        return _asset(name.removeprefix("asset:")) if name.startswith("asset:") else parts[name]

    return _PLACE.sub(put, _asset("report.html"))


def _script_safe(text: str) -> str:
    """JSON that can stand inside <script>: no `<` ends the element or opens a comment."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (files("mvsplit.diagnostics") / "assets" / name).read_text(encoding="utf-8")


def _write_whole(path: Path, page: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"report {str(path)!r} cannot be written: {error.strerror}; choose another place"
        ) from error
    return path
