"""Forward and backward as one CUDA graph: the same numbers, and when it must not be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.diagnostics.probe import WRITER_FIELDS, LayerProbe
from mvsplit.models import DiT
from mvsplit.training import DataConfig, Experiment, build_state, train
from mvsplit.training.builders import resolve_device
from mvsplit.training.graphs import Graphs, Look, Run, _Recorded
from mvsplit.training.pieces import Piece, in_few_lengths
from mvsplit.training.step import accumulate_gradients, pieces, train_step
from mvsplit.training.surgery import protect
from tests.training import runs

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class EveryOperation(TorchDispatchMode):
    """Listens, and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def another_forward(model: DiT) -> Any:
    block = model.blocks[1]
    block.forward = block.forward  # type: ignore[method-assign]
    return lambda: vars(block).pop("forward")


WAYS: dict[str, Callable[[DiT], Any]] = {
    "forward": lambda m: m.get_submodule("blocks.1.ffn.w2").register_forward_hook(ignore),
    "before": lambda m: m.blocks[0].register_forward_pre_hook(ignore),
    "backward": lambda m: m.head.register_full_backward_hook(ignore),
    "before backward": lambda m: m.blocks[1].register_full_backward_pre_hook(ignore),
    "gradient": lambda m: m.head.weight.register_hook(ignore),
    "added gradient": lambda m: m.head.weight.register_post_accumulate_grad_hook(ignore),
    "every module": lambda m: register_module_forward_hook(ignore),
}


def ignore(*_: Any) -> None:
    pass


@pytest.mark.parametrize("way", WAYS)
def test_not_used_while_somebody_watches(way: str) -> None:
    model = DiT(runs.MODEL)
    graphs = Graphs(model, torch.device("cpu"))
    assert graphs.usable()
    hook = WAYS[way](model)
    assert not graphs.usable()
    hook.remove()
    assert graphs.usable()


def test_not_used_where_a_replay_would_be_unseen() -> None:
    model = DiT(runs.MODEL)
    graphs = Graphs(model, torch.device("cpu"))
    with EveryOperation():
        assert not graphs.usable()
    with torch.autograd.set_detect_anomaly(True):
        assert not graphs.usable()
    restore = another_forward(model)
    assert not graphs.usable()
    restore()
    assert graphs.usable()


class Recording(Graphs):
    """On a CPU: a graph that only counts its replays."""

    def __init__(self, model: DiT) -> None:
        super().__init__(model, torch.device("cpu"))
        self._on = self._looks_on = True
        self.replays, self.room, self.fails, self.places = 0, True, False, 100

    def replay(self) -> None:
        self.replays += 1

    def _has_room(self) -> bool:
        return self.room

    def recorded_texts(self) -> list[int]:
        """Text tokens of each graph's piece, in the order of recording."""
        return [r.piece.text.shape[1] for r in self._recorded.values()]

    def _captured(self, piece: Piece, run: Run, look: Look | None = None) -> _Recorded:
        if self.fails:
            raise RuntimeError("nothing is recorded here")
        if len(self._held()) >= self.places:
            raise torch.OutOfMemoryError("graphs hold it")
        if look is None:
            return _Recorded(self, piece, run(piece), ((), piece.times))
        look.forget()
        with look.passes():
            losses = run(piece)
        return _Recorded(self, piece, losses, look.seen())


def some_piece(text: int = 4) -> Piece:
    return Piece(
        data=torch.ones(2, 1, 8, 8),
        noise=torch.ones(2, 1, 8, 8),
        times=torch.ones(2),
        text=torch.ones(2, text, 16),
        text_valid=None,
    )


def losses_of(piece: Piece) -> torch.Tensor:
    return piece.times


