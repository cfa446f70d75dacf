"""What explains a spike that was made on purpose."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mvsplit.data import Batch
from mvsplit.training import TrainState
from mvsplit.training.explanation import Explanation, explain
from mvsplit.training.flight import flight_of_run, read_flight
from tests.training import flights

ROW = 5


def explained(tmp_path: Path, happens: object, **changes: object) -> Explanation:
    path = flights.fly(tmp_path, flights.plain(**changes), happens)  # type: ignore[arg-type]
    return explain(read_flight(path))


def huge_sample(state: TrainState) -> None:
    def spoil(batch: Batch) -> Batch:
        latents = batch.latents.clone()
        latents[ROW] *= 1e3
        return dataclasses.replace(batch, latents=latents)

    flights.spoil_batches(state, spoil)


def text_that_bf16_rounds_to_infinity(state: TrainState) -> None:
    def spoil(batch: Batch) -> Batch:
        return dataclasses.replace(batch, text=torch.full_like(batch.text, 3.4e38))

    flights.spoil_batches(state, spoil)


@pytest.mark.parametrize("accumulate", [1, 2, 5])  # of 8 samples: 2, 2, 2, 1 and 1
def test_a_poisoned_sample_is_named(tmp_path: Path, accumulate: int) -> None:
    found = explained(tmp_path, huge_sample, accumulate=accumulate)
    assert found.reproduction.exact
    assert len(found.reproduction.recorded) > 2 + 3 * 6
    assert found.conclusion.verdict == "data-outlier"
    (sample,) = found.dropped
    assert sample.row == ROW
    record = read_flight(Path(found.source)).records[-1]
    assert sample.index == record["indices"][ROW]
    assert sample.loss == record["sample_losses"][ROW] == max(record["sample_losses"])
    assert sample.unusual > 100
    assert f"sample {sample.index}" in found.conclusion.sentences[0]
    by_name = {t.name: t for t in found.trials}
    assert by_name["without-samples"].grad_norm < 3 * found.calm
    assert found.trace.worst_samples[0].row == ROW


@pytest.mark.parametrize(
    ("branch", "writer", "other"),
    [("attn", "W_O", "centered-ffn"), ("ffn", "W_2", "centered-attn")],
)
def test_the_branch_whose_mean_mode_opens_is_named(
    tmp_path: Path, branch: str, writer: str, other: str
) -> None:
    found = explained(tmp_path, lambda state: flights.align_tokens(state, branch))
    assert found.reproduction.exact
    assert found.conclusion.verdict == "mean-mode"
    assert found.conclusion.removed_by == (f"centered-{branch}", "centered-both")
    assert found.removed[other] == pytest.approx(0, abs=0.1)
    losses = [trial.loss for trial in found.trials if trial.name.startswith("centered")]
    assert losses == pytest.approx([found.trials[0].loss] * 3, rel=1e-6)
    assert writer in found.conclusion.sentences[-1]
    split = found.trace.mode_split
    mean, centered = (max(split[f"{g}_{branch}"]) for g in ("g_mean", "g_ctr"))
    assert mean > 2 * centered  # over both segments together, and text differs from image
    assert min(split["tcs"]) > 0.3


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_an_overflow_of_bf16_is_gone_in_fp32(tmp_path: Path, weights: str) -> None:
    changes = {"precision": "bf16", "weights": weights}
    found = explained(tmp_path, text_that_bf16_rounds_to_infinity, **changes)
    assert found.reproduction.exact
    assert math.isnan(found.trials[0].loss)
    assert found.conclusion.verdict == "precision"
    assert found.conclusion.removed_by == ("fp32",)
    assert "In fp32" in found.conclusion.sentences[0]
    assert found.trace.not_finite["weights"] is None
    assert "Q of layer 0" in str(found.trace.not_finite["activations"])
    assert found.trace.not_finite["gradients"] is not None


def test_a_quiet_step_has_nothing_to_explain(tmp_path: Path) -> None:
    found = explained(tmp_path, flights.nothing)
    assert found.reproduction.exact
    assert found.conclusion.verdict == "no-spike"


def test_other_weights_are_not_taken_for_the_step(tmp_path: Path) -> None:
    flight = read_flight(flights.fly(tmp_path, flights.plain(), flights.nothing))
    changed = [r | {"loss": r["loss"] * 1.01} for r in flight.records]
    found = explain(dataclasses.replace(flight, records=changed))
    assert not found.reproduction.exact
    assert found.conclusion.verdict == "not-reproduced"


def test_the_loss_of_each_rank_is_that_of_its_rows(tmp_path: Path) -> None:
    flight = read_flight(flights.fly(tmp_path, flights.plain(), flights.nothing))
    losses = flight.records[-1]["sample_losses"]
    ranks = explain(dataclasses.replace(flight, world=2)).trace.rank_losses
    assert ranks == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_step_of_a_run_is_replayed_to_the_bit(whole_run: Path, step: int) -> None:
    """From the start, and from the checkpoints of steps 6 and 8 that the run kept."""
    said: list[str] = []
    found = explain(flight_of_run(whole_run, step), say=said.append)
    assert found.reproduction.exact
    assert found.state_step == (6 if step > 6 else 0)
    assert any(line.startswith("replaying") for line in said)


@pytest.mark.parametrize("accumulate", [1, 5])
def test_the_rms_of_the_output_gradient(tmp_path: Path, accumulate: int) -> None:
    """∂L/∂v = 2(v − target)/n of a mean square L over n numbers, so its RMS is 2√L/n, whatever
    pieces there are."""
    found = explained(tmp_path, flights.nothing, accumulate=accumulate)
    numbers = 8 * 8 * 8  # samples and pixels
    assert found.trace.output_gradient_rms == pytest.approx(
        2 * math.sqrt(found.trials[0].loss) / numbers, rel=1e-5
    )
