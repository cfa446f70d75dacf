"""Runs the Triton kernels on the GPU, or through Triton's interpreter (see `tests/conftest.py`)."""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(ON_GPU, reason="runs on the GPU instead")),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")],
        ),
    ]
)
def device(request):
    """ "cpu" through the interpreter, or "cuda"."""
    return request.param


@pytest.fixture
def poisoned_memory():
    """Every allocation that an op does not initialise holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Of all processes that run these tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
