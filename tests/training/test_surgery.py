"""A run is turned into MV-Split and goes on; moments of late parameters come into one unit."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from mvsplit.cli.start import StartOptions, origin_of, starter
from mvsplit.data.atomic import sha256
from mvsplit.errors import UserError
from mvsplit.hub import load_weights, write_weights
from mvsplit.models import DiT
from mvsplit.residuals import RuleConfig
from mvsplit.training import (
    Experiment,
    Origin,
    TrainState,
    TuneConfig,
    build_state,
    load_run,
    read_experiment,
    train,
)
from mvsplit.training.carried import correction
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint
from mvsplit.training.config import ReactionConfig
from mvsplit.training.finetune import Start, begin_from
from mvsplit.training.growth import carry_over
from mvsplit.training.progress import ProgressLine
from mvsplit.training.step import train_step
from mvsplit.training.surgery import protect
from tests.training import runs
from tests.training.test_growth import MOVED, growing

GAIN = 2.0**-4
PLAIN = replace(runs.MODEL, rule=RuleConfig(name="plain"))
REACTION = ReactionConfig(gain=GAIN, anneal=4, alpha=0.25, leak=0.5)
BETAS = runs.TRAIN.betas


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of a plain network. Not to be written to."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(replace(runs.experiment(), model=PLAIN), run)
    return run


def splitting(source: Path, **changes: Any) -> Experiment:
    config = replace(runs.TRAIN, **{"steps": 6, "keep": 9, "reaction": REACTION, **changes})
    origin = Origin(source=str(source), ema=False, optimizer="kept", split=True)
    return Experiment(model=PLAIN, train=config, origin=origin)


def split(experiment: Experiment, run: Path) -> None:
    train(experiment, run, start=starter(experiment))


def saved(run: Path, which: int = -1) -> Any:
    return read_checkpoint(list_checkpoints(run / "checkpoints")[which])


def test_the_run_begins_with_the_function_of_its_source(plain_run: Path, tmp_path: Path) -> None:
    """Bit for bit, of the weights as trained; moments and data position are those it had, the
    writers' in the units of W/g."""
    split(splitting(plain_run), tmp_path / "run")
    source, first = saved(plain_run), saved(tmp_path / "run", 0)
    models = [
        load_weights(path, ema=False)
        for path in (plain_run, tmp_path / "run" / "checkpoints" / "step_00000000")
    ]
    x, text = torch.randn(4, 1, 8, 8), torch.randn(4, 3, 16)
    assert torch.equal(*(model(x, text) for model in models))
    assert first.values["data"] == source.values["data"]
    n = source.values["updates"]["decayed"]
    assert first.values["updates"] == {"decayed": n, "rest": n, "joined": 0}
    for name, moment in source.tensors["optimizer"].items():
        writer = name.endswith(("attention.proj.weight", "ffn.w2.weight"))
        unit = (GAIN if name.startswith("exp_avg.") else GAIN**2) if writer else 1.0
        assert torch.equal(first.tensors["optimizer"][name], moment * unit), name
    for name, weight in first.tensors["ema"].items():
        assert torch.equal(weight, first.tensors["model"][name])


def test_the_start_line_has_the_rule_of_the_network(plain_run: Path, tmp_path: Path) -> None:
    text, experiment = io.StringIO(), splitting(plain_run, steps=1)
    line = ProgressLine(Console(file=text, width=200))
    train(experiment, tmp_path / "run", observers=[line], start=starter(experiment))
    assert "rule mvsplit" in text.getvalue()


def test_alpha_and_leak_go_where_they_are_sent(plain_run: Path, tmp_path: Path) -> None:
    """Four steps after the surgery both have arrived, whatever they learned on the way."""
    split(splitting(plain_run, steps=4), tmp_path / "run")
    weights = saved(tmp_path / "run").tensors["model"]
    for name in ("blocks.0.rule_attention", "blocks.1.rule_ffn"):
        assert (weights[f"{name}.alpha"] == 0.25).all()
        assert (weights[f"{name}.leak"] == 0.5).all()
        assert (weights[f"{name}.beta"] != GAIN).all()  # it learns


