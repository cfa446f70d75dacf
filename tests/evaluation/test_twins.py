"""The demo's map puts each probe at its own steps."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from mvsplit.evaluation.twins import Twin
from mvsplit.evaluation.twins_picture import save_twins_picture, step_edges


def test_uneven_probes_keep_their_places():
    np.testing.assert_allclose(step_edges(np.array([10, 20, 22, 40])), [9.5, 15, 21, 31, 40.5])


@pytest.mark.parametrize("steps", [[7], [3, 4]])
def test_few_probes(steps):
    edges = step_edges(np.array(steps))
    assert all(low < step < high for low, step, high in zip(edges, steps, edges[1:], strict=False))


@pytest.mark.parametrize(("planned", "said"), [(2, False), (240, True)])
def test_the_picture_says_where_its_twins_are_unfinished(planned, said, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title: titles.append(title))
    twins = [
        Twin(
            name=name,
            planned=planned,
            steps=np.array([1, 2]),
            loss=np.ones(2),
            seconds=1.0,
            probe_steps=np.array([1, 2]),
            similarity=np.zeros((2, 4)),
            query_gradient=np.ones(2),
            pictures=torch.zeros(100, 1, 8, 8),
            accuracy=0.1,
            accuracy_real=1.0,
        )
        for name in ("plain", "mvsplit")
    ]
    save_twins_picture(twins, tmp_path / "twins.png")
    digits = [title for title in titles if "recognised" in title]
    assert len(digits) == 2
    assert all(("unfinished, at step 2 of 240" in title) == said for title in digits)
