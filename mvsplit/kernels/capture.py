"""Recording a CUDA graph, so that a recording that fails leaves the process as it was; and timing
by one.

Where a recording is broken off, `torch.cuda.graph` (2.11) leaves the current stream changed, the
allocator in the belief that it is still recording, so that no freed memory is ever given back, and
the default generator so that it refuses to draw. All three are put right here.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_one_at_a_time = threading.Lock()
_REPEATS = 20
_ROUNDS, _BUSY = 5, 200  # rounds by turns, replays of each in a row


@contextmanager
def capture(graph: Any, pool: Any = None) -> Iterator[None]:
    """`torch.cuda.graph` on the current device. One recording at a time: the default generator can
    take part in no more. Other threads may do what they like meanwhile.

    Args:
        graph: a `torch.cuda.CUDAGraph`.
        pool: where it takes its memory from; a pool of its own if None.

    Raises:
        RuntimeError: what was done cannot be recorded.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream = torch.cuda.current_stream()
    side = _side_stream(torch.cuda.current_device())
    with _one_at_a_time:
        try:
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                yield
        except BaseException:
            _clean_up(pool, stream)
            raise


@cache
def _side_stream(device: int) -> Any:
    """The stream that graphs of a device are recorded on. The same one for all, for graphs share
    the memory of a pool on one stream only; `torch.cuda.graph` alone would take one of the device
    that was current when it was first used."""
    return torch.cuda.Stream(device)


def _clean_up(pool: Any, stream: Any) -> None:
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # it does not believe that it records: the capture was ended
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    # A copy of the state has its seed and its place, and does not wait for a recording to end.
    default = torch.cuda.default_generators[device]
    default.graphsafe_set_state(default.clone_state())


def recorded(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """`run` as a CUDA graph, and what it gave as it was recorded. It runs once before, on a stream
    beside, where it compiles and initialises what a recording may not.

    Raises:
        RuntimeError: as `capture`.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        kept = run()
    return graph, kept


def milliseconds(run: Callable[[], object]) -> float:
    """Of one run, by a CUDA graph of it: launching may take longer than what is launched."""
    graph, kept = recorded(run)
    graph.replay()
    found = 1e3 * replay_time(graph, _REPEATS)
    del kept
    return found


def by_turns(ways: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each way, in rounds in which all run by turns, each from a graph of it. A
    round lasts long enough for power to become short."""
    graphs = [recorded(way) for way in ways]
    rounds = [[replay_time(graph, _BUSY) for graph, _ in graphs] for _ in range(_ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def replay_time(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Mean seconds of a replay, of several one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / replays
