"""Seconds a step, of networks alone on a device and of several side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, get_entries
from mvsplit.training import build_state, train_step

SIDE_BY_SIDE = (1, 2, 4, 8)
STEPS = 12
WARM_UP = 4  # steps: kernels are compiled, choices made, the graph recorded
ALIKE = 0.02  # of the losses, for attention may choose other kernels in another process
SHARED = "mvsplit-root"  # the entry that runs side by side with itself


def time_sharing(size: BenchSize, counts: Sequence[int] = SIDE_BY_SIDE) -> dict[str, Any]:
    """Times steps, in processes that stay: first as many copies of one network as `counts` say at
    the same time, then different networks, each alone.

    Returns:
        `side_by_side`: by number of processes, the median seconds a step of each and the steps a
        second of all together; `alone`: by network; `device`, `torch`.
    """
    with _holders(max(counts), size) as pipes:
        found = _time(pipes, size, counts)
    on_gpu = size.device != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    return found | {"device": device, "torch": torch.__version__}


@contextmanager
def _holders(count: int, size: BenchSize) -> Iterator[list[Connection]]:
    """Processes that hold a network each, by the pipes that lead to them."""
    context = get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, size), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            with suppress(OSError):  # one that has died
                pipe.send(None)
        for process in processes:
            process.join()


def _time(pipes: list[Connection], size: BenchSize, counts: Sequence[int]) -> dict[str, Any]:
    deepest = size.depths[-2]
    losses = _ask(pipes, [("set", SHARED, deepest, size.width)] * len(pipes))
    pairs = [pair for each in losses for pair in zip(each, losses[0], strict=True)]
    if not all(abs(a - b) < ALIKE * b for a, b in pairs):  # NaN is not
        raise RuntimeError(f"one network in several processes does not step alike: {losses}")
    found: dict[str, Any] = {"side_by_side": {}, "alone": {}, "steps": STEPS}
    for count in counts:
        each = _ask(pipes[:count], [("time",)] * count)
        rate = sum(1 / seconds for seconds in each)
        found["side_by_side"][str(count)] = {"seconds": each, "steps_a_second": rate}
        print(f"{count} side by side: {max(each):.4f} s a step, {rate:.1f} steps/s", flush=True)
    networks = _networks(size)
    for start in range(0, len(networks), len(pipes)):
        some = networks[start : start + len(pipes)]
        _ask(pipes, [("set", *network) for network in some])
        for pipe, network in zip(pipes, some, strict=False):
            (seconds,) = _ask([pipe], [("time",)])
            name = f"{network[0]}-{network[1]}x{network[2]}"
            found["alone"][name] = seconds
            print(f"alone {name}: {seconds:.4f} s a step", flush=True)
    return found


def _networks(size: BenchSize) -> list[tuple[str, int, int]]:
    """What is timed alone: every depth, every shape, and the entries that do not run as one node
    for each block."""
    deepest = size.depths[-2]
    depths = [(SHARED, depth, size.width) for depth in size.depths]
    shapes = [(SHARED, *shape) for shape in size.shapes]
    others = [(name, deepest, size.width) for name in ("keel", "prenorm", "sandwich")]
    return list(dict.fromkeys([*depths, *others, *shapes]))


def _ask(pipes: Sequence[Connection], questions: Sequence[tuple[Any, ...]]) -> list[Any]:
    for pipe, question in zip(pipes, questions, strict=False):
        pipe.send(question)
    return [pipe.recv() for pipe, _ in zip(pipes, questions, strict=False)]


def _serve(pipe: Connection, size: BenchSize) -> None:
    """Holds one network, and times it when asked."""
    if size.device == "cpu":
        torch.set_num_threads(1)
    state = config = None
    while (question := pipe.recv()) is not None:
        if question[0] == "set":
            state = None
            name, depth, width = question[1:]
            entry = get_entries([name])[0]
            run = BenchRun(entry=entry, depth=depth, width=width, rate=1e-4, seed=0)
            config = run.experiment(size).train
            state = build_state(run.experiment(size))
            pipe.send([train_step(state, config)["loss"] for _ in range(WARM_UP)])
        else:
            assert state is not None
            assert config is not None
            seconds = []
            for _ in range(STEPS):
                began = time.perf_counter()
                train_step(state, config)
                seconds.append(time.perf_counter() - began)
            pipe.send(statistics.median(seconds))
