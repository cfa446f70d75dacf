"""The measurement of an engine's plan in a process of its own.

A kernel in CUDA C++ that is wrong on some device or driver can end the CUDA context of the process
that launched it. So where such kernels are candidates, all are measured in a child, on random
weights of the same shapes. It says what it is about to run; where it ends, or is silent for too
long, that is left out and another child begins. The plan which comes back is compared with the
ordinary ops once more, here, on the weights of the model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvsplit.kernels.hopper import child
from mvsplit.kernels.hopper.driver import DriverError, require_compiler
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.init import initialise
from mvsplit.residuals import RuleConfig
from mvsplit.sampling.engine_candidates import candidates, in_cuda
from mvsplit.sampling.engine_plan import STAGES, Network, Plan
from mvsplit.sampling.engine_tune import LAYERS, Tuner

SILENCE = 90.0  # seconds; every candidate that is compiled or runs is told
MOST_CHILDREN = 6

_logger = logging.getLogger(__name__)


class ApartError(RuntimeError):
    """No child came back with a plan."""


class Measured(NamedTuple):
    """What a child found: `Tuner.best_plan`, `Tuner.table`, `Tuner.seconds`, and what ended the
    children before it."""

    plan: Plan
    table: dict[str, list[tuple[str, float | None, str]]]
    seconds: dict[str, float]
    ended: list[str]


def best_plan(network: Network, say: Callable[[str], None]) -> Plan | None:
    """As `Tuner.best_plan`, whose kernels in CUDA C++ have run in another process before they run
    in this one; without them, which is said, where there is no such process."""
    if not any(in_cuda(choice) for stage in STAGES for choice in candidates(stage, network)):
        return Tuner(network).best_plan()
    tuner = Tuner(network, cuda=False)
    if not tuner.is_finite():
        return None
    if network.trunk.is_cuda:  # nothing of this process runs beside it or takes its room
        torch.cuda.synchronize(network.trunk.device)
        torch.cuda.empty_cache()
    try:
        require_compiler()
        found = measured(network)
    except (ApartError, child.ChildError, DriverError) as error:
        say(left_out(str(error)))
        plan = tuner.best_plan()
        return None if plan is None else dataclasses.replace(plan, without=str(error))
    return tuner.checked(found.plan)


def left_out(reason: str) -> str:
    """Kernels in CUDA C++, in words."""
    return f"kernels in CUDA C++ are left out, because {reason}"


def measured(network: Network, command: Sequence[str] = ()) -> Measured:
    """What a child finds for a network's shape.

    Args:
        command: of the child, before the task in JSON; Python with this module if empty.

    Raises:
        ApartError: none comes back with a plan.
        child.ChildError: none can be begun.
    """
    ended: list[str] = []
    command = command or _python()
    for _ in range(MOST_CHILDREN):
        one = _Child(command, _task(network, ended))
        if one.found is not None:
            plan = Plan.from_json(one.found["plan"])
            table = {k: [tuple(row) for row in v] for k, v in one.found["table"].items()}
            return Measured(plan, table, one.found["seconds"], ended)
        if one.running is None:
            raise ApartError(f"a process for them {one.end}: {one.last_words}")
        _logger.warning("engine: %s is left out: its process %s", one.running, one.end)
        ended.append(one.running)
    raise ApartError(f"{MOST_CHILDREN} of them ended their process")


def _python() -> Sequence[str]:
    """Python, running this module."""
    return child.python(), "-m", __name__


class _Child:
    """A child that has ended, and what it said.

    Attributes:
        running: what it ran last; None if it had not begun.
        found: its result, if it had one.
        end: how it ended, in words.
        last_words: the error that ended it, or the last line on its standard error.

    Raises:
        child.ChildError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], task: dict[str, Any]) -> None:
        self.running: str | None = None
        self.found: dict[str, Any] | None = None
        self.last_words = ""
        process = child.begin([*command, json.dumps(task)])
        silent = _Alarm(SILENCE, process.kill)
        try:
            self._listen(process, silent)
        finally:  # an interrupt must not leave it behind
            process.kill()
            silent.stop()

    def _listen(self, process: subprocess.Popen[str], silent: _Alarm) -> None:
        """To its end."""
        assert process.stdout is not None
        errors: list[str] = []
        listener = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        listener.start()
        for line in process.stdout:
            silent.again()
            self._hear(line.rstrip("\n"))
        status = process.wait()
        listener.join()
        self.end = f"was silent for {SILENCE:.0f} s" if silent.rang else f"ended with {status}"
        self.last_words = self.last_words or (errors or [""])[-1].strip()

    def _hear(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "BEGIN":
            self.running = rest
        elif kind == "SAY":
            _logger.info("%s", rest)
        elif kind == "FOUND":
            self.found = json.loads(rest)
        elif kind == "ERROR":
            self.last_words = rest


class _Alarm:
    """Calls `ring` once if `again` is not called for some seconds."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._seconds, self._ring, self.rang = seconds, ring, False
        self._timer: threading.Timer | None = None
        self.again()

    def again(self) -> None:
        self.stop()
        self._timer = threading.Timer(self._seconds, self._now)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _now(self) -> None:
        self.rang = True
        self._ring()


def _task(network: Network, banned: Sequence[str]) -> dict[str, Any]:
    """What a child has to know."""
    model, trunk = network.model, network.trunk
    config = dataclasses.replace(
        model.config, depth=min(model.config.depth, LAYERS), writers="standard"
    )
    return {
        "config": dataclasses.asdict(config), "dtype": str(trunk.dtype).partition(".")[2],
        "device": str(trunk.device), "batch": network.stream.batch, "size": network.size,
        "text": network.stream.text, "padded": network.valid is not None, "banned": list(banned),
    }  # fmt: skip


def _network(task: dict[str, Any]) -> Network:
    """Of random weights and the shape of a task."""
    fields = {**task["config"], "rule": RuleConfig(**task["config"]["rule"])}
    config, dtype, device = DiTConfig(**fields), getattr(torch, task["dtype"]), task["device"]
    with torch.device("meta"):
        model = DiT(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    initialise(model, config, torch.Generator(device).manual_seed(0))
    noise = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=noise).to(dtype)

    latents = draw(task["batch"], config.channels, *task["size"])
    text = draw(task["batch"], task["text"], config.text_width)
    return Network(model, latents, text, padded=task["padded"])


class _Teller(logging.Handler):
    """Hands on what the tuner logs; of what is no news, that the child is at work."""

    def emit(self, record: logging.LogRecord) -> None:
        news = record.levelno >= logging.INFO
        _tell("SAY" if news else "WORKS", record.getMessage().replace("\n", " "))


def _tell(kind: str, what: str) -> None:
    print(kind, what, flush=True)


def _main() -> None:
    """The child: its task is the last argument."""
    task = json.loads(sys.argv[-1])
    logging.getLogger("mvsplit").setLevel(logging.DEBUG)
    logging.getLogger("mvsplit").addHandler(_Teller())
    if task["device"] != "cpu":
        torch.cuda.set_device(task["device"])
    with torch.no_grad():
        tuner = Tuner(
            _network(task), about=lambda what: _tell("BEGIN", what), banned=task["banned"]
        )
        plan = tuner.best_plan()
    assert plan is not None, "random weights are finite"
    found = {"plan": plan.to_json(), "table": tuner.table, "seconds": tuner.seconds}
    _tell("FOUND", json.dumps(found))


if __name__ == "__main__":
    try:
        _main()
    except Exception as error:  # a device that faulted may not let a process end in the usual way
        _tell("ERROR", " ".join(f"{type(error).__name__}: {error}".splitlines()[:1]))
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
