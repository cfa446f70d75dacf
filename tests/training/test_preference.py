"""The objective of pairs: its loss and gradient, its reference, and a run of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvsplit.cli.start import starter
from mvsplit.data.pairs import write_pairs
from mvsplit.diagnostics.probe import FIELDS, LayerProbe
from mvsplit.errors import UserError
from mvsplit.flow import DPOConfig
from mvsplit.hub import load_weights
from mvsplit.residuals import RuleConfig
from mvsplit.training import (
    DataConfig,
    NonFiniteError,
    Origin,
    load_run,
    train,
    train_step,
)
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint, step_of
from mvsplit.training.explanation import explain
from mvsplit.training.flight import flight_of_run
from mvsplit.training.objective import Preference
from mvsplit.training.pieces import Piece
from mvsplit.training.step import accumulate_gradients, pieces, pieces_beside
from tests.training import runs
from tests.training.preferences import ANCHOR, BETA, TUNES, aligning, begun, by_hand, moved_away


@pytest.mark.parametrize("tune", TUNES)
def test_loss_and_gradients_in_fp64(whole_run: Path, pairs: Path, tune: str) -> None:
    experiment = aligning(whole_run, pairs, tune)
    state = begun(experiment)
    (piece,) = pieces(state.loader.next_batch(), 1, experiment.train, state.device)
    assert piece.rejected is not None
    assert piece.text_valid is None
    wide = {name: v.double() for name, v in vars(piece).items() if v is not None}
    piece = Piece(**wide, text_valid=None)
    model = copy.deepcopy(state.model).double()
    objective = Preference(model, experiment.train.dpo)
    moved_away(model)
    measured = objective(model, piece, experiment.train)
    (measured[:, 0].mean()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.grad = None
    reference = load_weights(whole_run).double()
    expected = by_hand(model, reference, piece)
    expected.backward()
    minimised = float(measured[:, 0].detach().mean())
    assert minimised == pytest.approx(float(expected.detach()), rel=1e-10)
    assert (
        float(measured[:, 1].detach().abs().min()) > 1e-3
    )  # a margin that is none would test nothing
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-12)
            assert found[name].any()
    dpo = measured[:, 0] - ANCHOR * measured[:, 3]
    torch.testing.assert_close(dpo, -torch.log(torch.sigmoid(measured[:, 1])))
    assert measured[:, 2].tolist() == [float(m > 0) for m in measured[:, 1]]


@pytest.mark.parametrize("tune", TUNES)
def test_it_starts_at_log_2_and_equal_samples_push_nothing(
    whole_run: Path, pairs: Path, tune: str
) -> None:
    config = aligning(whole_run, pairs, tune, dpo=DPOConfig(beta=BETA), accumulate=2)
    state = begun(config)
    parts = list(pieces(state.loader.next_batch(), 1, config.train, state.device))
    measured = accumulate_gradients(state, config.train, parts)
    assert measured[:, 0].tolist() == [torch.tensor(2.0).log().item()] * 8
    assert measured[:, 1:3].tolist() == [[0.0, 0.5]] * 8
    assert torch.equal(measured[:, 3:5], measured[:, 5:7])
    assert sum(float(group.grads.norm()) for group in state.optimizer.groups) > 1e-2
    same = [replace(part, rejected=part.data) for part in parts]
    assert accumulate_gradients(state, config.train, same)[:, 0].tolist() == measured[:, 0].tolist()
    for group in state.optimizer.groups:
        # Of either sample −½·β/2·∂ℓ, summed in another order.
        assert float(group.grads.abs().max()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tune", TUNES)
def test_on_a_gpu_it_starts_at_log_2_and_a_graph_changes_nothing(
    whole_run: Path, pairs: Path, tune: str
) -> None:
    """Both networks run on the same kernels in bf16; the third time graphs are replayed, of the
    pairs and of what comes beside them."""
    dpo = DPOConfig(beta=BETA, real=3.0)
    config = aligning(whole_run, pairs, tune, dpo=dpo, device="cuda", precision="bf16")
    state = begun(config)
    batch = state.loader.next_batch()
    parts = list(pieces(batch, 1, config.train, state.device))
    beside = pieces_beside(batch, 1, config.train, state.device)
    written, _, replayed = (
        accumulate_gradients(state, config.train, parts, beside=beside) for _ in range(3)
    )
    assert state.graphs.recorded == 2
    assert written[:, 1].tolist() == [0.0] * 8
    assert torch.equal(replayed, written)


def test_the_cut_of_a_batch_changes_nothing(whole_run: Path, pairs: Path) -> None:
    found = []
    for accumulate in (1, 4):
        experiment = aligning(whole_run, pairs, accumulate=accumulate)
        state = begun(experiment)
        moved_away(state.model)
        parts = list(pieces(state.loader.next_batch(), 1, experiment.train, state.device))
        assert len(parts) == accumulate
        measured = accumulate_gradients(state, experiment.train, parts)
        found.append((measured, *(group.grads.clone() for group in state.optimizer.groups)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tune", TUNES)
def test_the_reference_stays_and_shares_what_does_not_learn(
    whole_run: Path, pairs: Path, tune: str
) -> None:
    experiment = aligning(whole_run, pairs, tune, lr=0.1, warmup=1)
    state = begun(experiment)
    assert isinstance(state.objective, Preference)
    start = dict(load_weights(whole_run).named_parameters())
    for _ in range(3):
        train_step(state, experiment.train)
    reference = dict(state.objective.reference.named_parameters())
    own = dict(state.model.named_parameters())
    shared = {n for n, p in own.items() if reference[n].data_ptr() == p.data_ptr()}
    assert shared == {n for n, p in own.items() if not p.requires_grad}
    assert reference.keys() == own.keys()
    for name, weight in start.items():
        assert torch.equal(reference[name], weight)
        assert reference[name].requires_grad == own[name].requires_grad
        assert reference[name].grad is None or name in shared
    batch = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 16)
    with torch.no_grad():
        before = load_weights(whole_run)(*batch)
        torch.testing.assert_close(state.objective.reference(*batch), before)
        assert (state.model(*batch) - before).abs().max() > 0.01


@pytest.mark.parametrize("tune", TUNES)
def test_an_interrupted_run_goes_on_bit_for_bit(
    whole_run: Path, pairs: Path, tmp_path: Path, tune: str
) -> None:
    """Without its source: the reference is in the checkpoint."""
    whole = aligning(whole_run, pairs, tune, steps=6)
    train(whole, tmp_path / "one", start=starter(whole))
    half = aligning(whole_run, pairs, tune, steps=3)
    train(half, tmp_path / "two", start=starter(half))
    train(whole, tmp_path / "two", start=None)
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")
    saved = read_checkpoint(list_checkpoints(tmp_path / "two" / "checkpoints")[-1]).tensors
    assert saved["reference"].keys() == saved["ema"].keys()  # what learns
    assert all((".lora_" in name) == (tune == "lora") for name in saved["reference"])
    log = runs.log_of(tmp_path / "one")
    assert log[0]["loss"] == pytest.approx(math.log(2) + ANCHOR * log[0]["loss_chosen"])
    assert log[-1]["margin"] != 0.0
    assert {"accuracy", "loss_rejected", "reference_chosen", "reference_rejected"} <= set(log[-1])
    sample = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 16)
    drawn = load_run(tmp_path / "one").model(*sample)
    torch.testing.assert_close(load_weights(tmp_path / "one")(*sample), drawn)


def test_a_surgery_at_the_start_leaves_the_reference(pairs: Path, tmp_path: Path) -> None:
    """The network is given gains and its writers are divided by them; what it is measured against
    is the network that it was."""
    plain = replace(runs.MODEL, rule=RuleConfig(name="plain"))
    train(replace(runs.experiment(steps=2), model=plain), tmp_path / "plain")
    source = aligning(tmp_path / "plain", pairs, dpo=DPOConfig(beta=BETA), steps=1)
    source = replace(source, model=plain)
    train(source, tmp_path / "pairs", start=starter(source))
    origin = Origin(source=str(tmp_path / "pairs"), ema=False, optimizer="kept", split=True)
    experiment = replace(source, origin=origin)
    state = begun(experiment)
    assert state.model.config.rule.name == "mvsplit"
    (piece,) = pieces(state.loader.next_batch(), 1, experiment.train, state.device)
    measured = accumulate_gradients(state, experiment.train, [piece])
    assert measured[:, 0].tolist() == [torch.tensor(2.0).log().item()] * 8


def test_other_pairs_are_noticed(whole_run: Path, pairs: Path, tmp_path: Path) -> None:
    first = aligning(whole_run, pairs, steps=1)
    train(first, tmp_path / "run", start=starter(first))
    others = tmp_path / "others.parquet"
    write_pairs(others, [("one", torch.zeros(1, 8, 8), torch.ones(1, 8, 8))] * 20)
    with pytest.raises(UserError, match=r"pairs: the loader has"):
        train(aligning(whole_run, others, steps=2), tmp_path / "run")


def test_the_probe_sees_the_network_alone(whole_run: Path, pairs: Path) -> None:
    """Every field, attention included: the same as where the reference is no network at all."""
    experiment = aligning(whole_run, pairs)
    state = begun(experiment)
    moved_away(state.model)
    assert isinstance(state.objective, Preference)
    parts = list(pieces(state.loader.next_batch(), 1, experiment.train, state.device))

    def probed() -> dict[str, Any]:
        with LayerProbe(state.taps, fields=FIELDS) as probe:
            accumulate_gradients(state, experiment.train, parts)
        return probe.arrays()

    watched, outputs = probed(), []
    reference = state.objective.reference
    hook = reference.register_forward_hook(lambda _, args, output: outputs.append(output))
    accumulate_gradients(state, experiment.train, parts)
    hook.remove()
    replay: Callable[..., Tensor] = lambda *args: outputs[0]  # noqa: E731
    reference.forward = replay  # type: ignore[method-assign]
    assert probed() == watched
    assert len(outputs) == 1


def test_a_step_is_explained_as_it_was(whole_run: Path, pairs: Path, tmp_path: Path) -> None:
    experiment = aligning(whole_run, pairs, steps=4)
    train(experiment, tmp_path / "run", start=starter(experiment))
    found = explain(flight_of_run(tmp_path / "run", 4))
    assert found.reproduction.exact
    assert found.reproduction.recorded["loss"] == runs.log_of(tmp_path / "run")[3]["loss"]


def test_a_start_that_is_gone_is_not_drawn_anew(
    whole_run: Path, pairs: Path, tmp_path: Path
) -> None:
    """The checkpoint of step 0 is pruned: step 2 cannot be run again."""
    experiment = aligning(whole_run, pairs, steps=6)
    train(experiment, tmp_path / "run", start=starter(experiment))
    assert [step_of(p) for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == [3, 6]
    with pytest.raises(UserError, match=r"step=2: the run began with the weights of .*whole"):
        explain(flight_of_run(tmp_path / "run", 2))


def test_a_value_that_is_not_finite_is_named(whole_run: Path, pairs: Path) -> None:
    experiment = aligning(whole_run, pairs)
    state = begun(experiment)
    batch = state.loader.next_batch()
    assert batch.rejected is not None
    spoilt = replace(batch, rejected=batch.rejected * 1e39)
    state.loader.next_batch = lambda: spoilt  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"loss nan, .* first in the output of Embed"):
        train_step(state, experiment.train)


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (
            lambda whole, pairs: replace(aligning(whole, pairs), data=DataConfig()),
            "objective='dpo' learns from pairs: name a parquet file with --data.pairs",
        ),
        (
            lambda whole, pairs: runs.experiment(dpo=DPOConfig(real=3.0)),
            r"train.dpo=DPOConfig\(.*real=3.0\): flow matching has no pairs; add --objective dpo",
        ),
        (
            lambda whole, pairs: replace(aligning(whole, pairs), train=runs.TRAIN),
            "data.pairs=.*: flow matching reads none; add --objective dpo",
        ),
        (
            lambda whole, pairs: replace(aligning(whole, pairs), origin=None),
            "objective='dpo': a preference is measured against trained weights; .* --from",
        ),
        (
            lambda whole, pairs: aligning(whole, pairs, dpo=DPOConfig(beta=0.0)),
            r"train.dpo.beta=0.0: must be greater than 0",
        ),
        (
            lambda whole, pairs: aligning(whole, pairs, dpo=DPOConfig(anchor=-1.0)),
            r"train.dpo.anchor=-1.0: must not be negative",
        ),
        (
            lambda whole, pairs: aligning(whole, pairs, dpo=DPOConfig(real=-1.0)),
            r"train.dpo.real=-1.0: must not be negative",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    whole_run: Path, pairs: Path, tmp_path: Path, experiment: Any, message: str
) -> None:
    def attempt() -> None:
        wanted = experiment(whole_run, pairs)
        train(wanted, tmp_path / "run", start=starter(wanted))

    with pytest.raises(UserError, match=message):
        attempt()
