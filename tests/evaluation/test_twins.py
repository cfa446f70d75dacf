"""The demo's map puts each probe at its own steps."""

import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from mvsplit.evaluation.twins import DEAD_STEPS, Twin, dead_since
from mvsplit.evaluation.twins_picture import save_twins_picture, step_edges


def test_uneven_probes_keep_their_places():
    np.testing.assert_allclose(step_edges(np.array([10, 20, 22, 40])), [9.5, 15, 21, 31, 40.5])


@pytest.mark.parametrize("steps", [[7], [3, 4]])
def test_few_probes(steps):
    edges = step_edges(np.array(steps))
    assert all(low < step < high for low, step, high in zip(edges, steps, edges[1:], strict=False))


@pytest.mark.parametrize(
    ("planned", "dead", "words"),
    [
        (2, None, "asked for 0 to 9"),
        (240, None, "unfinished, at step 2 of 240\n"),
        (240, 1, "dead since step 1, stopped at 2 of 240\n"),
    ],
)
def test_the_picture_says_where_its_twins_are_unfinished(
    planned, dead, words, tmp_path, monkeypatch
):
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
            dead_since=dead,
        )
        for name in ("plain", "mvsplit")
    ]
    save_twins_picture(twins, tmp_path / "twins.png")
    digits = [title for title in titles if "recognised" in title]
    assert len(digits) == 2
    assert all(title.startswith(words) for title in digits)


def write_run(folder, *, gradient, similarity=0.999, loss=1.6, steps=60):
    """The logs of a run that begins with loss 1.8 and query gradient 0.1; from step 21 on as
    asked, looked into every ten steps."""
    metrics, layers = [], []
    for step in range(1, steps + 1):
        late = step > 20
        number = loss if late else 1.8
        metrics.append({"step": step, "loss": number, "grad_query": gradient if late else 0.1})
        if step % 10 == 0:
            # The first half of the layers always differ: only the deep ones count.
            layers.append({"step": step, "tcs": [0.2] * 2 + [similarity if late else 0.4] * 2})
    for name, lines in (("metrics", metrics), ("layers", layers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("course", "since"),
    [
        ({"gradient": 1e-9}, 21),
        ({"gradient": 1e-9, "steps": 21 + DEAD_STEPS}, 21),
        ({"gradient": 1e-9, "steps": 20 + DEAD_STEPS}, None),
        ({"gradient": 2e-4}, None),
        ({"gradient": float("nan")}, None),
        ({"gradient": 1e-9, "similarity": 0.98}, None),
        ({"gradient": 1e-9, "loss": 1.3}, None),
    ],
)
def test_dead_is_what_shows_all_signs_long_enough(course, since, tmp_path):
    write_run(tmp_path, **course)
    assert dead_since(tmp_path) == since


def test_a_run_that_stirs_again_is_not_dead(tmp_path):
    write_run(tmp_path, gradient=1e-9)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[54] = json.dumps({"step": 55, "loss": 1.6, "grad_query": 0.01})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert dead_since(tmp_path) is None


def test_a_run_that_has_not_begun_is_not_dead(tmp_path):
    assert dead_since(tmp_path) is None
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "layers.jsonl").touch()
    assert dead_since(tmp_path) is None
