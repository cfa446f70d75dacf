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
    monkeypatch.setattr(driver, "_primary_context", lambda _: None)
    monkeypatch.setattr(driver, "_faults", [torch.zeros(1, dtype=torch.int32)])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return found


def test_a_kernel_of_another_device_than_the_current_one(calls):
    kernel = driver.Kernel(b"", "x", threads=128, shared=1, cluster=16, device=3)
    assert {name for name, _ in calls} == {
        "cuCtxGetCurrent", "cuCtxSetCurrent",
        "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute",
    }  # fmt: skip
    assert kernel.most_clusters == 0
    kernel.launch(2, [None], pdl=True)
    assert {name for name, _ in calls} >= {
        "stream", "cuOccupancyMaxActiveClusters", "cuLaunchKernelEx"
    }  # fmt: skip
    assert {device for _, device in calls} == {3}


class Contexts:
    """A driver whose threads have a context or none; the primary one of device n is 100 + n."""

    def __init__(self, current):
        self.current, self.retained, self.seen = current, [], []

    def cuCtxGetCurrent(self, to):
        to._obj.value = self.current
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value if context else None
        return 0

    def cuDeviceGet(self, to, index):
        to._obj.value = index + 10
        return 0

    def cuDevicePrimaryCtxRetain(self, to, handle):
        self.retained.append(handle.value)
        to._obj.value = handle.value + 90
        return 0

    def cuTensorMapEncodeTiled(self, *_):
        self.seen.append(self.current)
        return 0 if self.current else 201


@pytest.mark.parametrize(("before", "within"), [(None, 103), (7, 7)])
def test_a_thread_without_a_context_has_that_of_the_device_for_a_call(before, within, monkeypatch):
    there = Contexts(before)
    monkeypatch.setattr(driver, "_driver", lambda: there)
    driver._primary_context.cache_clear()
    memory = torch.empty(8, 64, dtype=torch.bfloat16)
    tensor = SimpleNamespace(
        device=torch.device("cuda", 3), dtype=memory.dtype, data_ptr=memory.data_ptr,
        element_size=memory.element_size,
    )  # fmt: skip
    for _ in range(2):
        driver.TensorMap(tensor, (64, 8), (64,), (64, 8))
    assert there.seen == [within, within]
    assert there.current == before
    assert there.retained == ([13] if before is None else [])  # once
    driver._primary_context.cache_clear()
