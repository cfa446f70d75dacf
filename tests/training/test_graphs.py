"""Forward and backward as one CUDA graph: the same numbers, and when it must not be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from mvsplit.models import DiT
from mvsplit.training import DataConfig, Experiment, build_state, train
from mvsplit.training.builders import resolve_device
from mvsplit.training.graphs import Graphs
from mvsplit.training.pieces import Piece, in_few_lengths
from mvsplit.training.step import accumulate_gradients, pieces, train_step
from mvsplit.training.surgery import protect
from tests.training import runs
from tests.training.recordings import ON_GPU, Recording, losses_of, some_piece


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
