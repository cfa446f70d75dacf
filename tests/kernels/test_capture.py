"""A recording that fails leaves the process as it was."""

from __future__ import annotations

import pytest
import torch

from mvsplit.kernels.capture import capture

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MIB = 2**20


def record(failure: str) -> None:
    with capture(torch.cuda.CUDAGraph()):
        x = torch.ones(MIB, device="cuda")
        if failure == "what CUDA forbids":
            x.sum().item()
        raise RuntimeError("of Python")


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("failure", ["what CUDA forbids", "an error of Python"])
def test_stream_memory_and_chance_are_as_before(failure: str) -> None:
    stream = torch.cuda.current_stream()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.raises(RuntimeError):
        record(failure)
    assert torch.cuda.current_stream() == stream
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
