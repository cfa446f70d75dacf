"""The demo's map puts each probe at its own steps."""

import numpy as np
import pytest

from mvsplit.evaluation.twins_picture import step_edges


def test_uneven_probes_keep_their_places():
    np.testing.assert_allclose(step_edges(np.array([10, 20, 22, 40])), [9.5, 15, 21, 31, 40.5])


@pytest.mark.parametrize("steps", [[7], [3, 4]])
def test_few_probes(steps):
    edges = step_edges(np.array(steps))
    assert all(low < step < high for low, step, high in zip(edges, steps, edges[1:], strict=False))
