"""What a run does on an alarm, and that it does the same however it was interrupted.

The detector is replaced by one that raises an alarm when it first sees a certain step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvsplit.diagnostics.events import Event
from mvsplit.errors import UserError
from mvsplit.models.surgery import gain_names, writer_parameters
from mvsplit.residuals import RuleConfig
from mvsplit.training import (
    Experiment,
    NonFiniteError,
    Observer,
    TrainState,
    build_state,
    load_run,
    read_experiment,
    train,
    train_step,
)
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint, step_of
from mvsplit.training.config import ReactionConfig, from_json, to_json
from mvsplit.training.surgery import protect
from tests.training import runs

AlarmAt = Callable[..., None]


@pytest.fixture
def alarm_at(monkeypatch: pytest.MonkeyPatch) -> AlarmAt:
    """Makes the detector raise an alarm when it sees one of the steps, once for each mention."""

    def install(*steps: int, verdict: Any = "mean-mode", by_look: bool = False) -> None:
        class Alarming:
            stirred = False

            def __init__(self) -> None:
                self.left = list(steps)

            def update(self, record: dict[str, Any]) -> list[Event]:
                if record["step"] not in self.left or by_look != ("layer" in record):
                    return []
                self.left.remove(record["step"])
                text = "as the test wants it"
                return [Event(step=record["step"], level="alarm", verdict=verdict, message=text)]

        monkeypatch.setattr("mvsplit.training.watch.Detector", Alarming)

    return install


def experiment(policy: str, rule: str = "plain", **reaction: Any) -> Experiment:
    """Eight steps of a two-layer network, saved after each third."""
    numbers = ReactionConfig(**{"margin": 1, "gain": 0.25, "anneal": 3, **reaction})
    e = runs.experiment(on_alarm=policy, reaction=numbers, keep=3)
    return replace(e, model=replace(e.model, rule=RuleConfig(name=rule)))


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in runs.lines(run / "events.jsonl") if e["event"] == name]


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in runs.lines(run / "metrics.jsonl")]


class Weights(Observer):
    """Keeps a copy of the first writer and of the loader's position at each line of metrics."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.positions: list[int] = []

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        self.seen.append(writer_parameters(state.model)[0].detach().clone())
        self.positions.append(state.loader.position)


def test_record_changes_nothing(tmp_path: Path, alarm_at: AlarmAt) -> None:
    train(experiment("record"), tmp_path / "calm")
    alarm_at(5)
    train(experiment("record"), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "calm")
    assert [e["at_step"] for e in events(tmp_path / "run", "alarm")] == [5]


