"""Seconds a step, of networks alone on a device and of several side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, get_entries
from mvsplit.reproduce.workers import ask_each, standing_workers
from mvsplit.training import build_state, train_step

SIDE_BY_SIDE = (1, 2, 4, 8)
STEPS = 12
WARM_UP = 4  # steps: kernels are compiled, choices made, the graph recorded
ALIKE = 0.02  # of the losses, for attention may choose other kernels in another process
Network = tuple[str, int, int]  # of an entry, so deep and so wide
SHARED = "mvsplit-root"  # the entry that runs side by side with itself


def time_sharing(size: BenchSize, counts: Sequence[int] = SIDE_BY_SIDE) -> dict[str, Any]:
    """Times steps, in processes that stay: first as many copies of one network as `counts` say at
    the same time, then different networks, each alone.

    A SIGTERM or Ctrl-C raises `Stopped`, and the processes are ended.

    Returns:
        `side_by_side`: by number of processes, the median seconds a step of each and the steps a
        second of all together; `alone`: by network; `device`, `torch`.
    """
    with standing_workers(max(counts)) as pipes:
        found = _time(pipes, size, counts)
    on_gpu = size.device != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return found | {"device": device, "torch": torch.__version__}


def _time(pipes: list[Connection], size: BenchSize, counts: Sequence[int]) -> dict[str, Any]:
    deepest = size.depths[-2]
    losses = _hold(pipes, size, [(SHARED, deepest, size.width)] * len(pipes))
    pairs = [pair for each in losses for pair in zip(each, losses[0], strict=True)]
    if not all(abs(a - b) < ALIKE * b for a, b in pairs):  # NaN is not
        raise RuntimeError(f"one network in several processes does not step alike: {losses}")
    found: dict[str, Any] = {"side_by_side": {}, "alone": {}, "steps": STEPS}
    for count in counts:
        each = ask_each(pipes[:count], [(_step_seconds, (), {})] * count)
        rate = sum(1 / seconds for seconds in each)
        found["side_by_side"][str(count)] = {"seconds": each, "steps_a_second": rate}
        print(f"{count} side by side: {max(each):.4f} s a step, {rate:.1f} steps/s", flush=True)
    networks = _networks(size)
    for start in range(0, len(networks), len(pipes)):
        some = networks[start : start + len(pipes)]
        _hold(pipes[: len(some)], size, some)
        for pipe, network in zip(pipes, some, strict=False):
            (seconds,) = ask_each([pipe], [(_step_seconds, (), {})])
            name = f"{network[0]}-{network[1]}x{network[2]}"
            found["alone"][name] = seconds
            print(f"alone {name}: {seconds:.4f} s a step", flush=True)
    return found


def _networks(size: BenchSize) -> list[Network]:
    """What is timed alone: every depth, every shape, and the entries that do not run as one node
    for each block."""
    deepest = size.depths[-2]
    depths = [(SHARED, depth, size.width) for depth in size.depths]
    shapes = [(SHARED, *shape) for shape in size.shapes]
    others = [(name, deepest, size.width) for name in ("keel", "prenorm", "sandwich")]
    return list(dict.fromkeys([*depths, *others, *shapes]))


def _hold(pipes: Sequence[Connection], size: BenchSize, networks: Sequence[Network]) -> list[Any]:
    """Gives each process its network; the losses of its first steps."""
    return ask_each(pipes, [(_take, (size, *network), {}) for network in networks])


# In a process that holds a network

_held: dict[str, Any] = {}


def _take(size: BenchSize, name: str, depth: int, width: int) -> list[float]:
    """Holds this network in the place of the one before."""
    if size.device == "cpu":
        torch.set_num_threads(1)
    _held.clear()
    run = BenchRun(entry=get_entries([name])[0], depth=depth, width=width, rate=1e-4, seed=0)
    experiment = run.experiment(size)
    _held.update(state=build_state(experiment), config=experiment.train)
    return [train_step(**_held)["loss"] for _ in range(WARM_UP)]


def _step_seconds() -> float:
    """Of the network that is held, the median."""
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        train_step(**_held)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
