"""The flight recorder: the last steps of a run, written whole when something goes wrong.

    flights/step_00000031/
        flight.json          the recorded steps, the last of them the one that gave the alarm
        config.json          the experiment, with the rule that the network has by now
        batch.safetensors    what the last step read
        state/step_00000030/ the weights before the last step
        state/step_00000020/ the newest checkpoint before that

A step needs its batch, its noise and times, which follow from (seed, step), and the weights before
it. An alarm that is raised before the update finds just these weights in memory: they are written,
exact and without the moments, a quarter of a checkpoint. The newest checkpoint before the step is
linked, which takes no space, so that the steps between can be replayed. So nothing is copied while
all is well: copies of the state every few steps would cost the memory of several networks to save
some minutes once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvsplit.data import Batch
from mvsplit.diagnostics.attribution import HISTORY, most_unusual
from mvsplit.diagnostics.events import Event, gravest
from mvsplit.errors import UserError
from mvsplit.training.checkpoint import (
    Snapshot,
    checkpoint_name,
    list_checkpoints,
    remove_leftovers,
    save_checkpoint,
    step_of,
)
from mvsplit.training.config import Experiment, from_json, to_json
from mvsplit.training.distributed import world
from mvsplit.training.files import fsync, read_lines
from mvsplit.training.observer import Observer
from mvsplit.training.randomness import derive_seed
from mvsplit.training.run_folder import read_experiment
from mvsplit.training.state import TrainState
from mvsplit.training.step import STREAMS, Gradients

FORMAT = "mvsplit-flight"
VERSION = 1
BESIDE = "beside."  # before the names of what comes beside the batch
_NO_VERDICT = "chosen by its gradient norm, for there is no verdict"


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A step to be explained, and what is known of the steps before it.

    Attributes:
        path: where it was read from.
        experiment: what was run.
        step: the step to explain.
        reason: why it is this step, and what the watch said of it.
        records: a mapping for each recorded step, the last one of `step`: at least `step`, `loss`
            and `grad_norm`.
        world: processes that shared a batch; each had a run of successive rows.
        batch: what the step read; None where the loader has to be asked.
        checkpoints: states to start from, by rising step, all before `step`.
        altered: what a policy did to the run between the newest of these states and the step, so
            that a replay does not lead there; None where it did nothing.
    """

    path: Path
    experiment: Experiment
    step: int
    reason: str
    records: list[dict[str, Any]]
    world: int
    batch: Batch | None
    checkpoints: list[Path]
    altered: str | None = None


