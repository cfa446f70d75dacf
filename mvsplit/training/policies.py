"""What a run does on an alarm: record it, stop, leave the update out, go back, or protect itself.

The watch raises an alarm before the update of the step is made, from its gradients and, where every
layer was looked into, from those. All policies but `record` hold that update back; then the policy
acts, between two steps, and events.jsonl gets a line with its numbers. `docs/policies.md` says
which policy is for what, and what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mvsplit.errors import UserError
from mvsplit.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    read_newest,
    set_aside_after,
    step_of,
)
from mvsplit.training.config import ReactionConfig, TrainConfig
from mvsplit.training.distributed import from_first
from mvsplit.training.observer import Observer
from mvsplit.training.state import TrainState
from mvsplit.training.surgery import protect

# What MV-Split is a cure for; protect answers the rest by going back with a lower rate. A rate that
# breaks a network breaks it by one of the other two, which its layers show a few steps later.
CURED_BY_SURGERY = frozenset({"mean-mode", "divergence", "learning-rate"})


class Alarms(Observer):
    """Holds the first alarm that a policy is to act on, until it is taken."""

    def __init__(self) -> None:
        self._held: dict[str, Any] | None = None

    def on_event(self, event: dict[str, Any]) -> None:
        if event.get("level") == "alarm":
            self._held = self._held or event

    @property
    def verdict(self) -> str | None:
        """Of the alarm that is held."""
        return self._held["verdict"] if self._held else None

    def take(self) -> dict[str, Any] | None:
        """The alarm, which is then no longer held."""
        alarm, self._held = self._held, None
        return alarm


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A run between two steps with an alarm to act on.

    Attributes:
        state: changed by the action.
        config: how the run is trained.
        checkpoints: the folder of its checkpoints.
        step: the step that gave the alarm; its update was not made, but under `record`.
        verdict: of the alarm.
        tell: writes an event: its name, its message, its numbers.
    """

    state: TrainState
    config: TrainConfig
    checkpoints: Path
    step: int
    verdict: str
    tell: Callable[..., None]

    @property
    def reaction(self) -> ReactionConfig:
        return self.config.reaction


