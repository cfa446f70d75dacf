"""A run is a folder: configuration, environment, logs and checkpoints, for one process at a time.

config.json, environment.json
metrics.jsonl   a line a step         layers.jsonl   a line a probe
events.jsonl    resumptions, saves, failures, why it stopped
checkpoints/step_00001000/
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from mvsplit.errors import UserError, nearest_run
from mvsplit.residuals import RuleConfig
from mvsplit.training.checkpoint import list_checkpoints
from mvsplit.training.config import CHANGEABLE, Experiment, differences, from_json, to_json
from mvsplit.training.distributed import from_first
from mvsplit.training.environment import cpu_threads_in, describe_environment
from mvsplit.training.files import (
    JsonLines,
    NoLines,
    keep_lines,
    read_lines,
    write_atomically,
)
from mvsplit.training.traces import LOCK, Traces

_RATES = tuple(f"train.{name}" for name in ("lr", "lr_factor", "gain_lr", "warmup"))


class FolderInUse(UserError):
    """Another process holds a run folder."""


class RunFolder:
    """An experiment's folder, held by this process until it is closed.

    Args:
        path: created if it does not exist.
        experiment: must agree with the folder's own, but for the fields that may change.

    Nothing is written but the lock until `begin`, and what was made here is taken away again where
    the run is refused before its first step: an impossible experiment leaves no trace.

    Attributes:
        changed: fields that differ from the last time, (old, new) by dotted name.
        threads_before: of PyTorch, if the process before this one ran on a CPU, from `begin` on.
        metrics, layers, events: the logs, from `begin` on.

    Raises:
        FolderInUse: another process holds it.
        UserError: the path is no folder of ours, or it belongs to another experiment.
    """

    def __init__(self, path: Path | str, experiment: Experiment) -> None:
        self.path, self.experiment = Path(path), experiment
        traces = Traces(self.path)
        with ExitStack() as stack:
            stack.push(traces.remove_folders)
            _create(self.path)
            stack.enter_context(_lock(self.path))
            stack.push(traces.remove_files)
            self.changed = _agree(self.path, experiment)
            self.threads_before: int | None = None
            self._stack = stack.pop_all()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin(
        self,
        device: torch.device,
        logged: Mapping[str, int],
        *,
        rule: RuleConfig,
        base: str | None = None,
    ) -> None:
        """Writes what the run is and runs on, and opens the logs to go on where a checkpoint was
        taken: metrics and layers keep as many lines as `logged` says, none where it says nothing;
        every log loses a last line that a kill cut off.

        Raises:
            UserError: the folder cannot be written, the disk being full for example.
        """
        environment = json.dumps(describe_environment(device), indent=2) + "\n"
        self.threads_before = cpu_threads_in(self.path / "environment.json")
        if self.experiment.origin is not None:
            origin = replace(self.experiment.origin, sha256=base)
            self.experiment = replace(self.experiment, origin=origin)
        with _writing_to(self.path):
            self._write_config(rule)
            write_atomically(self.path / "environment.json", environment)
            self.metrics = self._open("metrics.jsonl", logged.get("metrics", 0))
            self.layers = self._open("layers.jsonl", logged.get("layers", 0))
            self.events = self._open("events.jsonl", None)

    def note_rule(self, rule: RuleConfig) -> None:
        """Writes into config.json that the network has another rule by now."""
        if rule != self._rule:
            with _writing_to(self.path):
                self._write_config(rule)

    def _write_config(self, rule: RuleConfig) -> None:
        self._rule = rule
        rule_now = None if rule == self.experiment.model.rule else rule
        experiment = replace(self.experiment, rule_now=rule_now)
        write_atomically(self.path / "config.json", to_json(experiment))

    def logged(self) -> dict[str, int]:
        """How many lines the logs of numbers have. A step may have several, after a rollback."""
        return {"metrics": self.metrics.lines, "layers": self.layers.lines}

    def history(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics and layers in the order in which they were written."""
        layers = deque(read_lines(self.layers.path))
        for line in read_lines(self.metrics.path):
            yield line
            while layers and layers[0]["step"] == line["step"]:
                yield layers.popleft()

    def event(self, name: str, step: int, message: str, **fields: Any) -> dict[str, Any]:
        """Appends a line to events.jsonl and returns it."""
        line = {"event": name, "step": step, "time": time.time(), "message": message, **fields}
        self.events.append(line)
        return line

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def _open(self, name: str, lines: int | None) -> JsonLines:
        log = JsonLines(self.path / name, keep_lines(self.path / name, lines))
        self._stack.callback(log.close)
        return log


