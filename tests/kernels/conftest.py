"""Runs the Triton kernels where the tests are: on the GPU, or through Triton's interpreter.

The choice must be made before anything imports Triton; a machine with a GPU is tested on it.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


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