@pytest.mark.parametrize("share", [1.0, 0.125])
def test_the_gains_may_learn_at_a_rate_of_their_own(
    plain_run: Path, tmp_path: Path, share: float
) -> None:
    """Adam's first step is ±lr, whatever the gradient: of the new gains, the share of it."""
    reaction = replace(REACTION, anneal=0)
    changes = {"steps": 1, "warmup": 0, "lr": 1e-3, "gain_lr": share, "reaction": reaction}
    split(splitting(plain_run, **changes), tmp_path / "run")
    for name in ("alpha", "beta"):
        gain = saved(tmp_path / "run").tensors["model"][f"blocks.1.rule_ffn.{name}"]
        assert (gain - GAIN).abs().median() == pytest.approx(share * 1e-3, rel=1e-2)


def test_it_resumes_bit_for_bit(plain_run: Path, tmp_path: Path) -> None:
    split(splitting(plain_run), tmp_path / "one")
    split(splitting(plain_run, steps=3), tmp_path / "two")
    train(splitting(plain_run), tmp_path / "two")
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")


def test_it_goes_on_as_the_policy_would(plain_run: Path) -> None:
    """Restored and operated on in memory, or begun from the checkpoint: the same steps."""
    source, wanted = saved(plain_run), splitting(plain_run)
    here = build_state(replace(wanted, origin=None))
    here.restore(replace(source, tensors={**source.tensors}))
    protect(here, gain=GAIN)
    here.reactions = replace(here.reactions, protected_at=here.step)
    there = build_state(wanted)
    model = load_weights(plain_run, ema=False)
    begin_from(there, wanted, lambda: Start(model=model, source=source))
    there.step = here.step
    there.reactions = replace(there.reactions, protected_at=there.step)
    config = replace(wanted.train, steps=20)
    losses = [[train_step(s, config)["loss"] for s in (here, there)] for _ in range(4)]
    assert all(a == b for a, b in losses)


def test_what_cannot_be_split_is_refused(plain_run: Path, tmp_path: Path) -> None:
    frozen = splitting(plain_run, tune=TuneConfig(what="all", only=("head.*",)))
    with pytest.raises(UserError, match=r"origin\.split: every branch gets new gains"):
        split(frozen, tmp_path / "run")
    keel = replace(runs.experiment(steps=1), model=replace(PLAIN, rule=RuleConfig(name="keel")))
    train(keel, tmp_path / "keel")
    wanted = replace(splitting(tmp_path / "keel"), model=keel.model)
    with pytest.raises(UserError, match=r"model\.rule\.name='keel' cannot be turned"):
        split(wanted, tmp_path / "run")
    with pytest.raises(UserError, match="--split-from takes neither --from nor --adapter"):
        origin_of(StartOptions(split_from=plain_run, weights=plain_run))
    with pytest.raises(UserError, match="leave out --split-from"):
        origin_of(StartOptions(split_from=plain_run, grow_from=plain_run))
    assert origin_of(StartOptions(split_from=plain_run)) == splitting(plain_run).origin


@pytest.mark.parametrize(("alpha", "leak"), [(-0.1, 0.0), (0.0, 1.5)])
def test_targets_outside_their_range_are_refused(alpha: float, leak: float) -> None:
    with pytest.raises(UserError, match=r"train\.reaction\.(alpha|leak)=.*must be in \[0, 1\]"):
        ReactionConfig(alpha=alpha, leak=leak)


# Moments


def corrected(moment: Tensor, kind: str, updates: int) -> Tensor:
    """What Adam makes of a moment."""
    return moment / (1 - BETAS[kind == "exp_avg_sq"] ** updates)


def test_a_corrected_moment_is_what_adam_saw() -> None:
    counts = {"decayed": 100, "rest": 100, "joined": 7, "joined-decayed": 7}
    moment = torch.tensor(3.0, dtype=torch.double)
    for kind in ("exp_avg", "exp_avg_sq"):
        name = f"{kind}.blocks.4.ffn.w2.weight"
        ours = moment * correction(name, [4, 5], counts, BETAS)
        torch.testing.assert_close(corrected(ours, kind, 100), corrected(moment, kind, 7))
        assert correction(name, [5, 40], counts, BETAS) == 1
        assert correction(name, [], counts, BETAS) == 1
        gain = f"{kind}.blocks.4.rule_ffn.beta"
        ours = moment * correction(gain, [], counts, BETAS)
        torch.testing.assert_close(corrected(ours, kind, 100), corrected(moment, kind, 7))
        assert correction(gain, [], {"decayed": 100, "rest": 100}, BETAS) == 1
        assert correction(gain, [], counts | {"joined": 0}, BETAS) == 1  # nothing to correct