class FollowedFolder(RunFolder):
    """The folder of a run on all ranks but the first: nothing is written."""

    def __init__(self, path: Path | str, experiment: Experiment) -> None:
        self.path, self.experiment = Path(path), experiment
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.threads_before = None
        self._stack = ExitStack()

    def begin(
        self,
        device: torch.device,
        logged: Mapping[str, int],
        *,
        rule: RuleConfig,
        base: str | None = None,
    ) -> None:
        self.metrics = self.layers = self.events = NoLines(self.path)

    def note_rule(self, rule: RuleConfig) -> None:
        pass


def open_run(path: Path | str, experiment: Experiment) -> RunFolder:
    """The folder of a run, held by the first of its ranks.

    Raises:
        UserError: as `RunFolder`, on every rank.
    """
    held: list[RunFolder] = []
    from_first(lambda: held.append(RunFolder(path, experiment)))
    return held[0] if held else FollowedFolder(path, experiment)


def read_experiment(path: Path | str) -> Experiment:
    """The experiment of the run folder at `path`.

    Raises:
        UserError: there is no run at `path`, or its configuration cannot be read.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise UserError(f"no run at {path}: there is no {config}; {nearest_run(Path(path))}")
    return from_json(config.read_text(encoding="utf-8"), config)


@contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    """Says in one line what keeps a run folder from being written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {path}: {error.strerror}; free some space, or choose "
            f"another --run-dir"
        ) from error


def _create(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        visible = [p.name for p in path.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"cannot create the run folder {path}: {error.strerror}; choose another --run-dir"
        ) from error
    if visible and "config.json" not in visible:
        raise UserError(
            f"{path} is not a run folder: it holds {visible[0]} but no config.json; choose "
            f"another --run-dir"
        )


def _lock(path: Path) -> IO[str]:
    """The folder's lock, which the system releases when the process ends, however it ends."""
    with _writing_to(path), ExitStack() as stack:
        file = stack.enter_context(open(path / LOCK, "a+", encoding="utf-8"))
        if not _try_lock(file):
            raise FolderInUse(
                f"{path} is in use by {_named_in(file)}; wait for it, stop it, or choose another "
                f"--run-dir"
            )
        if os.fstat(file.fileno()).st_nlink == 0:  # its holder was refused, and took it away
            return _lock(path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        stack.pop_all()
    return file


def holder_of(path: Path) -> str | None:
    """Which process holds the run folder at `path`, in words; None where nobody does.

    Raises:
        UserError: the system has no such lock.
    """
    try:
        with open(path / LOCK, encoding="utf-8") as file:
            return None if _try_lock(file, shared=True) else _named_in(file)
    except FileNotFoundError:
        return None


def _named_in(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"


def _try_lock(file: IO[str], *, shared: bool = False) -> bool:
    """Whether the lock is ours now.

    Raises:
        UserError: the system has no such lock, as Windows has none.
    """
    try:
        import fcntl  # here, so that all but training works on Windows
    except ImportError as error:
        raise UserError(
            "training needs the file locks of Linux or macOS; on Windows use WSL"
        ) from error
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _agree(path: Path, experiment: Experiment) -> dict[str, tuple[Any, Any]]:
    changed: dict[str, tuple[Any, Any]] = {}
    if (path / "config.json").exists():
        changed = differences(read_experiment(path), experiment)
        _refuse_changes(path, [name for name in changed if name not in CHANGEABLE], changed)
    return changed


def _from_its_weights(path: Path, names: Sequence[str]) -> str:
    """How to train the network at `path` on at another rate; "" where that is not all that is new,
    or there is no checkpoint."""
    saved = list_checkpoints(path / "checkpoints")
    if not saved or any(name not in _RATES for name in names):
        return ""
    return (
        f" and train these weights, or those of an earlier checkpoint, on: --from {saved[-1]} "
        f"--no-from-ema --optimizer kept"
    )


def _refuse_changes(path: Path, names: Sequence[str], changed: dict[str, tuple[Any, Any]]) -> None:
    if names:
        listed = ", ".join(f"{n}: {changed[n][0]!r} there, {changed[n][1]!r} now" for n in names)
        raise UserError(
            f"{path} holds another experiment ({listed}); give the same values, or choose another "
            f"--run-dir{_from_its_weights(path, names)}"
        )
