"""Panels of a claim as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#c0392b", "#1f6fb4", "#2e8b57", "#8e5bb5", "#c98a1b", "#555555")


def save_plot(panels: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws panels, as `Panel.as_dict` gives them, side by side."""
    figure = Figure(figsize=(5.6 * len(panels), 3.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(1, len(panels), number), panel)
    # Without the version of matplotlib, so that the same numbers are the same file.
    canvas.print_png(path, metadata={"Software": None})


def _draw(axes: Axes, panel: Mapping[str, Any]) -> None:
    colours: dict[str, str] = {}
    for line in panel["lines"]:
        new = line["label"] not in colours
        colour = colours.setdefault(line["label"], COLOURS[len(colours) % len(COLOURS)])
        y = np.asarray([np.nan if v is None else v for v in line["y"]], float)
        points = line["points"]
        axes.plot(
            line["x"],
            y,
            color=colour,
            linewidth=1.1,
            alpha=0.45 if line["faint"] else 1.0,
            label=line["label"] if new else None,
            linestyle="" if points else "-",
            marker="." if points else "",
            markersize=3,
        )
    axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
    if panel["log_x"]:
        axes.set_xscale("log")
    if panel["log_y"]:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