def grown_state(whole_run: Path, steps: int = 3) -> TrainState:
    """Five layers, three of which have seen `steps` updates."""
    wanted = growing(whole_run, steps=20)
    state = build_state(replace(wanted, origin=None))
    carry_over(state, saved(whole_run), MOVED, wanted.train)
    for _ in range(steps):
        train_step(state, wanted.train)
    return state


def as_adam_sees_them(state: TrainState) -> dict[str, Tensor]:
    counts = state.optimizer.updates()
    found = {}
    for group in state.optimizer.groups:
        for name, moment in state.optimizer.moments().items():
            kind, _, parameter = name.partition(".")
            if parameter in group.places:
                found[name] = corrected(moment.double(), kind, max(counts[group.kind], 1))
    return found


def test_a_grown_run_can_be_protected(whole_run: Path) -> None:
    """The layers that came late go on in one group with the rest, and Adam sees the moments that it
    saw; the state comes back from its snapshot, also after one from before the surgery."""
    state = grown_state(whole_run)
    earlier, before = copy.deepcopy(state.snapshot()), as_adam_sees_them(state)
    assert state.new_layers == [1, 3, 4]
    protect(state, gain=1.0)
    assert state.new_layers == []
    after = as_adam_sees_them(state)
    for name, moment in before.items():
        if ".rule_" not in name:
            torch.testing.assert_close(after[name], moment, rtol=1e-5, atol=0)
    later = copy.deepcopy(state.snapshot())
    for snapshot in (earlier, later, earlier):
        state.restore(copy.deepcopy(snapshot))
        again = state.snapshot()
        assert again.values["updates"] == snapshot.values["updates"]
        for name, moment in snapshot.tensors["optimizer"].items():
            assert torch.equal(again.tensors["optimizer"][name], moment), name


def test_moments_of_a_grown_run_serve_a_new_one(whole_run: Path) -> None:
    """`--from … --optimizer kept`: the new run has one group."""
    source = grown_state(whole_run)
    before = as_adam_sees_them(source)
    wanted = replace(growing(whole_run, steps=20), origin=Origin(source="grown", optimizer="kept"))
    state = build_state(wanted)
    snapshot = source.snapshot()
    begin_from(state, wanted, lambda: Start(model=source.model, source=snapshot))
    for name, moment in as_adam_sees_them(state).items():
        torch.testing.assert_close(moment, before[name], rtol=1e-5, atol=0)


def test_a_protected_run_can_grow(plain_run: Path) -> None:
    """Its gains have seen fewer updates than the rest, and go on in one group with it."""
    state = build_state(replace(splitting(plain_run), origin=None))
    state.restore(saved(plain_run))
    protect(state, gain=1.0)
    for _ in range(3):
        train_step(state, replace(runs.TRAIN, steps=99))
    before, source = as_adam_sees_them(state), copy.deepcopy(state.snapshot())
    wanted = Experiment(model=replace(state.model.config, depth=5), train=runs.TRAIN)
    deeper = build_state(wanted)
    carry_over(deeper, source, MOVED, wanted.train)
    after = as_adam_sees_them(deeper)
    for name in ("exp_avg", "exp_avg_sq"):
        for gain in ("beta", "alpha", "leak"):
            old, new = (f"{name}.blocks.{layer}.rule_ffn.{gain}" for layer in (1, 2))
            assert before[old].any()
            torch.testing.assert_close(after[new], before[old], rtol=1e-5, atol=0)


