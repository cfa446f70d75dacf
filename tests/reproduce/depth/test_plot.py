"""The pictures of the bench: what is drawn how."""

import pytest

from mvsplit.reproduce.depth import plot
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES
from mvsplit.reproduce.depth.table import cells
from tests.reproduce.depth.test_page import seeds
from tests.reproduce.depth.tiny import TINY


def test_pictures_tell_settings_rivals_and_controls_apart(monkeypatch, tmp_path):
    rows = [
        each
        for name, loss in (("mvsplit-root", 0.4), ("alpha", 0.45), ("keel", 0.5), ("rezero", 0.55))
        for each in seeds(name, [loss] * 3)
    ]
    rows += seeds("hard-center", [0.9])
    found = cells(TINY, [*ENTRIES, *CANDIDATES], rows)
    figures = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.append(figure))
    plot.save_rates(found, TINY, tmp_path / "rates.png")
    plot.save_best(found, TINY, tmp_path / "best.png")
    rates, best = figures
    (legend,) = rates.legends
    lines = {line.get_label(): line for line in legend.get_lines()}
    assert set(lines) == {cell.entry.label for cell in found}
    colours = [line.get_color() for line in lines.values()]
    assert len(set(colours)) == len(colours)
    styles = {cell.entry.kind: lines[cell.entry.label].get_linestyle() for cell in found}
    assert (styles["candidate"], styles["rival"], styles["control"]) == ("-", "-", "--")
    broad = {cell.entry.kind: lines[cell.entry.label].get_linewidth() for cell in found}
    assert broad["candidate"] == broad["mvsplit"] > broad["rival"]
    (axes,) = best.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    points = {name: bar.lines[0] for name, bar in zip(names, axes.containers, strict=True)}
    assert points["MV-Split β=1/√L"].get_color() == plot.OURS
    assert points["Keel"].get_color() == plot.RIVAL
    assert points["Keel"].get_xdata()[0] == pytest.approx(0.5)
    assert points["hard centering"].get_markerfacecolor() == "white"  # of one seed
