"""The process in which a kernel is tried that may fault: a fault takes the GPU from its process.

A verdict on a kernel is "right", after which it may say more, or what is wrong with it, and whether
that holds for later processes: a fault does, a wait that did not end does not, for another process
on the GPU may be why. One that lasts is kept on the disk (see `choices`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mvsplit.kernels.choices import cache_folder, recall, remember
from mvsplit.kernels.hopper.driver import VAIN_WAIT, DriverError, FaultError, ended_by_a_wait

_logger = logging.getLogger(__name__)
RIGHT = "right"
_FAULTS = "faults here"
Verdict = tuple[str, bool]
Kind = TypeVar("Kind")


class ChildError(RuntimeError):
    """No such process can be begun."""


def python() -> str:
    """The interpreter. A program that is frozen would begin itself anew instead.

    Raises:
        ChildError: there is none.
    """
    if getattr(sys, "frozen", False) or not sys.executable:
        raise ChildError("this program is no Python that could begin another")
    return sys.executable


def begin(command: Sequence[str]) -> subprocess.Popen[str]:
    """Begins a process that finds the modules which this one finds, with pipes for what it says.

    Raises:
        ChildError: it cannot be started.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.Popen(
            command, env=environment, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise ChildError(f"a process for them cannot be started: {error}") from error


def verdict(code: str, task: str, patience: float) -> Verdict:
    """What another process says that runs `code` (`tell` in its end) with `task` as its argument;
    no verdict that lasts where that ends without one."""
    (found,) = verdicts([(code, task)], patience)
    return found


def verdicts(tasks: Sequence[tuple[str, str]], patience: float) -> list[Verdict]:
    """The same of a process for each code and its argument, side by side."""
    processes: list[subprocess.Popen[str] | ChildError] = []
    try:
        for code, task in tasks:
            try:
                processes.append(begin([python(), "-c", code, task]))
            except ChildError as error:
                processes.append(error)
        end = time.monotonic() + patience
        return [_said(process, end, patience) for process in processes]
    finally:  # an interrupt must not leave them behind
        for process in processes:
            if not isinstance(process, ChildError):
                process.kill()
                process.wait()


def _said(process: subprocess.Popen[str] | ChildError, end: float, patience: float) -> Verdict:
    if isinstance(process, ChildError):
        return f"they cannot be compared, because {process}", False
    try:
        said, errors = process.communicate(timeout=max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return f"no verdict within {patience:.0f} s", False
    if process.returncode:
        last = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1]
        return f"the comparison ended without a verdict ({last})", False
    found, lasting = json.loads(said.strip().splitlines()[-1])
    return found, lasting


def known(
    verdicts: dict[tuple[Kind, torch.device], Verdict],
    kind: Kind,
    device: torch.device,
    store: str,
    name: Callable[[Kind, torch.device], str],
    find: Callable[[Kind, torch.device], Verdict],
) -> Verdict:
    """The verdict on kernels: of this process (`verdicts`, which grows), of the disk, or what
    `find` says now; anything but "right" is a warning, once. A capture forbids to compare, but not
    to look on the disk.

    Args:
        store, name: of the file and of the verdict in it, which takes the kernels' sources and is
            asked for once.
    """
    if (kind, device) not in verdicts:
        key = name(kind, device)
        words, lasting = recall(store, key), True
        if words is None:
            if torch.cuda.is_current_stream_capturing():
                return "they were not compared on this machine before a graph was captured", False
            words, lasting = find(kind, device)
            kept = recall(store, key) if lasting else None
            if kept is not None:  # by another process meanwhile: all are to compute alike
                words = kept
            elif lasting:
                remember(store, key, words)
        if not words.startswith(RIGHT):
            _logger.warning("%s in CUDA C++ is not used for %s: %s", store, kind, words)
        verdicts[kind, device] = words, lasting
    return verdicts[kind, device]


class Question(NamedTuple):
    """What may be asked of another process, as `known` has it.

    Attributes:
        code, task: of that process, see `verdict`.
        after: what to make of its verdict.
    """

    verdicts: dict[Any, Verdict]
    kind: Any
    store: str
    name: Callable[[Any, torch.device], str]
    code: str
    task: str
    after: Callable[[Any, torch.device, Verdict], Verdict] = lambda *given: given[-1]


def prepare(questions: Sequence[Question], device: torch.device, patience: float) -> None:
    """Has verdicts found side by side, in the time of one, where there are none yet; nothing where
    a graph is being captured."""
    if torch.cuda.is_current_stream_capturing():
        return
    unknown = [
        q
        for q in questions
        if (q.kind, device) not in q.verdicts and recall(q.store, q.name(q.kind, device)) is None
    ]
    found = verdicts([(q.code, q.task) for q in unknown], patience) if unknown else []
    for q, verdict in zip(unknown, found, strict=True):
        known(q.verdicts, q.kind, device, q.store, q.name, partial(_after, q, verdict))


def _after(question: Question, found: Verdict, kind: Any, device: torch.device) -> Verdict:
    return question.after(kind, device, found)


def key(kind: tuple[object, ...], device: torch.device, source: str, *files: Path) -> str:
    """Of a verdict on the disk: what it depends on, the kernels' `source` and `files` around them
    among it."""
    parts = b"\0".join((source.encode(), *(file.read_bytes() for file in files)))
    digest = hashlib.sha256(parts).hexdigest()[:16]
    return "; ".join(
        map(str, (torch.cuda.get_device_name(device), torch.__version__, digest, *kind))
    )


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """In the other process: the GPU without others like it on this machine, so that they do not
    disturb what is timed. Waits for them; where there is no place for the lock, it is disturbed."""
    path = cache_folder() / f"{device.type}-{device.index or 0}.lock"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
        except OSError:
            pass
        else:
            import fcntl  # Linux, as the GPUs that this is for

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def judged(judge: Callable[[], Verdict]) -> Verdict:
    """In the other process: what `judge` says, or why it could not. A fault is for `tell`."""
    try:
        return judge()
    except torch.OutOfMemoryError:
        return "no memory to compare them", False
    except FaultError:
        raise
    except (DriverError, OSError) as error:
        return f"cannot be made here ({error})", False


def was_ended(words: str) -> bool:
    """Whether a verdict is that a kernel ended the process that tried it."""
    return words.startswith((_FAULTS, VAIN_WAIT))


def take(name: str) -> torch.device:
    """In the other process: the device to try kernels on, which are launched on the current one.
    What fails here is no verdict on a kernel."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.empty(1, device=device)
    return device


def tell(find: Callable[[], Verdict]) -> None:
    """In the other process: writes its verdict as the last line of its output."""
    try:
        found = find()
    except RuntimeError as error:  # a fault: the process is of no use to the GPU any more
        waited = ended_by_a_wait(error)
        found = waited or f"{_FAULTS} ({str(error).splitlines()[0]})", waited is None
    print(json.dumps(found), flush=True)