def test_stop_leaves_the_weights_before_the_step(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(5)
    outcome = train(experiment("stop"), tmp_path / "run")
    assert (outcome.step, outcome.alarm) == (4, True)
    (stopped,) = events(tmp_path / "run", "stopped")
    assert stopped["message"].startswith("stopped by the mean-mode alarm of step 5, before its")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000004"
    assert not events(tmp_path / "run", "finished")
    # With another policy, which may be changed, the run goes on.
    assert train(experiment("record"), tmp_path / "run").step == 8


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_stopped_run_stays_stopped_at_the_same_command(
    tmp_path: Path, alarm_at: AlarmAt, policy: str
) -> None:
    """As a queue gives it that starts again whatever ended badly."""
    alarm_at(5)
    run, stopping = tmp_path / "run", experiment(policy, limit=0)
    train(stopping, run)
    saved = list_checkpoints(run / "checkpoints")
    for _ in range(2):
        outcome = train(stopping, run)
        assert (outcome.step, outcome.alarm) == (4, True)
    *_, again = events(run, "stopped")
    assert "stays stopped: stopped by the mean-mode alarm of step 5" in again["message"]
    assert "--on-alarm record" in again["message"]
    assert steps_of(run) == [1, 2, 3, 4, 5]
    assert list_checkpoints(run / "checkpoints") == saved


@pytest.mark.parametrize("at", [1, 4])
def test_a_run_stopped_at_a_checkpoint_stays_stopped(
    tmp_path: Path, alarm_at: AlarmAt, at: int
) -> None:
    """The weights before step 4 are a checkpoint of the cadence, those before step 1 the start."""
    alarm_at(at)
    for _ in range(2):
        outcome = train(experiment("stop"), tmp_path / "run")
        assert (outcome.step, outcome.alarm) == (at - 1, True)


@pytest.mark.parametrize("policy", ["skip", "rollback", "protect"])
def test_another_policy_acts_on_the_alarm_that_stopped_a_run(
    tmp_path: Path, alarm_at: AlarmAt, policy: str
) -> None:
    """The watch has raised it, and would not raise it again."""
    run, name = tmp_path / "run", {"skip": "skipped", "rollback": "rolled-back"}
    alarm_at(5)
    train(experiment("stop"), run)
    alarm_at()
    assert train(experiment(policy), run).step == 8
    (event,) = events(run, name.get(policy, "protected"))
    assert event["step"] == {"skip": 5}.get(policy, 3)
    assert not train(experiment(policy), run).alarm


def test_a_stopped_run_acts_again_by_other_settings_of_its_policy(
    tmp_path: Path, alarm_at: AlarmAt
) -> None:
    alarm_at(5)
    train(experiment("rollback", limit=0), tmp_path / "run")
    alarm_at()
    outcome = train(experiment("rollback", limit=1), tmp_path / "run")
    assert (outcome.step, outcome.alarm) == (8, False)
    assert len(events(tmp_path / "run", "rolled-back")) == 1


def test_skip_leaves_out_one_update(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(5)
    weights = Weights()
    outcome = train(experiment("skip"), tmp_path / "run", observers=[weights])
    assert (outcome.step, outcome.alarm) == (8, False)
    moved = [not torch.equal(a, b) for a, b in zip(weights.seen, weights.seen[1:], strict=False)]
    assert moved == [True, True, True, False, True, True, True]  # from step 4 to 5 nothing moves
    last = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert last.step == 8
    assert set(last.values["updates"].values()) == {7}
    assert last.values["reactions"]["skips"] == 1


def test_rollback_goes_back_moves_the_data_on_and_lowers_the_rate(
    tmp_path: Path, alarm_at: AlarmAt
) -> None:
    alarm_at(5)
    run, weights = tmp_path / "run", Weights()
    train(experiment("rollback", lr_factor=0.5, rewarm=2), run, observers=[weights])
    assert steps_of(run) == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert weights.positions == [8 * n for n in range(1, 11)]
    rates = [line["lr"] for line in runs.lines(run / "metrics.jsonl")]
    assert rates[4:] == pytest.approx([1e-2, 0.25e-2, 0.5e-2, 0.5e-2, 0.5e-2, 0.5e-2])
    (event,) = events(run, "rolled-back")
    assert (event["at_step"], event["to_step"], event["lr_factor"]) == (5, 3, 0.5)


def test_rollback_restores_what_the_checkpoint_holds(tmp_path: Path, alarm_at: AlarmAt) -> None:
    """With a rate of nearly nothing afterwards, the run ends where the checkpoint was taken."""
    alarm_at(5)
    run = tmp_path / "run"
    train(replace_train(experiment("rollback", lr_factor=1e-9), keep=9), run)
    saved = {step_of(p): read_checkpoint(p) for p in list_checkpoints(run / "checkpoints")}
    assert sorted(saved) == [0, 3, 6, 8]
    for name, tensor in saved[3].tensors["model"].items():
        torch.testing.assert_close(saved[8].tensors["model"][name], tensor, rtol=0, atol=1e-9)


def replace_train(e: Experiment, **changes: Any) -> Experiment:
    return replace(e, train=replace(e.train, **changes))


def test_rollback_keeps_its_margin_and_sets_later_checkpoints_aside(
    tmp_path: Path, alarm_at: AlarmAt
) -> None:
    alarm_at(7)
    run = tmp_path / "run"
    train(experiment("rollback", margin=3, fresh_moments=True), run)
    (event,) = events(run, "rolled-back")
    assert event["to_step"] == 3  # step 6 is too close
    assert (run / "checkpoints" / "step_00000006.undone").is_dir()
    last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert set(last.values["updates"].values()) == {5}  # of steps 4 to 8, on fresh moments


def test_rollback_before_the_first_checkpoint_goes_to_the_start(
    tmp_path: Path, alarm_at: AlarmAt
) -> None:
    alarm_at(2)
    train(experiment("rollback"), tmp_path / "run")
    assert events(tmp_path / "run", "rolled-back")[0]["to_step"] == 0


def test_rollback_passes_over_a_damaged_checkpoint(tmp_path: Path, alarm_at: AlarmAt) -> None:
    class Damage(Observer):
        def on_event(self, event: dict[str, Any]) -> None:
            if event["event"] == "saved" and "step_00000006" in event["message"]:
                (run / "checkpoints/step_00000006/model.safetensors").write_bytes(b"")

    alarm_at(8)
    run = tmp_path / "run"
    train(experiment("rollback"), run, observers=[Damage()])
    assert events(run, "rolled-back")[0]["to_step"] == 3
    assert "step_00000006" in events(run, "damaged")[0]["message"]


def test_rollback_has_a_limit(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(4, 5, 6)
    outcome = train(experiment("rollback", limit=2), tmp_path / "run")
    assert outcome.alarm
    assert [e["lr_factor"] for e in events(tmp_path / "run", "rolled-back")] == [0.5, 0.25]
    assert "gone back 2 times" in events(tmp_path / "run", "stopped")[0]["message"]


@pytest.mark.parametrize(("policy", "goes_on"), [("rollback", True), ("stop", False)])
def test_a_step_that_is_not_finite(tmp_path: Path, policy: str, goes_on: bool) -> None:
    """With the true detector, on weights that somebody has broken."""

    class Break(Observer):
        done = False

        def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 5 and not self.done:
                self.done = True
                with torch.no_grad():
                    writer_parameters(state.model)[0].fill_(float("nan"))

    run = tmp_path / "run"
    if goes_on:
        assert train(experiment(policy), run, observers=[Break()]).step == 8
        (event,) = events(run, "rolled-back")
        assert (event["verdict"], event["at_step"], event["to_step"]) == ("non-finite", 6, 3)
    else:
        with pytest.raises(NonFiniteError, match="step 6: loss nan"):
            train(experiment(policy), run, observers=[Break()])


def test_protect_makes_a_run_that_loads_back_and_says_so(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(5)
    run = tmp_path / "run"
    train(experiment("protect"), run)
    (event,) = events(run, "protected")
    assert (event["was"], event["gain"], event["to_step"]) == ("plain", 0.25, 3)
    there = read_experiment(run)
    assert there.model.rule.name == "plain"  # what was asked for
    assert there.rule_now is not None
    assert there.rule_now.name == "mvsplit"
    assert from_json(to_json(there)) == there
    for ema in (True, False):
        loaded = load_run(run, ema=ema)
        assert loaded.model.config.rule == there.rule_now
    # Three steps after the surgery α was 0; since then it has learned for two.
    alphas = [p for n, p in loaded.model.named_parameters() if n.endswith("alpha")]
    assert all(0 < float(a.abs().max()) < 3e-2 for a in alphas)
    train(replace_train(experiment("protect"), steps=9), run)
    assert steps_of(run)[-1] == 9


def test_alpha_is_annealed_to_zero(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(5)
    run = tmp_path / "run"
    train(experiment("protect", anneal=5), run)
    last = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert last.step == 8
    ends = {
        name.rpartition(".")[2]: t for name, t in last.tensors["model"].items() if "rule" in name
    }
    assert not ends["alpha"].any()
    assert (ends["beta"] - 0.25).abs().max() < 0.06


def test_protect_where_it_stands(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(5)
    run = tmp_path / "run"
    train(experiment("protect", go_back=False), run)
    assert steps_of(run) == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert events(run, "protected")[0]["to_step"] == 4


def test_a_second_alarm_of_a_protected_run_rolls_back(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(4, 8)
    run = tmp_path / "run"
    train(experiment("protect"), run)
    assert [e["at_step"] for e in events(run, "protected")] == [4]
    (event,) = events(run, "rolled-back")
    assert (event["at_step"], event["to_step"]) == (8, 6)
    assert load_run(run).model.config.rule.name == "mvsplit"


def test_going_back_behind_the_surgery_operates_again(tmp_path: Path, alarm_at: AlarmAt) -> None:
    """The checkpoint of step 3 is from before the surgery, each time."""
    alarm_at(5, 5)
    train(experiment("protect"), tmp_path / "whole")
    found = [e for e in runs.lines(tmp_path / "whole" / "events.jsonl") if "to_step" in e]
    assert [e["event"] for e in found] == ["protected", "rolled-back", "protected"]
    assert [e["to_step"] for e in found] == [3, 3, 3]
    assert load_run(tmp_path / "whole").model.config.rule.name == "mvsplit"
    for steps in (4, 7, 8):
        train(replace_train(experiment("protect"), steps=steps), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_alarm_from_a_look_comes_before_the_update(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(6, by_look=True)
    weights = Weights()
    train(experiment("skip"), tmp_path / "skip", observers=[weights])
    assert [e["step"] for e in events(tmp_path / "skip", "skipped")] == [6]
    assert torch.equal(weights.seen[5], weights.seen[4])  # after steps 6 and 5
    assert not torch.equal(weights.seen[6], weights.seen[5])
    train(experiment("protect", go_back=False), tmp_path / "protect")
    assert events(tmp_path / "protect", "protected")[0]["to_step"] == 5


def test_a_rule_that_cannot_be_protected_is_one_line(tmp_path: Path, alarm_at: AlarmAt) -> None:
    alarm_at(5)
    with pytest.raises(UserError, match="'prenorm' cannot be turned into mvsplit"):
        train(experiment("protect", rule="prenorm"), tmp_path / "run")


@pytest.mark.parametrize("policy", ["skip", "rollback", "protect"])
@pytest.mark.parametrize("parts", [(4, 8), (5, 8), (6, 7, 8)])
def test_half_and_half_is_the_whole(
    tmp_path: Path, alarm_at: AlarmAt, policy: str, parts: tuple[int, ...]
) -> None:
    """Interrupted before the alarm, at it and after it, at steps of the saving cadence or not."""
    alarm_at(5)
    train(experiment(policy), tmp_path / "whole")
    for steps in parts:
        train(replace_train(experiment(policy), steps=steps), tmp_path / "run")
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert read_experiment(tmp_path / "run") == read_experiment(tmp_path / "whole")


@pytest.mark.parametrize("rule", ["plain", "layerscale"])
def test_surgery_carries_moments_and_averages(rule: str) -> None:
    """The step after it moves every old parameter as it would have moved without it: AdamW does not
    see the units of a gradient, but for its ε."""
    e = experiment("protect", rule=rule, anneal=0)
    plain, split = build_state(e), build_state(e)
    for state in (plain, split):
        for _ in range(3):
            train_step(state, e.train)
    protect(split, gain=0.25)
    assert split.optimizer.updates() == {"decayed": 3, "rest": 3, "joined": 0}
    new = set(gain_names(split.model))
    moments, averages = split.optimizer.moments(), split.ema.parameters()  # type: ignore[union-attr]
    assert all(not moments[f"exp_avg.{name}"].any() for name in new)
    before = {name: p.detach().clone() for name, p in split.model.named_parameters()}
    start = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    writers = {id(p) for p in writer_parameters(split.model)}
    scales = {n: 0.25 if id(p) in writers else 1.0 for n, p in split.model.named_parameters()}
    for name in before.keys() - new:
        torch.testing.assert_close(averages[name] * scales[name], plain_average(plain, name))
    for state in (plain, split):
        train_step(state, e.train)
    after = dict(plain.model.named_parameters())
    for name, parameter in split.model.named_parameters():
        if name not in new:
            moved, expected = parameter - before[name], after[name] - start[name]
            decay = 1e-2 * 0.1 * (before[name] - start[name]) if parameter.ndim == 2 else 0.0
            torch.testing.assert_close(moved + decay, expected, rtol=2e-2, atol=3e-5)


def plain_average(state: TrainState, name: str) -> Tensor:
    assert state.ema is not None
    return state.ema.parameters()[name]


def test_an_unknown_policy_names_the_known() -> None:
    with pytest.raises(UserError, match=r"train\.on_alarm=pray: choose one of: record, stop"):
        experiment("pray")
