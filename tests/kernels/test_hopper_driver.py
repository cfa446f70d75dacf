"""Kernels are loaded and launched on the device of their tensors, whichever is the current one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mvsplit.kernels.hopper import driver


@pytest.fixture
def calls(monkeypatch):
    """What the driver is asked for, with the device that is the current one then."""
    current, found = [0], []

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    class Driver:
        def __getattr__(self, name):
            return lambda *_: found.append((name, current[-1])) or 0

    def stream(index=None):
        found.append(("stream", current[-1] if index is None else index))
        return SimpleNamespace(cuda_stream=7)

    there = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: there)
    monkeypatch.setattr(driver, "_faults", [torch.zeros(1, dtype=torch.int32)])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return found


def test_a_kernel_of_another_device_than_the_current_one(calls):
    kernel = driver.Kernel(b"", "x", threads=128, shared=1, cluster=16, device=3)
    assert {name for name, _ in calls} == {
        "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"
    }  # fmt: skip
    assert kernel.most_clusters == 0
    kernel.launch(2, [None], pdl=True)
    assert {name for name, _ in calls} >= {
        "stream", "cuOccupancyMaxActiveClusters", "cuLaunchKernelEx"
    }  # fmt: skip
    assert {device for _, device in calls} == {3}
