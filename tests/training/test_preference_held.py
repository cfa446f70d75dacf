"""The objective of pairs with samples of the data set beside them, `--dpo.real`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvsplit.cli.start import starter
from mvsplit.data import Batch
from mvsplit.data.digits import Digits
from mvsplit.errors import UserError
from mvsplit.flow import DPOConfig
from mvsplit.hub import load_weights
from mvsplit.training import NonFiniteError, train, train_step
from mvsplit.training.builders import build_loader
from mvsplit.training.explanation import explain
from mvsplit.training.flight import _read_batch, _write_batch, flight_of_run, read_flight
from mvsplit.training.pieces import Piece
from mvsplit.training.step import accumulate_gradients, pieces, pieces_beside
from tests.training import flights, runs
from tests.training.preferences import ANCHOR, BETA, aligning, begun, by_hand, moved_away

ROW = 3  # that is spoilt


def test_it_is_held_to_samples_of_the_data_set(whole_run: Path, pairs: Path) -> None:
    """Gradients and what is measured, in pieces, against the formula in fp64."""
    dpo = DPOConfig(beta=BETA, anchor=ANCHOR, real=3.0)
    experiment = aligning(whole_run, pairs, dpo=dpo, accumulate=2)
    state = begun(experiment)
    moved_away(state.model)
    batch = state.loader.next_batch()
    digits = Digits().fetch(batch.beside.indices.tolist())
    assert torch.equal(batch.beside.latents, digits.latents)
    one = replace(experiment.train, accumulate=1)
    (piece,), (real,) = (
        pieces(batch, 1, one, state.device),
        pieces_beside(batch, 1, one, state.device),
    )
    assert not torch.equal(piece.noise, real.noise)
    assert not torch.equal(piece.times, real.times)
    parts = list(pieces(batch, 1, experiment.train, state.device))
    beside = pieces_beside(batch, 1, experiment.train, state.device)
    assert len(parts) == len(beside) == 2
    measured = accumulate_gradients(state, experiment.train, parts, beside=beside)
    assert state.objective.names[-1] == "loss_real"
    found = {n: p.grad.clone() for n, p in state.model.named_parameters()}
    model = copy.deepcopy(state.model).double()
    model.zero_grad()
    whole, real = (
        Piece(**{n: v.double() for n, v in vars(p).items() if v is not None}, text_valid=None)
        for p in (piece, real)
    )
    t = real.times[:, None, None, None]
    velocity = model((1 - t) * real.data + t * real.noise, real.text, None)
    errors = (real.data - real.noise - velocity).square().flatten(1).mean(1)
    expected = by_hand(model, load_weights(whole_run).double(), whole) + 3 * errors.mean()
    expected.backward()
    torch.testing.assert_close(measured[:, -1].double(), errors.detach(), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_held_run_goes_on_and_is_explained(whole_run: Path, pairs: Path, tmp_path: Path) -> None:
    dpo = DPOConfig(beta=BETA, real=3.0)
    whole = aligning(whole_run, pairs, steps=6, dpo=dpo)
    train(whole, tmp_path / "one", start=starter(whole))
    half = aligning(whole_run, pairs, steps=3, dpo=dpo)
    train(half, tmp_path / "two", start=starter(half))
    train(whole, tmp_path / "two", start=None)
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")
    log = runs.log_of(tmp_path / "one")
    assert log[0]["loss"] == pytest.approx(math.log(2))
    assert 0 < log[-1]["loss_real"] < 5
    assert explain(flight_of_run(tmp_path / "one", 4)).reproduction.exact
    batch = begun(whole).loader.next_batch()
    _write_batch(tmp_path / "batch.safetensors", batch)
    read = _read_batch(load_file(tmp_path / "batch.safetensors"))
    for one, other in ((read, batch), (read.beside, batch.beside)):
        for name in ("latents", "text", "indices"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(read.rejected, batch.rejected)
    assert read.beside.rejected is None
    assert read.beside.beside is None


def test_other_data_beside_the_pairs_are_noticed(whole_run: Path, pairs: Path) -> None:
    first = aligning(whole_run, pairs, dpo=DPOConfig(beta=BETA, real=3.0))
    other = replace(first, data=replace(first.data, split="train"))
    loader = build_loader(first)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match="beside: the loader has"):
        build_loader(other).load_state_dict(loader.state_dict())


def spoilt(batch: Batch, factor: float) -> Batch:
    """One sample beside the pairs is multiplied."""
    assert batch.beside is not None
    latents = batch.beside.latents.clone()
    latents[ROW] *= factor
    return replace(batch, beside=replace(batch.beside, latents=latents))


def test_a_value_that_is_not_finite_beside_the_pairs_is_named(whole_run: Path, pairs: Path) -> None:
    experiment = aligning(whole_run, pairs, dpo=DPOConfig(beta=BETA, real=3.0))
    state = begun(experiment)
    flights.spoil_batches(state, lambda batch: spoilt(batch, 1e39))
    with pytest.raises(NonFiniteError, match=r"loss 0.6931, .* first in the output of Embed"):
        train_step(state, experiment.train)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_sample_beside_the_pairs_is_blamed_alone(
    whole_run: Path, pairs: Path, tmp_path: Path, accumulate: int
) -> None:
    """Not the pair of the same row."""
    dpo = DPOConfig(beta=BETA, real=3.0)
    experiment = aligning(whole_run, pairs, dpo=dpo, accumulate=accumulate)
    path = flights.fly(
        tmp_path / "run",
        experiment,
        lambda state: flights.spoil_batches(state, lambda batch: spoilt(batch, 1e3)),
        begin=begun,
    )
    flight = read_flight(path)
    found = explain(flight)
    assert found.reproduction.exact
    assert found.conclusion.verdict == "data-outlier"
    (sample,) = found.dropped
    assert flight.batch is not None
    assert flight.batch.beside is not None
    assert (sample.row, sample.beside) == (ROW, True)
    assert sample.index == int(flight.batch.beside.indices[ROW])
    assert f"sample {sample.index} of what comes beside" in found.conclusion.sentences[0]
    without = next(t for t in found.trials if t.name == "without-samples")
    assert without.grad_norm < 3 * found.calm
    assert not any(s.beside for s in found.trace.worst_samples)
    chance = {"noise", "times", "noise beside", "times beside"}
    assert flight.records[-1]["seeds"].keys() == chance
