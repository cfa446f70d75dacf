"""The pictures of the bench: loss against learning rate, best losses with their spread, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from mvsplit.reproduce.depth.plan import BenchSize
from mvsplit.reproduce.depth.table import Cell, mean, spread

OURS, RIVAL = "#1f6fb4", "#555555"
# Settings of MV-Split are cool and broad, rivals warm and thin, controls grey and dashed.
_COOL = ("#08306b", "#2171b5", "#6baed6", "#00695c", "#41ab5d", "#17becf", "#6a51a3", "#9e9ac8")
_WARM = ("#c0392b", "#e67e22", "#b8860b", "#e377c2", "#8c564b", "#f29b93", "#7a0177", "#d4a017")
_GREY = ("#000000", "#888888")
# Of losses, whose axes are logarithmic.
_TICKS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)


def save_rates(found: Sequence[Cell], size: BenchSize, path: Path) -> None:
    """Validation loss against the learning rate, a panel for each depth. Runs that do not live are
    drawn at the top, where the axis ends."""
    depths = [d for d in size.depths if any(c.depth == d for c in found)]
    figure = Figure(figsize=(5.2 * len(depths), 5.2), dpi=100, layout="constrained")
    styles = _styles(found)
    for number, depth in enumerate(depths, start=1):
        axes = figure.add_subplot(1, len(depths), number)
        here = [c for c in found if c.depth == depth and c.width == size.width]
        top = max((r["floor"] for c in here for r in c.rows), default=1.0)
        for cell in here:
            _line(axes, cell, styles[cell.entry.name], top)
        axes.set(title=f"{depth} layers", xlabel="learning rate", ylabel="validation loss")
        axes.axhline(top, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _ticks(axes.yaxis, axes.get_ylim())
    labels = {cell.entry.label: styles[cell.entry.name] for cell in found}
    lines = [Line2D([], [], label=label, **style) for label, style in labels.items()]
    columns = max(2 * len(depths), 1)
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, fontsize=8)
    _save(figure, path)


def _ticks(axis: Axis, ends: tuple[float, float]) -> None:
    """Of losses between two ends, in figures as they are read."""
    inside = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _line(axes: Axes, cell: Cell, style: dict[str, Any], top: float) -> None:
    means = []
    for rate in cell.tried:
        rows = [r for r in cell.rows if r["rate"] == rate]
        losses = [r["validation_loss"] for r in rows if r.get("validation_loss") is not None]
        means.append(min(mean(losses) or top, top) if len(losses) == len(rows) else top)
        for loss in losses:
            axes.plot(rate, min(loss, top), ".", color=style["color"], markersize=4)
    axes.plot(cell.tried, means, **style)


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
            colour = OURS if cell.entry.kind in ("mvsplit", "candidate") else RIVAL
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
        axes.set_xscale("log")
        _ticks(axes.xaxis, axes.get_xlim())
    _save(figure, path)


def save_seconds(timing: Mapping[str, Any], path: Path) -> None:
    """Seconds a step of networks that have the device to themselves."""
    alone = dict(sorted(timing["alone"].items(), key=lambda item: item[1]))
    figure = Figure(figsize=(6.0, 0.35 * len(alone) + 1.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(alone)), list(alone.values()), color=OURS)
    axes.set_yticks(range(len(alone)), [*alone], fontsize=8)
    axes.set(xlabel="seconds a step, alone on the device")
    _save(figure, path)


def _styles(found: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """How the line of each entry is drawn."""
    kinds = {cell.entry.name: cell.entry.kind for cell in found}
    styles: dict[str, dict[str, Any]] = {}
    for wanted, colours, width, line in (
        (("mvsplit", "candidate"), _COOL, 2.0, "-"),
        (("rival",), _WARM, 1.1, "-"),
        (("control",), _GREY, 1.1, "--"),
    ):
        names = [name for name, kind in kinds.items() if kind in wanted]
        for number, name in enumerate(names):
            colour = colours[number % len(colours)]
            styles[name] = {"color": colour, "linewidth": width, "linestyle": line}
    return styles


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib, so that the same numbers are the same file.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
