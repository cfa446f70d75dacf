"""Forward and backward as one CUDA graph: the same numbers, and when it must not be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvsplit.models import DiT
from mvsplit.training import build_state, train
from mvsplit.training.graphs import Graphs
from mvsplit.training.pieces import Piece, in_few_lengths
from mvsplit.training.step import accumulate_gradients, pieces, train_step
from mvsplit.training.surgery import protect
from tests.training import runs

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_not_used_while_somebody_watches() -> None:
    model = DiT(runs.MODEL)
    graphs = Graphs(model, torch.device("cpu"))
    assert graphs.usable()
    hook = model.blocks[1].get_submodule("ffn.w2").register_forward_hook(lambda *_: None)
    assert not graphs.usable()
    hook.remove()
    assert graphs.usable()


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
        graphs.run(piece, 1.0, lambda p: calls.append(p) or p.data)  # type: ignore[func-returns-value]
    assert calls == [piece] * 3


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
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_half_and_half_is_the_whole_on_a_gpu(tmp_path: Path, weights: str) -> None:
    changes = {"precision": "bf16", "weights": weights, "device": "cuda"}
    train(runs.experiment(**changes), tmp_path / "whole")
    train(runs.experiment(steps=4, **changes), tmp_path / "run")
    train(runs.experiment(**changes), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
