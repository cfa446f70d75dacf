"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import torch

from mvsplit.diagnostics.probe import NAMED_FIELDS, LayerProbe
from mvsplit.diagnostics.ranks import arrays_over_ranks
from mvsplit.training.builders import build_state
from mvsplit.training.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    load_latest,
    remove_leftovers,
    set_aside_after,
)
from mvsplit.training.checkpoint_saver import Saver
from mvsplit.training.config import Experiment, TrainConfig
from mvsplit.training.distributed import (
    at,
    either,
    from_first,
    joined,
    on_stall,
    rank,
    together,
)
from mvsplit.training.finetune import Start, begin_from, learning
from mvsplit.training.flight import FlightRecorder
from mvsplit.training.nonfinite import NonFiniteError
from mvsplit.training.observer import Observer
from mvsplit.training.policies import (
    Alarms,
    Scene,
    Stop,
    holds_back,
    needs_a_start,
    react,
)
from mvsplit.training.run_folder import RunFolder, open_run
from mvsplit.training.signals import StopSignal
from mvsplit.training.stall import THE_SAVE
from mvsplit.training.state import TrainState
from mvsplit.training.step import Gradients, train_step
from mvsplit.training.watch import Watch

# What a rank tells the others between two steps, as bits of one number.
_SIGNALS: dict[Signals | None, int] = {SIGTERM: 1, SIGINT: 2}
_FAILED = 4  # a save
_LOOK = 8  # an observer wants one in the next step; only the first rank has observers


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: its last step, and the signal or the alarm that stopped it before its time,
    if any."""

    step: int
    signal: Signals | None
    alarm: bool = False


def train(
    experiment: Experiment,
    run_dir: Path | str,
    *,
    observers: Sequence[Observer] = (),
    start: Callable[[], Start] | None = None,
) -> Outcome:
    """Trains, or goes on where the run folder's newest whole checkpoint was taken.

    A run that its policy stopped stays stopped until `on_alarm` or `reaction` are others.
    On SIGTERM or Ctrl-C the step is finished and saved. Under torchrun every process calls this,
    and the first one alone writes and has `observers`.

    Args:
        start: reads the weights that `experiment.origin` names; called only where the run has no
            checkpoint yet.

    Raises:
        UserError: the folder is in use or belongs to another experiment, the configuration is not
            possible, or the disk is full.
        NonFiniteError: the loss or the gradient was not finite; the update was not made.
    """
    config = experiment.train
    with ExitStack() as stack:
        stack.enter_context(joined(config.parallel.timeout))
        folder = stack.enter_context(open_run(run_dir, experiment))
        stop = stack.enter_context(StopSignal())
        state = build_state(experiment)
        run = _Run(folder, config, state, observers, start)
        stack.enter_context(run.saver)
        run.resume()
        for observer in run.observers:
            observer.on_start(state, experiment)
        started = time.perf_counter()
        while run.goes_on(stop.received):
            step = state.step + 1
            metrics = run.guarded_step(step)
            now = time.perf_counter()
            run.log(step, metrics, now - started)
            started = now
            run.react(step)
            if state.step == step and step % config.save_every == 0:
                run.save()
        run.finish()
    return Outcome(step=state.step, signal=run.signal, alarm=run.stopped)


class _Run:
    """What the loop does beside stepping: logs, checkpoints, messages."""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        state: TrainState,
        observers: Sequence[Observer],
        start: Callable[[], Start] | None,
    ) -> None:
        self._start = start
        self.folder, self.config, self.state = folder, config, state
        recorder = FlightRecorder(folder.path, steps=config.record_steps, tell=self._tell)
        self._watch, self._alarms = Watch(self._tell, burst=config.probe_burst), Alarms()
        # The recorder knows a step before the watch may raise an alarm about it. The watch judges
        # on every rank, from the same numbers.
        alone = (*observers, recorder) if rank() == 0 else ()
        self.observers = (*alone, self._alarms, self._watch)
        self.saver = Saver(folder.checkpoints, keep=config.keep, keep_every=config.keep_every)
        self.stopped = False  # by an alarm
        self._stop: Stop | None = None  # the alarm that stopped it in this process
        self.signal: Signals | None = None  # that any rank has received
        self._first = state.step  # at which this process began
        self._wanted = False  # a look in the next step, by an observer

    def resume(self) -> None:
        """Restores the newest whole checkpoint, and says so, and what was damaged."""
        folder, state = self.folder, self.state
        from_first(lambda: remove_leftovers(folder.checkpoints))
        snapshot, damaged = load_latest(folder.checkpoints)
        if snapshot is not None:
            state.restore(snapshot)
            self._first = state.step
            from_first(lambda: set_aside_after(folder.checkpoints, state.step))
        else:
            begin_from(state, folder.experiment, self._start)
        begun_before = (folder.path / "config.json").exists()
        logged = {} if snapshot is None else snapshot.values["logged"]
        folder.begin(state.device, logged, rule=state.model.config.rule, base=state.base)
        on_stall(lambda message: folder.event("stalled", state.step, message))
        self._watch.remember(from_first(lambda: list(folder.history())))
        for error in damaged:
            self._tell("damaged", f"{error}; set aside, going back to step {state.step}")
        if snapshot is not None:
            changed = {name: list(pair) for name, pair in folder.changed.items()}
            self._tell("resumed", f"resumed {folder.path} at step {state.step}", changed=changed)
            self._tell_threads()
        elif begun_before:
            self._tell("started", f"{folder.path} has no checkpoint yet: starting again")
        else:
            self._tell("started", f"started {folder.path}")
        if state.layout is not None:
            self._tell("layout", state.layout, level="info")
        self._tell_tuning(new=snapshot is None)
        self._tell("watching", self._watch_words(), level="info")
        # With what it started from, a run stands on its own.
        if snapshot is None and (needs_a_start(self.config) or state.base is not None):
            self.save()
        if snapshot is not None and (stop := Stop.of(snapshot.values)) is not None:
            self._meet(stop)

    def _tell_threads(self) -> None:
        """Says that a resumed run may not be the whole one to the bit, where that is so."""
        before, now = self.folder.threads_before, torch.get_num_threads()
        if self.state.device.type == "cpu" and before not in (None, now):
            message = (
                f"{now} threads now, {before} before: sums may have other last digits, so the "
                f"steps may differ a little from those of a run that was not interrupted; "
                f"OMP_NUM_THREADS={before} gives the same"
            )
            self._tell("threads", message, level="info", before=before, now=now)

    def _meet(self, stop: Stop) -> None:
        """What becomes of a run that an alarm has stopped: the same settings leave it there, and
        others act on the alarm, which the watch has raised already and will not raise again."""
        if stop.stands(self.config):
            self.stopped = True
            message = f"{self.folder.path} stays stopped: {stop.message}"
            self._tell("stopped", message, verdict=stop.verdict, at_step=stop.at_step)
        else:
            self._act(stop.at_step, stop.verdict)

    def _tell_tuning(self, *, new: bool) -> None:
        """Where the weights came from, and how many of them learn."""
        origin, base = self.folder.experiment.origin, self.state.base
        if new and origin is not None:
            fields = dataclasses.asdict(origin) | {"sha256": base}
            self._tell("origin", f"weights of {origin.source} (sha256 {base})", **fields)
        if (learns := learning(self.state.model)) is not None:
            self._tell("tuning", learns, level="info")

    def goes_on(self, received: Signals | None) -> bool:
        """Whether there is another step to take; the ranks agree, whichever got a signal."""
        if (saved := self.saver.finished()) is not None:
            self._tell("saved", f"saved {saved}")
        wanted = any(each.wants_look(self.state.step + 1) for each in self.observers)
        word = either(_SIGNALS.get(received, 0) | _FAILED * self.saver.failed | _LOOK * wanted)
        self._wanted = bool(word & _LOOK)
        if word & _FAILED:
            self.settle()
        self.signal = next((s for s, bit in _SIGNALS.items() if word & bit), None)
        return self.state.step < self.config.steps and self.signal is None and not self.stopped

    def _watch_words(self) -> str:
        every = self.config.probe_every
        looks = f"all of them every {every} steps and when those stir" if every else "no looks"
        return (
            f"watching {len(self.state.taps)} layers: the gradients of the deepest quarter at each "
            f"step, {looks}; on an alarm: {self.config.on_alarm}"
        )

    def probe_for(self, step: int) -> LayerProbe | None:
        """For the passes of a step: a look into every layer if that is due at `step`, if the last
        step left the usual, or if an observer wants it."""
        every = self.config.probe_every
        due = self._wanted or (every and (step % every == 0 or self._watch.stirred))
        fields = NAMED_FIELDS[self.config.probe]
        return LayerProbe(self.state.taps, fields=fields) if due else None

    def guarded_step(self, step: int) -> dict[str, Any]:
        """A step, and a look into its passes where that is due, which is read before the update is
        made; if a value was not finite, that is recorded before the run stops."""
        probe = self.probe_for(step)
        try:
            return train_step(
                self.state,
                self.config,
                before_update=partial(self._before_update, probe),
                look=probe,
            )
        except NonFiniteError as error:
            self.settle()
            saved = list_checkpoints(self.folder.checkpoints)
            good = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
            message = f"{error}; {good}; try a lower learning rate or another rule in a new run"
            self._tell("nonfinite", message)
            raise NonFiniteError(message) from error

    def _before_update(self, probe: LayerProbe | None, gradients: Gradients) -> bool:
        """Whether the update may be made, once everybody has seen the gradients and the layers."""
        for observer in self.observers:
            observer.on_gradients(self.state, gradients)
        if probe is not None:
            arrays = arrays_over_ranks(probe.arrays(), probe.fields, self.state.device)
            layers = {"step": gradients.step, **arrays}
            self.folder.layers.append(layers)
            for observer in self.observers:
                observer.on_probe(self.state, layers)
        return not holds_back(self.config.on_alarm, self._alarms.verdict)

    def react(self, step: int) -> None:
        """Acts on the alarm of a step, if there was one, by the policy of the run."""
        alarm = self._alarms.take()
        if alarm is None:
            return
        self._act(step, alarm["verdict"])

    def _act(self, step: int, verdict: str) -> None:
        self.settle()  # so that the policy finds what was saved before
        scene = Scene(
            state=self.state,
            config=self.config,
            checkpoints=self.folder.checkpoints,
            step=step,
            verdict=verdict,
            tell=self._tell,
        )
        self._stop = react(scene)
        self.stopped = self._stop is not None
        self.folder.note_rule(self.state.model.config.rule)

    def log(self, step: int, metrics: dict[str, Any], seconds: float) -> None:
        """A line of metrics.jsonl."""
        at("the logs")
        tokens = metrics.pop("tokens")
        line = {"step": step, **metrics, "seconds": seconds, "tokens_per_second": tokens / seconds}
        self.folder.metrics.append(line)
        for observer in self.observers:
            observer.on_step(self.state, line)

    def save(self) -> None:
        """Begins to save the state as it is now; the steps go on meanwhile."""
        self.settle()
        snapshot = self.state.snapshot()
        snapshot.values["logged"] = self.folder.logged()
        snapshot.values["stop"] = dataclasses.asdict(self._stop) if self._stop else None
        self.saver.begin(snapshot)

    def settle(self) -> None:
        """Waits for the save that is under way, if any.

        Raises:
            UserError: it failed, on whichever rank.
        """
        at(THE_SAVE)
        if (saved := together(self.saver.wait)) is not None:
            self._tell("saved", f"saved {saved}")

    def finish(self) -> None:
        """Saves the last step, unless it is saved, and says why the run ends."""
        step, steps = self.state.step, self.config.steps
        self.settle()
        # That an alarm stopped the run is part of its last checkpoint, which may be there already.
        missing = step and from_first(lambda: checkpoint_missing(self.folder, step))
        if missing or self._stop is not None:
            self.save()
            self.settle()
        if self.stopped:
            return  # the policy has said why, and the same command does not go on
        if self.signal is not None:
            done = f"after step {step} of {steps}, saved" if step else "before the first step"
            message = f"stopped by {self.signal.name} {done}; give the same command again to go on"
            self._tell("interrupted", message, signal=self.signal.name)
        elif step == self._first:
            message = (
                f"nothing to do: the run is at step {step}, and steps={steps}, which is the "
                f"preset's where you gave none; to go on give more than {step}, for example "
                f"--steps {step + max(steps, 1)}"
            )
            self._tell("finished", message)
        else:
            self._tell("finished", f"finished step {step} of {steps}: {self.folder.path}")

    def _tell(self, name: str, message: str, **fields: Any) -> None:
        if fields.get("level") == "alarm":
            self.settle()  # so that a flight finds what was saved before
        event = self.folder.event(name, self.state.step, message, **fields)
        for observer in self.observers:
            observer.on_event(event)


def checkpoint_missing(folder: RunFolder, step: int) -> bool:
    """Whether the newest checkpoint is not the one of `step`."""
    saved = list_checkpoints(folder.checkpoints)
    return not saved or saved[-1].name != checkpoint_name(step)
