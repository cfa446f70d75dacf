"""The candidate of benchmarks/merge_two_launches.py against the fp64 reference."""

import sys
from pathlib import Path

import pytest
import torch

from mvsplit.kernels import Segments, forced_backend, split_merge
from tests.kernels.fused import draw, tolerance

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

FOLDER = Path(__file__).parents[2] / "benchmarks"
PADDED = (
    (300, 70),
    [(300, 70), (290, 1), (17, 0)],
)  # several chunks, and tiles one above the other
CASES = [  # lengths, valid, width, dtype, tied, norm
    (*PADDED, 24, torch.float32, False, True),
    ((37, 0, 20), None, 40, torch.bfloat16, True, True),
    ((5, 3), None, 1, torch.float32, True, False),
    ((1, 2), None, 257, torch.float16, True, True),
]


@pytest.fixture(scope="module")
def two():
    sys.path.insert(0, str(FOLDER))
    try:
        import merge_two_launches

        yield merge_two_launches
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(two, case, device):
    lengths, valid, width, dtype, tied, norm = case
    x, f, g = (draw(3, sum(lengths), width, seed=i, dtype=dtype).to(device) for i in (1, 2, 3))
    gains = [draw(width, seed=4 + i).to(device) for i in range(2 if tied else 3)]
    counts = None if valid is None else torch.tensor(valid, device=device)
    leaves = [t.double().requires_grad_() for t in (x, f, *gains)]
    beta, alpha, leak = (*leaves[2:], None)[:3]
    with forced_backend("reference"):
        y = split_merge(*leaves[:2], beta, alpha, leak, Segments(lengths, counts), 1e-5, norm)
    truth = [y.detach(), *torch.autograd.grad(y, leaves, g.double())]

    tensors = (*gains, None)[:3]
    settings = (*tensors, [0.0] * 3, tied, counts, list(lengths))
    y, *found = two.forward(x, f, *settings, 1e-5, norm)
    grads = two.backward(g, y if norm else None, f, *found, *settings)
    values = [y, *grads[: len(leaves)]]
    for value, expected in zip(values, truth, strict=True):
        error = (value.double() - expected).norm() / expected.norm().clamp(min=1)
        assert float(error.nan_to_num(nan=float("inf"))) < tolerance(dtype)
