"""Scores of an ensemble in the precision of the runs on a GPU, against its members one by one."""

from dataclasses import replace

import pytest
import torch

from mvsplit.reproduce.depth.ensemble import Ensemble
from mvsplit.reproduce.depth.ensemble_scores import draw_each, score
from mvsplit.reproduce.depth.plan import BenchRun, get_entries
from mvsplit.reproduce.depth.run import draw
from mvsplit.reproduce.depth.run import score as score_alone
from mvsplit.training import build_state
from tests.reproduce.depth.tiny import TINY

SIZE = replace(TINY, precision="bf16")
PROMPTS = ["a red circle", "", "two blue squares left of a green triangle"]


@pytest.fixture
def states():
    """Two networks that were moved from their start."""
    torch.manual_seed(0)
    found = []
    for seed, entry in enumerate(get_entries(["mvsplit-root", "alpha-standard"])):
        run = BenchRun(entry=entry, depth=2, width=16, rate=1e-3, seed=seed)
        state = build_state(run.experiment(SIZE))
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found.append(state)
    return found


def test_each_draws_what_it_draws_alone_in_the_precision_of_the_run(states, monkeypatch):
    ensemble = Ensemble([state.model for state in states], torch.bfloat16)
    ensemble.refresh()
    seen, forward = set(), ensemble.forward

    def watched(noisy, text, valid):
        seen.update((noisy.dtype, text.dtype))
        return forward(noisy, text, valid)

    monkeypatch.setattr(ensemble, "forward", watched)
    embedder = states[0].loader.embedder
    with torch.no_grad():
        found = draw_each(ensemble, embedder, PROMPTS, 3)
        for pictures, state in zip(found, states, strict=True):
            model = state.model.to(torch.bfloat16)
            alone = draw(model, embedder, PROMPTS, 3, like=next(model.parameters()))
            spread = alone.std()
            assert (pictures - alone).square().mean().sqrt() < 0.02 * spread
    assert seen == {torch.bfloat16}
    assert not torch.equal(found[0], found[1])


def test_scores_are_of_the_weights_as_they_are_and_of_rounded_gains(states):
    ensemble = Ensemble([state.model for state in states], torch.bfloat16)
    with torch.no_grad():  # after its bf16 copy was made, as the last update of a run
        for member, state in enumerate(states):
            weight = state.model.get_parameter("head.weight")
            weight.mul_(-3)
            ensemble._cut(ensemble.values, "head.weight")[member] = weight
    gains = ensemble.gains.clone()
    found = score(ensemble, states[0].loader.embedder, SIZE)
    assert not torch.equal(ensemble.gains, gains)
    torch.testing.assert_close(ensemble.gains, gains.bfloat16().float(), rtol=0, atol=0)
    for scores, state in zip(found, states, strict=True):
        alone = score_alone(state, SIZE)
        assert scores["validation_loss"] == pytest.approx(alone["validation_loss"], rel=5e-3)
        assert scores["tasks"].keys() == alone["tasks"].keys()
        frechet = alone["tasks"]["shapes_frechet"]
        assert scores["tasks"]["shapes_frechet"] == pytest.approx(frechet, rel=0.05)


def test_a_member_that_is_not_finite_has_no_scores_and_leaves_the_others_theirs(states):
    ensemble = Ensemble([state.model for state in states], torch.bfloat16)
    embedder = states[0].loader.embedder
    calm = score(ensemble, embedder, SIZE)
    ensemble.values[0] = torch.nan
    broken = score(ensemble, embedder, SIZE)
    assert broken[0]["validation_loss"] is None
    assert broken[0]["tasks"] is None
    assert broken[1] == calm[1]