@dataclass(frozen=True, kw_only=True)
class Stop:
    """That a policy stopped a run, as its last checkpoint keeps it.

    Attributes:
        verdict, at_step: of the alarm.
        message: why, and what lets the run go on.
        policy, reaction: what stopped it; while these are the same, it stays stopped.
    """

    verdict: str
    at_step: int
    message: str
    policy: str
    reaction: dict[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Stop | None:
        """That of a checkpoint, if an alarm stopped the run there."""
        kept = values.get("stop")
        return None if kept is None else cls(**kept)

    def stands(self, config: TrainConfig) -> bool:
        """Whether the settings are still those that stopped the run."""
        return (self.policy, self.reaction) == (config.on_alarm, asdict(config.reaction))


def holds_back(policy: str, verdict: str | None) -> bool:
    """Whether a policy keeps the update of the step from being made. A step that is not finite ends
    the run by an error of its own (NonFiniteError) unless the policy has a way to go on."""
    if verdict is None or policy == "record":
        return False
    return verdict != "non-finite" or policy != "stop"


def react(scene: Scene) -> Stop | None:
    """Acts on an alarm by the policy of the run; says why where the run has to end.

    Raises:
        UserError: the policy cannot act: the rule cannot be turned into MV-Split, or no checkpoint
            can be read.
    """
    return _POLICIES[scene.config.on_alarm](scene)


def needs_a_start(config: TrainConfig) -> bool:
    """Whether the policy may have to go back before the first checkpoint, to the start, or the one
    that a stopped run is given so that it goes on."""
    return config.on_alarm in ("stop", "rollback", "protect")


def _record(scene: Scene) -> None:
    pass


def _stop(scene: Scene) -> Stop:
    return _stopped(
        scene,
        f"stopped by the {scene.verdict} alarm of step {scene.step}, before its update; to go on, "
        f"give the same command with --on-alarm record, skip, rollback or protect",
    )


def _stopped(scene: Scene, message: str, **fields: Any) -> Stop:
    scene.tell("stopped", message, verdict=scene.verdict, at_step=scene.step, **fields)
    return Stop(
        verdict=scene.verdict,
        at_step=scene.step,
        message=message,
        policy=scene.config.on_alarm,
        reaction=asdict(scene.reaction),
    )


def _skip(scene: Scene) -> None:
    """Counts the step without its update."""
    state = scene.state
    state.step = scene.step
    state.reactions = replace(state.reactions, skips=state.reactions.skips + 1)
    message = f"step {scene.step}: its update was left out ({scene.verdict})"
    scene.tell("skipped", message, verdict=scene.verdict, skips=state.reactions.skips)


def _roll_back(scene: Scene) -> Stop | None:
    reactions, reaction = scene.state.reactions, scene.reaction
    if reactions.rollbacks >= reaction.limit:
        return _stopped(
            scene,
            f"stopped by the {scene.verdict} alarm of step {scene.step}: the run has gone back "
            f"{reactions.rollbacks} times, the most that --reaction.limit={reaction.limit} allows; "
            f"start a new run with a lower learning rate, or with rule mvsplit; or give the same "
            f"command with a higher --reaction.limit, or with --on-alarm record or skip",
            rollbacks=reactions.rollbacks,
        )
    _go_back(scene)
    if reaction.fresh_moments:
        scene.state.optimizer.forget()
    scene.state.reactions = replace(
        scene.state.reactions,
        lr_factor=scene.state.reactions.lr_factor * reaction.lr_factor,
        since=scene.state.step,
        rewarm=reaction.rewarm,
    )
    scene.tell(
        "rolled-back",
        f"step {scene.step}: back to step {scene.state.step} ({scene.verdict}), the data go on, "
        f"learning rate times {scene.state.reactions.lr_factor:g}",
        verdict=scene.verdict,
        at_step=scene.step,
        to_step=scene.state.step,
        lr_factor=scene.state.reactions.lr_factor,
        fresh_moments=reaction.fresh_moments,
        rollbacks=scene.state.reactions.rollbacks,
    )
    return None


def _protect(scene: Scene) -> Stop | None:
    """Surgery, once, for what it cures; else back with a lower learning rate, and surgery again if
    that leads to where the network was not protected yet."""
    state, reaction = scene.state, scene.reaction
    protected = state.reactions.protected_at is not None
    if protected or scene.verdict not in CURED_BY_SURGERY:
        stop = _roll_back(scene)
        if stop is None and protected and state.reactions.protected_at is None:
            _operate(scene)
        return stop
    if reaction.go_back:
        _go_back(scene)
    _operate(scene)
    return None


def _operate(scene: Scene) -> None:
    state, reaction = scene.state, scene.reaction
    rule = state.model.config.rule.name
    protect(state, gain=reaction.gain)
    state.reactions = replace(
        state.reactions, protected_at=state.step, since=state.step, rewarm=reaction.rewarm
    )
    scene.tell(
        "protected",
        f"step {scene.step}: the {rule} network of step {state.step} is an MV-Split network from "
        f"here on ({scene.verdict}), gain {reaction.gain:g}",
        verdict=scene.verdict,
        at_step=scene.step,
        to_step=state.step,
        was=rule,
        gain=reaction.gain,
        anneal=reaction.anneal,
    )


_POLICIES: dict[str, Callable[[Scene], Stop | None]] = {
    "record": _record,
    "stop": _stop,
    "skip": _skip,
    "rollback": _roll_back,
    "protect": _protect,
}


def _go_back(scene: Scene) -> None:
    """Restores the last good checkpoint. The data move on, and so do the reactions, but for whether
    the network is protected, which is the checkpoint's; the noise and times of a step stay those
    of its number."""
    state, reactions, data = scene.state, scene.state.reactions, scene.state.loader.state_dict()
    state.restore(last_good(scene))
    state.loader.load_state_dict(data)
    state.reactions = replace(
        reactions,
        rollbacks=reactions.rollbacks + 1,
        protected_at=state.reactions.protected_at,
    )
    from_first(lambda: set_aside_after(scene.checkpoints, state.step, suffix="undone"))


def last_good(scene: Scene) -> Snapshot:
    """The newest whole checkpoint that lies `margin` steps before the alarm, or else the oldest
    there is. Only those of the regular cadence count, so that a run goes back to the same step
    whether it was interrupted on the way or not.

    Raises:
        UserError: there is none that can be read.
    """
    config, saved = scene.config, from_first(lambda: list_checkpoints(scene.checkpoints))
    regular = [path for path in saved if step_of(path) % config.save_every == 0]
    latest = scene.step - config.reaction.margin
    good = [path for path in regular if step_of(path) <= latest] or regular[:1]
    snapshot, damaged = read_newest(good)
    for error in damaged:
        scene.tell("damaged", f"{error}; looking for an older one")
    if snapshot is not None:
        return snapshot
    raise UserError(
        f"{scene.checkpoints}: no checkpoint to go back to from step {scene.step}; keep more of "
        f"them with --keep, or choose --on-alarm skip"
    )