def test_another_shape_finds_the_memory_of_the_graphs_free() -> None:
    """The memory plan counts on it, and what runs without a graph cannot use a graph's pool."""
    graphs = Recording(DiT(runs.MODEL))
    for _ in range(3):
        graphs.run(some_piece(4), losses_of)
    assert (len(graphs._recorded), graphs.replays) == (1, 2)
    held = []
    graphs.run(some_piece(8), lambda p: held.append(len(graphs._recorded)) or p.times)
    assert held == [0]
    for _ in range(2):
        graphs.run(some_piece(8), losses_of)
        graphs.run(some_piece(4), losses_of)
    assert (len(graphs._recorded), graphs.replays) == (2, 6)


def test_a_larger_piece_is_recorded_before_the_smaller_ones() -> None:
    """In the pool that they share the blocks of a smaller graph are too small for it."""
    graphs = Recording(DiT(runs.MODEL))
    for text in (4, 8, 4):
        graphs.run(some_piece(text), losses_of)
    assert graphs.recorded_texts() == [4]
    graphs.run(some_piece(8), losses_of)
    assert graphs.recorded_texts() == [8]
    for text in (4, 8):
        graphs.run(some_piece(text), losses_of)
    assert graphs.recorded_texts() == [8, 4]  # and both stay


def test_a_graph_is_not_replayed_once_other_parameters_learn() -> None:
    model = DiT(runs.MODEL)
    graphs = Recording(model)
    for _ in range(3):
        graphs.run(some_piece(), losses_of)
    model.head.requires_grad_(False)
    ran = []
    graphs.run(some_piece(), lambda p: ran.append(p) or p.times)
    assert (len(ran), graphs.replays) == (1, 2)


class Eye:
    """A look whose numbers are the sums of the pieces' data, as its hooks see them."""

    key = "eye"

    def __init__(self) -> None:
        self.open = False
        self.found: list[torch.Tensor] = []
        self.recalled: tuple[object, torch.Tensor] | None = None

    @contextmanager
    def passes(self) -> Iterator[None]:
        self.open = True
        yield
        self.open = False

    def read_gradients(self) -> None:
        pass

    def seen(self) -> tuple[object, torch.Tensor]:
        return ("sum",), torch.stack(self.found)

    def recall(self, names: object, values: torch.Tensor) -> None:
        self.recalled = names, values

    def forget(self) -> None:
        self.found.clear()


def looked_at(graphs: Graphs, text: int = 4) -> tuple[Eye, bool]:
    """A look at a piece, and whether the piece ran inside it."""
    eye, inside = Eye(), []

    def run(piece: Piece) -> torch.Tensor:
        inside.append(eye.open)
        eye.found.append(piece.data.sum())
        return piece.times

    losses = graphs.run(some_piece(text), run, eye)
    assert losses.shape == (2,)
    assert not eye.open
    return eye, inside == [True]


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
    hook = WAYS["forward"](model)
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


