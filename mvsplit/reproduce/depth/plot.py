"""The pictures of the bench: loss against learning rate, best losses with their spread, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mvsplit.reproduce.depth.plan import BenchSize
from mvsplit.reproduce.depth.table import Cell, mean, spread

COLOURS = (
    *("#c0392b", "#1f6fb4", "#2e8b57", "#8e5bb5", "#c98a1b", "#555555", "#e377c2", "#17becf"),
    *("#8c564b", "#9acd32", "#000000", "#ff7f0e", "#7fb2e5", "#f29b93", "#00695c", "#b8860b"),
)
_FEW = 0.35  # opacity of what has one seed


def save_rates(found: Sequence[Cell], size: BenchSize, path: Path) -> None:
    """Validation loss against the learning rate, a panel for each depth. Runs that do not live are
    drawn at the top, where the axis ends."""
    depths = [d for d in size.depths if any(c.depth == d for c in found)]
    figure = Figure(figsize=(5.2 * len(depths), 4.2), dpi=100, layout="constrained")
    colours = _colours(found)
    for number, depth in enumerate(depths, start=1):
        axes = figure.add_subplot(1, len(depths), number)
        here = [c for c in found if c.depth == depth and c.width == size.width]
        top = max((r["floor"] for c in here for r in c.rows), default=1.0)
        for cell in here:
            _line(axes, cell, colours[cell.entry.name], top)
        axes.set(title=f"{depth} layers", xlabel="learning rate", ylabel="validation loss")
        axes.axhline(top, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=7)
    _save(figure, path)


def _line(axes: Axes, cell: Cell, colour: str, top: float) -> None:
    means = []
    for rate in cell.tried:
        rows = [r for r in cell.rows if r["rate"] == rate]
        losses = [r["validation_loss"] for r in rows if r.get("validation_loss") is not None]
        means.append(min(mean(losses) or top, top) if len(losses) == len(rows) else top)
        for loss in losses:
            axes.plot(rate, min(loss, top), ".", color=colour, markersize=4)
    axes.plot(cell.tried, means, color=colour, linewidth=1.1, label=cell.entry.label)


def save_best(found: Sequence[Cell], size: BenchSize, path: Path) -> None:
    """The best loss of each sweep, with a standard deviation over seeds where there are several;
    a hollow point has one seed."""
    depths = [d for d in size.depths if any(c.depth == d and c.rate for c in found)]
    figure = Figure(figsize=(4.6 * max(len(depths), 1), 4.0), dpi=100, layout="constrained")
    for number, depth in enumerate(depths, start=1):
        axes = figure.add_subplot(1, len(depths), number)
        here = [c for c in found if c.depth == depth and c.width == size.width and c.rate]
        here.sort(key=lambda cell: -(mean(cell.losses or []) or 0))
        for place, cell in enumerate(here):
            losses = cell.losses or []
            colour = "#1f6fb4" if cell.entry.kind in ("mvsplit", "candidate") else "#555555"
            axes.errorbar(
                mean(losses) or 0,
                place,
                xerr=spread(losses),
                fmt="o",
                color=colour,
                markerfacecolor=colour if len(losses) > 1 else "white",
                markersize=5,
                capsize=3,
            )
        axes.set_yticks(range(len(here)), [c.entry.label for c in here], fontsize=8)
        axes.set(title=f"{depth} layers", xlabel="validation loss at the best rate")
        axes.grid(axis="x", linewidth=0.3)
    _save(figure, path)


def save_seconds(timing: Mapping[str, Any], path: Path) -> None:
    """Seconds a step of networks that have the device to themselves."""
    alone = dict(sorted(timing["alone"].items(), key=lambda item: item[1]))
    figure = Figure(figsize=(6.0, 0.35 * len(alone) + 1.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(alone)), list(alone.values()), color="#1f6fb4")
    axes.set_yticks(range(len(alone)), [*alone], fontsize=8)
    axes.set(xlabel="seconds a step, alone on the device")
    _save(figure, path)


def _colours(found: Sequence[Cell]) -> dict[str, str]:
    names = list(dict.fromkeys(cell.entry.name for cell in found))
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib, so that the same numbers are the same file.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