def warned(experiment: Experiment, run: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        split(experiment, run)
    return [str(w.message) for w in found if "reaction.gain" in str(w.message)]


def test_gains_that_are_taken_over_once_more_are_said(
    plain_run: Path, whole_run: Path, tmp_path: Path
) -> None:
    again = replace(splitting(whole_run, steps=1), model=runs.MODEL)
    (said,) = warned(again, tmp_path / "again")
    assert "has MV-Split already, and its gains are multiplied by 0.0625 once more" in said
    assert "a change of how it learns, not of its function" in said
    assert "\n" not in said
    left = replace(splitting(whole_run, steps=1, reaction=ReactionConfig(gain=1)), model=runs.MODEL)
    assert warned(left, tmp_path / "left") == []
    assert warned(splitting(plain_run, steps=1), tmp_path / "plain") == []


def test_a_gain_of_about_the_learning_rate_is_said(plain_run: Path, tmp_path: Path) -> None:
    small = ReactionConfig(gain=2.0**-6)
    (said,) = warned(splitting(plain_run, steps=1, reaction=small), tmp_path / "small")
    assert "gain=0.015625 is only 1.6 times the learning rate of gains, 0.01," in said
    assert "\n" not in said
    slow = splitting(plain_run, steps=1, reaction=small, gain_lr=2.0**-6)
    assert warned(slow, tmp_path / "slow") == []


def test_a_source_of_another_rule_gets_the_flag_of_the_one_before(
    plain_run: Path, tmp_path: Path
) -> None:
    wrong = replace(splitting(plain_run), model=runs.MODEL)
    words = "have plain; use --model.rule.name plain (the rule before the surgery), or other"
    with pytest.raises(UserError, match=re.escape(words)):
        split(wrong, tmp_path / "run")
    as_it_is = replace(wrong, origin=Origin(source=str(plain_run)))
    with pytest.raises(UserError, match=re.escape("use --model.rule.name plain, or other")):
        split(as_it_is, tmp_path / "run")


OLD = {"beta": -0.5, "alpha": -0.001, "leak": 2.5}  # what a surgery wrote of learned gains


def aged(run: Path) -> None:
    """Writes into the files of a run what they had held before starts were restricted."""
    config = run / "config.json"
    tree = json.loads(config.read_text())
    assert tree["rule_now"]["name"] == "mvsplit"
    tree["rule_now"] |= OLD
    config.write_text(json.dumps(tree))
    for checkpoint in list_checkpoints(run / "checkpoints"):
        state, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
        values = json.loads(state.read_text())
        values["rule"] |= OLD
        state.write_text(json.dumps(values))
        listed = json.loads(manifest.read_text())
        listed["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": sha256(state)}
        manifest.write_text(json.dumps(listed))


def test_a_run_of_before_gains_were_restricted_is_read_and_goes_on(
    plain_run: Path, tmp_path: Path
) -> None:
    """The gains are in the weights; those in the files are for people."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    split(splitting(plain_run, steps=4), old)
    shutil.copytree(old, whole)
    aged(old)
    rule = read_experiment(old).rule_now
    assert rule is not None
    assert (rule.beta, rule.alpha, rule.leak) == (0.0, 0.0, 2.0)
    for load in (lambda run: load_run(run).model, load_weights):
        same(load(old), load(whole))
    for run in (old, whole):
        split(splitting(plain_run, steps=6), run)
    runs.assert_same_weights(saved(old), saved(whole))


def same(left: DiT, right: DiT) -> None:
    theirs = right.state_dict()
    assert theirs.keys() == left.state_dict().keys()
    assert all(torch.equal(t, theirs[name]) for name, t in left.state_dict().items())


def test_what_was_converted_from_it_is_read_too(plain_run: Path, tmp_path: Path) -> None:
    split(splitting(plain_run, steps=1), tmp_path / "run")
    model = load_weights(tmp_path / "run")
    write_weights(model, tmp_path / "copy", "checkpoint")
    write_weights(model, tmp_path / "pipeline", "diffusers")
    changed = 0
    for path in tmp_path.glob("*/**/*.json"):
        tree = json.loads(path.read_text())
        rule = tree.get("rule") or tree.get("model", {}).get("rule")
        if "run" not in path.parts and rule:
            rule |= OLD
            path.write_text(json.dumps(tree))
            changed += 1
    assert changed == 2
    for name in ("copy", "pipeline"):
        same(load_weights(tmp_path / name), model)


def test_a_start_that_a_file_asks_for_is_refused_all_the_same(
    plain_run: Path, tmp_path: Path
) -> None:
    split(splitting(plain_run, steps=1), tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    tree = json.loads(config.read_text())
    tree["model"]["rule"]["alpha"] = -0.25
    config.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"config\.json: rule\.alpha=-0\.25: must not be negative"):
        read_experiment(tmp_path / "run")