class FlightRecorder(Observer):
    """Keeps the last steps in memory and writes them on an alarm or a non-finite stop.

    An alarm is an event with `level` "alarm". The first counts: no other flight is written for the
    next `steps` steps, nor once the run has `limit` of them.

    Args:
        run: the run's folder.
        steps: how many steps are kept.
        tell: is told the name and the message of what happened.
        limit: how many flights a run may have.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int = 32,
        tell: Callable[[str, str], None] = lambda name, message: None,
        limit: int = 3,
    ) -> None:
        self.run, self.steps, self.limit = run, steps, limit
        self._tell = tell
        self._records: deque[dict[str, Any]] = deque(maxlen=steps)
        self._batch: Batch | None = None
        self._state: TrainState | None = None
        self._experiment: Experiment | None = None

    @property
    def folder(self) -> Path:
        """Where the flights are."""
        return self.run / "flights"

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        self._state, self._experiment = state, experiment
        remove_leftovers(self.folder)

    def on_gradients(self, state: TrainState, gradients: Gradients) -> None:
        assert self._experiment is not None
        self._records.append(record_of(gradients, self._experiment))
        self._batch = gradients.batch

    def on_event(self, event: dict[str, Any]) -> None:
        serious = event.get("level") == "alarm" or event.get("event") == "nonfinite"
        if serious and self._records and self._wanted(self._records[-1]["step"]):
            self.write(event["message"])

    def write(self, reason: str) -> Path | None:
        """Writes what is in memory now; a reader sees all of it or nothing.

        Returns:
            The flight's folder; None if it could not be written, which `tell` is told.

        Raises:
            UserError: no step was recorded yet.
        """
        if not self._records:
            raise UserError("the flight recorder has seen no step yet; take a step first")
        step = self._records[-1]["step"]
        final = self.folder / checkpoint_name(step)
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self.folder.mkdir(exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write(temporary, step, reason)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            fsync(self.folder)
        except (OSError, SafetensorError, UserError) as error:
            # The run matters more than its record: it goes on, and says what is missing.
            shutil.rmtree(temporary, ignore_errors=True)
            self._tell("flight", f"cannot write the flight of step {step}: {error}")
            return None
        self._tell("flight", f"recorded step {step}; mvsplit monitor explain {final} says why")
        return final

    def _wanted(self, step: int) -> bool:
        flights = [step_of(path) for path in list_checkpoints(self.folder)]
        return len(flights) < self.limit and all(abs(step - f) >= self.steps for f in flights)

    def _write(self, folder: Path, step: int, reason: str) -> None:
        assert self._state is not None
        assert self._experiment is not None
        assert self._batch is not None
        _write_batch(folder / "batch.safetensors", self._whole_batch())
        model = self._state.model
        experiment = dataclasses.replace(self._experiment, model=model.config)
        (folder / "config.json").write_text(to_json(experiment), encoding="utf-8")
        (folder / "state").mkdir()
        # The weights before the step are here whole if the update is not made yet.
        if self._state.step < step and not self._state.sharded:
            tensors = {"model": dict(model.state_dict()), **self._state.objective.tensors()}
            weights = Snapshot(step=self._state.step, tensors=tensors, values={})
            save_checkpoint(folder / "state", weights, keep=1)
        saved = _before(self.run / "checkpoints", step)
        _link_newest(saved, folder / "state")
        flight = {"format": FORMAT, "version": VERSION, "step": step, "reason": reason}
        flight |= {"world": world(), "records": list(self._records), "from_start": not saved}
        (folder / "flight.json").write_text(json.dumps(flight), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            fsync(path)

    def _whole_batch(self) -> Batch:
        """What all ranks read at the last step."""
        assert self._state is not None
        assert self._batch is not None
        if world() == 1:
            return self._batch
        return self._state.loader.batch_at(self._records[-1]["position"])


def record_of(gradients: Gradients, experiment: Experiment) -> dict[str, Any]:
    """What is kept of a step, as JSON can hold it."""
    config, norm = experiment.train, gradients.metrics["grad_norm"]
    chance = ["noise", "times"]
    chance += [] if gradients.batch.beside is None else [f"{name}{STREAMS}" for name in chance]
    return {
        "step": gradients.step,
        **gradients.metrics,
        "clip_factor": min(1.0, config.clip / norm) if norm > 0 else 1.0,
        "position": gradients.position,
        "seeds": {name: derive_seed(config.seed, name, gradients.step) for name in chance},
        "indices": gradients.indices,
        "sample_losses": gradients.sample_losses,
        "family_norms": gradients.family_norms,
    }


def _write_batch(path: Path, batch: Batch) -> None:
    tensors = _tensors(batch)
    if batch.beside is not None:
        tensors |= {BESIDE + name: tensor for name, tensor in _tensors(batch.beside).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    fields = ("latents", "text", "text_valid", "indices", "rejected")
    return {name: found for name in fields if (found := getattr(batch, name)) is not None}


def _read_batch(tensors: dict[str, Tensor]) -> Batch:
    others = {
        name.removeprefix(BESIDE): tensors.pop(name)
        for name in [*tensors]
        if name.startswith(BESIDE)
    }
    beside = _read_batch(others) if others else None
    return Batch(text_valid=tensors.pop("text_valid", None), beside=beside, **tensors)


def _before(folder: Path, step: int) -> list[Path]:
    """The checkpoints in `folder` from which `step` can be reached."""
    return [path for path in list_checkpoints(folder) if step_of(path) < step]


def _link_newest(checkpoints: list[Path], folder: Path) -> None:
    """The newest of them, so that steps between it and the flight's are reached too; the weights
    of the same step lie there already."""
    if checkpoints and not (folder / checkpoints[-1].name).exists():
        shutil.copytree(checkpoints[-1], folder / checkpoints[-1].name, copy_function=os.link)


def read_flight(path: Path | str, step: int | None = None) -> Flight:
    """The flight at `path`.

    Args:
        path: the flight's folder.
        step: which of the recorded steps is to be explained; None for the flight's own, the last.
            That is run from the weights before it, those before it from the newest checkpoint, as
            far as no policy changed the run on the way.

    Raises:
        UserError: there is no flight, its files cannot be read, or it does not reach the step.
    """
    path = Path(path)
    try:
        flight = json.loads((path / "flight.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "batch.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole flight ({error}); choose another") from error
    if flight.get("format") != FORMAT or flight.get("version") != VERSION:
        raise UserError(
            f"{path}: this program reads {FORMAT} {VERSION}, not {flight.get('format')} "
            f"{flight.get('version')}; use the version of mvsplit that wrote it"
        )
    config, last = path / "config.json", flight["step"]
    steps = list(_reachable(path, flight))
    if step is not None and step not in steps:
        raise UserError(
            f"step={step}: the flight {path} reaches {', '.join(map(str, steps))}; name the run's "
            f"folder for another step"
        )
    reason = flight["reason"] if step in (None, last) else f"the flight is of step {last}"
    reason = reason if step is None else f"as asked; {reason}"
    step = last if step is None else step
    return Flight(
        path=path,
        experiment=from_json(config.read_text(encoding="utf-8"), config),
        step=step,
        reason=reason,
        records=[record for record in flight["records"] if record["step"] <= step],
        world=flight["world"],
        batch=_read_batch(tensors) if step == last else None,
        checkpoints=_before(path / "state", step),
    )


def _reachable(path: Path, flight: dict[str, Any]) -> Iterator[int]:
    """The recorded steps that can be run again: the last from the weights before it, others from a
    whole checkpoint, or from the start of the run."""
    checkpoints = _before(path / "state", flight["step"])
    whole = [step_of(folder) for folder in checkpoints if list(folder.glob("optimizer*"))]
    from_start = flight.get("from_start", not checkpoints)
    start = max(whole, default=0 if from_start else flight["step"])
    for step in (record["step"] for record in flight["records"]):
        altered = _altered(path.parent.parent, start, step)
        if step == flight["step"] or (step > start and altered is None):
            yield step


def reachable_steps(path: Path) -> list[int]:
    """The recorded steps that `read_flight` can give of the flight at `path`."""
    return list(_reachable(path, json.loads((path / "flight.json").read_text(encoding="utf-8"))))


def flight_of_run(path: Path | str, step: int | None = None) -> Flight:
    """A step of a run that needs no recorded flight: it is replayed from the newest checkpoint
    before it, or from the start.

    Args:
        path: the run's folder.
        step: which one; None for the first of the gravest verdicts, from its flight where it has
            one, and without a verdict for the one whose gradient norm stands out most.

    Raises:
        UserError: there is no run, or it has not taken the step.
    """
    path = Path(path)
    experiment = read_experiment(path)
    lines = {line["step"]: line for line in read_lines(path / "metrics.jsonl")}
    told = [e for line in read_lines(path / "events.jsonl") if (e := Event.of_line(line))]
    flights = {step_of(folder): folder for folder in list_checkpoints(path / "flights")}
    if step is None and (worst := gravest(told, lines.keys() | flights.keys())) is not None:
        step, why = worst.step, f"the run's first {worst.level}. {worst.message}"
        if step in flights:
            return dataclasses.replace(read_flight(flights[step]), reason=why)
    elif step is not None:
        said = gravest(told, (step,))
        why = "as asked" if said is None else f"as asked; {said.message}"
    if not lines:
        raise UserError(f"{path} has taken no step yet; train it first")
    if step is None:
        step, why = _most_unusual(list(lines.values())), _NO_VERDICT
    if step not in lines:
        raise UserError(f"step={step}: {path} has the steps {min(lines)} to {max(lines)}")
    checkpoints = _before(path / "checkpoints", step)
    return Flight(
        path=path,
        experiment=experiment,
        step=step,
        reason=why,
        records=[line for n, line in sorted(lines.items()) if step - HISTORY <= n <= step],
        world=1,
        batch=None,
        checkpoints=checkpoints,
        altered=_altered(path, step_of(checkpoints[-1]) if checkpoints else 0, step),
    )


def _altered(run: Path, start: int, step: int) -> str | None:
    """What a policy did after `start` that changed the way to `step`."""
    for event in read_lines(run / "events.jsonl"):
        went_back = "to_step" in event and start <= event["to_step"] < step
        left_out = event.get("event") == "skipped" and start < event["step"] < step
        if went_back or left_out:
            return event["message"]
    return None


def _most_unusual(lines: list[dict[str, Any]]) -> int:
    """The step whose gradient norm is the largest multiple of the median before it."""
    return lines[most_unusual([line["grad_norm"] for line in lines])]["step"]
