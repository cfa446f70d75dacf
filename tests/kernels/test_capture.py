"""A recording that fails leaves the process as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from mvsplit.kernels.capture import _side_stream, capture, milliseconds, recorded
from mvsplit.sampling.engine_tune import graph_time

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MIB = 2**20


def record(failure: str) -> None:
    with capture(torch.cuda.CUDAGraph()):
        x = torch.ones(MIB, device="cuda")
        if failure == "what CUDA forbids":
            x.sum().item()
        raise RuntimeError("of Python")


def test_each_device_has_one_stream_for_all_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not the first too, where the library's own stream is of the first."""
    now, used = [0], []

    @contextmanager
    def graph(_: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        used.append((pool, stream, capture_error_mode))
        yield

    _side_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    for now[0] in (0, 1, 1, 0):
        with capture(None, pool=7):
            pass
    _side_stream.cache_clear()
    assert used == [(7, f"a stream of {device}", "thread_local") for device in (0, 1, 1, 0)]


class Stream:
    """As far as a recording asks for one."""

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.mark.parametrize("way", [recorded, milliseconds, graph_time])
def test_a_run_that_cannot_be_recorded_is_cleaned_up_after(
    way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the engine's tuner too, of which candidates fail often; it ran once before."""
    cleaned: list[Any] = []
    ran: list[int] = []
    now = Stream()

    def run() -> None:
        ran.append(1)
        if len(ran) == 2:
            raise RuntimeError("no such launch")

    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("mvsplit.kernels.capture._clean_up", lambda *of: cleaned.append(of))
    _side_stream.cache_clear()
    with pytest.raises(RuntimeError, match="no such launch"):
        way(run)
    _side_stream.cache_clear()
    assert cleaned == [(7, now)]
    assert len(ran) == 2


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("failure", ["what CUDA forbids", "an error of Python"])
def test_stream_memory_and_chance_are_as_before(failure: str) -> None:
    stream = torch.cuda.current_stream()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.manual_seed(5)
    _, expected = (torch.rand(3, device="cuda") for _ in range(2))
    torch.cuda.manual_seed(5)
    torch.rand(3, device="cuda")
    with pytest.raises(RuntimeError):
        record(failure)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.rand(3, device="cuda"), expected)  # chance goes on where it was
    x = torch.randn(256 * MIB, device="cuda")
    assert 0.99 < float(x.std()) < 1.01
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + 64 * MIB  # a GiB was given back
    graph, y = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda")
    with capture(graph):
        z = y + torch.ones_like(y)
    y.fill_(4)
    graph.replay()
    assert z.tolist() == [5, 5, 5]
