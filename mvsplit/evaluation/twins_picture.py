"""The demo's picture: losses, similarity by depth and step, and what both networks draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mvsplit.evaluation.twins import Twin

COLOURS = {"plain": "#c0392b", "mvsplit": "#1f6fb4"}
TITLES = {"plain": "plain residual", "mvsplit": "MV-Split"}
_ROWS = 7  # of the drawings shown, ten digits each


def save_twins_picture(twins: Sequence[Twin], path: Path) -> Path:
    """Draws two twins into one PNG of about 1500×900 pixels and returns `path`."""
    figure = Figure(figsize=(12.5, 7.4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    last = max(int(twin.steps[-1]) for twin in twins)
    grid = figure.add_gridspec(2, 4, width_ratios=[1.15, 1, 1, 0.05])
    _draw_losses(figure.add_subplot(grid[0, 0]), twins)
    _draw_gradients(figure.add_subplot(grid[1, 0]), twins)
    for column, twin in enumerate(twins, start=1):
        image = _draw_similarity(figure.add_subplot(grid[0, column]), twin, last)
        _draw_digits(figure.add_subplot(grid[1, column]), twin)
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 3]), label="token cosine similarity")
    layers = twins[0].similarity.shape[1]
    figure.suptitle(
        f"Two {layers}-layer diffusion transformers, the same seed and digits; only the residual "
        "rule differs",
        fontsize=13,
    )
    canvas.print_png(path)
    return path


def _draw_losses(axes: Axes, twins: Sequence[Twin]) -> None:
    for twin in twins:
        axes.plot(twin.steps, twin.loss, color=COLOURS[twin.name], alpha=0.25, linewidth=0.8)
        smooth = _smoothed(twin.loss, window=9)
        axes.plot(twin.steps, smooth, color=COLOURS[twin.name], label=TITLES[twin.name])
    axes.set(title="training loss", xlabel="step", ylim=(0, None))
    axes.legend(frameon=False)


def _draw_gradients(axes: Axes, twins: Sequence[Twin]) -> None:
    for twin in twins:
        axes.semilogy(twin.steps, np.maximum(twin.query_gradient, 1e-12), color=COLOURS[twin.name])
    axes.set(title="query gradient of the deepest quarter", xlabel="step")


def _draw_similarity(axes: Axes, twin: Twin, last: int) -> QuadMesh:
    """One column a probe, as wide as the steps it stands for: probes are not evenly spaced. The
    axis reaches to `last`, the last step of both twins; past a twin's own there is nothing."""
    mesh = axes.pcolormesh(
        step_edges(twin.probe_steps),
        np.arange(twin.similarity.shape[1] + 1),
        twin.similarity.T,
        cmap="magma",
        vmin=0,
        vmax=1,
        rasterized=True,
    )
    axes.set_xlim(0.5, last + 0.5)
    axes.invert_yaxis()
    axes.set(title=f"{TITLES[twin.name]}: are the tokens all alike?", xlabel="step")
    axes.set_ylabel("layer")
    return mesh


def step_edges(steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """The borders between neighbouring probes, half way, and the two ends. [P] → [P + 1]."""
    middles = (steps[1:] + steps[:-1]) / 2
    ends = (steps[:1] - 0.5, steps[-1:] + 0.5)
    return np.concatenate((ends[0], middles, ends[1]))


def _draw_digits(axes: Axes, twin: Twin) -> None:
    rows = twin.pictures[: _ROWS * 10].clamp(-1, 1).squeeze(1).numpy()
    framed = np.pad(rows, ((0, 0), (1, 0), (1, 0)), constant_values=1.0)
    side = framed.shape[-1]
    sheet = framed.reshape(_ROWS, 10, side, side).transpose(0, 2, 1, 3).reshape(_ROWS * side, -1)
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_xticks(np.arange(10) * side + side / 2, [str(digit) for digit in range(10)])
    axes.set_yticks([])
    axes.set_title(f"{_when(twin)}asked for 0 to 9: {twin.accuracy:.0%} recognised")


def _when(twin: Twin) -> str:
    """Of which step the digits are, where that is not the last that was asked for."""
    done = int(twin.steps[-1])
    if done >= twin.planned:
        return ""
    if twin.dead_since is not None:
        return f"dead since step {twin.dead_since}, stopped at {done} of {twin.planned}\n"
    return f"unfinished, at step {done} of {twin.planned}\n"


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centered running mean, over fewer values at the ends."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