def test_a_cpu_runs_the_step_as_it_is_written() -> None:
    graphs = Graphs(DiT(runs.MODEL), torch.device("cpu"))
    piece = Piece(
        data=torch.ones(2),
        noise=torch.ones(2),
        times=torch.ones(2),
        text=torch.ones(2),
        text_valid=None,
    )
    calls = []
    for _ in range(3):
        graphs.run(piece, lambda p: calls.append(p) or p.data)  # type: ignore[func-returns-value]
    assert calls == [piece] * 3


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would be recorded on another, hold nothing, and lose every gradient."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("valid", [None, torch.tensor([3, 17, 1])])
def test_longer_text_changes_no_result(valid: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    model, text = DiT(runs.MODEL), torch.randn(3, 17, 16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    latents = torch.randn(3, 1, 8, 8)
    longer, counts = in_few_lengths(text, valid)
    assert longer.shape[1] == 32
    torch.testing.assert_close(model(latents, longer, counts), model(latents, text, valid))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_replays_give_the_gradients_of_the_eager_step(weights: str) -> None:
    experiment = runs.experiment(precision="bf16", weights=weights, accumulate=2, device="cuda")
    with_graph, without = build_state(experiment), build_state(experiment)
    without.graphs = None
    for step in range(1, 6):
        found = []
        for state in (with_graph, without):
            batch = state.loader.next_batch()
            parts = list(pieces(batch, step, experiment.train, state.device))
            losses = accumulate_gradients(state, experiment.train, parts)
            found.append((losses, [g.grads.clone() for g in state.optimizer.groups]))
        torch.testing.assert_close(found[0][0], found[1][0])
        for ours, theirs in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-5)
    assert with_graph.graphs is not None
    assert len(with_graph.graphs._recorded) == 1


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
        assert ours.keys() == theirs.keys() > set(WRITER_FIELDS)
        for name, values in theirs.items():
            assert ours[name] == pytest.approx(values, rel=1e-4, abs=1e-9), name
        for one, other in zip(our_grads, their_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)
    assert with_graph.graphs is not None
    assert with_graph.graphs.looks == 2


@pytest.mark.gpu
@ON_GPU
def test_a_surgery_drops_the_graph_and_training_goes_on() -> None:
    plain = replace(runs.MODEL, rule=replace(runs.MODEL.rule, name="plain"))
    experiment = replace(runs.experiment(precision="bf16", device="cuda"), model=plain)
    state = build_state(experiment)
    assert state.graphs is not None
    losses = [train_step(state, experiment.train)["loss"] for _ in range(4)]
    assert state.graphs._recorded
    protect(state, gain=0.0625)
    assert not state.graphs._recorded
    losses += [train_step(state, experiment.train)["loss"] for _ in range(4)]
    alpha = state.model.get_parameter("blocks.0.rule_ffn.alpha")
    assert (alpha != 0.0625).all()  # it learns, so the new gains' gradients arrive
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.gpu
@ON_GPU
def test_a_capture_that_fails_costs_nothing_but_speed(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be recorded runs as it is written, and chance goes on as if nothing had been."""
    state = build_state(runs.experiment(device="cuda"))
    graphs = Graphs(state.model, state.device)
    batch = state.loader.next_batch()
    (piece,) = pieces(batch, 1, runs.TRAIN, state.device)

    def run(piece: Piece) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return piece.times * 2

    torch.cuda.manual_seed(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    for _ in range(3):
        assert torch.equal(graphs.run(piece, run), piece.times * 2)
    assert "runs without a CUDA graph" in caplog.text
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    assert torch.isfinite(torch.randn(1000, device="cuda").sum())


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_half_and_half_is_the_whole_on_a_gpu(tmp_path: Path, weights: str) -> None:
    changes = {"precision": "bf16", "weights": weights, "device": "cuda"}
    train(runs.experiment(**changes), tmp_path / "whole")
    train(runs.experiment(steps=4, **changes), tmp_path / "run")
    train(runs.experiment(**changes), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.gpu
@ON_GPU
def test_wide_heads_and_long_samples_resume_bit_for_bit_where_orders_are_fixed(
    tmp_path: Path, unfixed_orders: None
) -> None:
    """Attention's backward would add up the gradients of queries in any order."""
    model = replace(runs.MODEL, width=256, text_width=256, ffn_width=512, channels=3)
    config = replace(
        runs.TRAIN, precision="bf16", weights="bf16", device="cuda", deterministic=True, steps=6
    )
    data = DataConfig(dataset="shapes", size=64)
    experiment = Experiment(model=model, data=data, train=config)
    half = replace(experiment, train=replace(config, steps=3))
    train(experiment, tmp_path / "whole")
    train(half, tmp_path / "run")
    train(experiment, tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_may_ask_for_fixed_orders(unfixed_orders: None) -> None:
    build_state(runs.experiment())
    assert not torch.are_deterministic_algorithms_enabled()
    build_state(runs.experiment(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def unfixed_orders() -> Iterator[None]:
    """Leaves them to chance again."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
