"""Looks into the passes of a step from CUDA graphs of their own: the same numbers, and when not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mvsplit.diagnostics.probe import ATTENTION_FIELDS, WRITER_FIELDS, LayerProbe
from mvsplit.models import DiT
from mvsplit.training import build_state
from mvsplit.training.graphs import Graphs
from mvsplit.training.step import accumulate_gradients, pieces
from tests.training import runs
from tests.training.recordings import ON_GPU, Recording, looked_at, losses_of, some_piece


def test_a_look_is_recorded_the_second_time_and_then_recalled() -> None:
    graphs = Recording(DiT(runs.MODEL))
    eye, inside = looked_at(graphs)
    assert (inside, eye.recalled, len(eye.found), graphs.looks) == (True, None, 1, 0)
    eye, inside = looked_at(graphs)
    assert (inside, graphs.looks, graphs.replays) == (True, 1, 1)
    assert not eye.found  # what a recording showed is no number
    again, inside = looked_at(graphs)
    assert (inside, graphs.replays) == (False, 2)
    for one in (eye, again):
        assert one.recalled is not None
        names, values = one.recalled
        assert names == ("sum",)
        assert values.tolist() == [128.0]


@pytest.mark.parametrize("with_a_look", [False, True])
def test_looks_and_steps_have_graphs_of_their_own_and_make_room_together(with_a_look: bool) -> None:
    graphs = Recording(DiT(runs.MODEL))
    for _ in range(2):
        looked_at(graphs)
        graphs.run(some_piece(), losses_of)
    assert (graphs.recorded, graphs.looks) == (1, 1)
    if with_a_look:  # another shape runs as it is written, and needs the memory
        looked_at(graphs, 8)
    else:
        graphs.run(some_piece(8), losses_of)
    assert (graphs.recorded, graphs.looks) == (0, 0)


def test_a_step_gets_the_memory_that_looks_hold() -> None:
    """A larger piece that was seen before a look at a smaller one was recorded."""
    graphs = Recording(DiT(runs.MODEL))
    for text in (4, 8):
        graphs.run(some_piece(text), losses_of)
    for _ in range(2):
        looked_at(graphs)
    assert (graphs.recorded, graphs.looks) == (0, 1)
    graphs.run(some_piece(8), losses_of)
    assert (graphs.recorded_texts(), graphs.looks) == ([8], 0)
    looked_at(graphs)  # at a smaller one, which finds room beside it
    assert (graphs.recorded, graphs.looks) == (1, 1)
    graphs.places = 2
    graphs.run(some_piece(4), losses_of)
    assert (graphs.recorded_texts(), graphs.looks) == ([4], 0)
    graphs.places = 1
    graphs.run(some_piece(8), losses_of)
    with pytest.raises(torch.OutOfMemoryError):  # no look holds it
        graphs.run(some_piece(4), losses_of)


def test_a_look_without_room_runs_as_it_is_written() -> None:
    graphs = Recording(DiT(runs.MODEL))
    graphs.room = False
    assert [looked_at(graphs)[1] for _ in range(3)] == [True] * 3
    assert graphs.looks == 0


def test_half_of_the_memory_must_be_free_for_a_look(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is refused once may be granted later; the refusal is said once."""
    graphs = Graphs(DiT(runs.MODEL), torch.device("cpu"))
    memory = {"free": 10, "used": 10}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory["free"], 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: memory["used"])
    assert not graphs._has_room()
    assert not graphs._has_room()
    assert caplog.text.count("looks run without a CUDA graph") == 1
    memory["free"] = 11
    assert graphs._has_room()
    assert graphs._taken() == (10, 19)


def test_graphs_go_where_what_they_hold_is_more_than_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = Recording(DiT(runs.MODEL))
    for _ in range(2):
        graphs.run(some_piece(), losses_of)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 30))
    for held, left in ((10, 1), (11, 0)):
        graphs._bytes = held
        graphs._make_room()
        assert graphs.recorded == left


def test_of_many_shapes_the_first_that_were_looked_at_keep_their_graphs() -> None:
    graphs = Recording(DiT(runs.MODEL))
    lengths = range(4, 28, 4)
    for length in lengths:
        graphs.run(some_piece(length), losses_of)
    for _ in range(3):
        inside = [looked_at(graphs, length)[1] for length in lengths]
    assert inside == [False] * 4 + [True] * 2
    assert graphs.looks == 4


def test_a_look_that_others_watch_too_is_seen_by_all() -> None:
    model = DiT(runs.MODEL)
    graphs = Recording(model)
    for _ in range(3):
        looked_at(graphs)
    hook = model.get_submodule("blocks.1.ffn.w2").register_forward_hook(lambda *_: None)
    assert looked_at(graphs)[1]
    hook.remove()
    assert not looked_at(graphs)[1]


def test_a_look_that_cannot_be_recorded_costs_nothing_but_speed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graphs = Recording(DiT(runs.MODEL))
    graphs.fails = True
    for _ in range(3):
        eye, inside = looked_at(graphs)
        assert inside
        assert (len(eye.found), eye.recalled) == (1, None)
    assert caplog.text.count("looks run without a CUDA graph") == 1


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("per_segment", [False, True])
def test_a_look_from_a_graph_sees_what_its_hooks_see(per_segment: bool) -> None:
    """Of texts of two lengths by turns, padded, between steps that have graphs of the same pool."""
    experiment = runs.experiment(precision="bf16", weights="bf16", accumulate=2, device="cuda")
    with_graph, without = build_state(experiment), build_state(experiment)
    without.graphs = None
    width = experiment.model.text_width
    for step in range(1, 13):
        lines = []
        for state in (with_graph, without):
            torch.manual_seed(step)
            batch = state.loader.next_batch()
            parts = [
                replace(
                    part,
                    text=torch.randn(len(part.data), length, width, device="cuda"),
                    text_valid=torch.randint(1, length + 1, (len(part.data),), device="cuda"),
                )
                for part, length in zip(
                    pieces(batch, step, experiment.train, state.device),
                    (16, 32) if step % 2 else (32, 16),
                    strict=True,
                )
            ]
            probe = LayerProbe(state.taps, per_segment=per_segment)
            accumulate_gradients(state, experiment.train, parts, probe)
            lines.append((probe.arrays(), [g.grads.clone() for g in state.optimizer.groups]))
        (ours, our_grads), (theirs, their_grads) = lines
        assert ours.keys() == theirs.keys() > {*WRITER_FIELDS, *ATTENTION_FIELDS}
        for name, values in theirs.items():  # NaN: of texts of one token, which no other is like
            near = pytest.approx(values, rel=1e-4, abs=1e-9, nan_ok="segment" in name)
            assert ours[name] == near, name
        for one, other in zip(our_grads, their_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)
    assert with_graph.graphs is not None
    assert with_graph.graphs.looks == 2
