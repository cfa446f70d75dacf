"""The product with SwiGLU's backward in it against fp64, and how one of the two ways is chosen."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.fused import draw, tolerance

pytest.importorskip("triton")
from mvsplit.kernels import reference
from mvsplit.kernels.fused import swiglu_product
from mvsplit.kernels.fused.swiglu_product import TILES, Tile, fused, separate

pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = Tile(16, 32, 16, 4, 2)
CASES = [  # rows, D, F, tile, dtype; the interpreter multiplies no bf16
    ((2, 19), 32, 64, SMALL, torch.float16),
    ((16,), 48, 32, SMALL, torch.float16),
    ((1, 1), 16, 96, SMALL, torch.float16),
    *(
        pytest.param((13, 320), 1024, 3072, tile, torch.bfloat16, marks=on_gpu, id=tile.name)
        for tile in TILES
    ),
]


def inputs(rows, width, hidden, dtype, device):
    grad = draw(*rows, width, seed=1, dtype=dtype)
    w2 = draw(width, hidden, seed=2, dtype=dtype) * width**-0.5
    packed = draw(*rows, 2 * hidden, seed=3, dtype=dtype)
    return tuple(t.to(dtype).to(device) for t in (grad, w2, packed))


def truth(grad, w2, packed):
    """By autograd in fp64."""
    grad, w2, packed = (t.double().cpu() for t in (grad, w2, packed))
    packed.requires_grad_()
    hidden = reference.swiglu(packed)
    (dpacked,) = torch.autograd.grad(hidden, packed, grad @ w2)
    return dpacked, hidden.detach()


def distance(found, wanted):
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("rows", "width", "hidden", "tile", "dtype"), CASES)
def test_both_results(rows, width, hidden, tile, dtype, device):
    if device == "cpu" and tile is not SMALL:
        pytest.skip("too large for the interpreter")
    given = inputs(rows, width, hidden, dtype, device)
    for found, wanted in zip(fused(*given, tile), truth(*given), strict=True):
        assert found.shape == wanted.shape
        assert distance(found, wanted) < tolerance(dtype)


def test_the_separate_way_is_the_same(device):
    given = inputs((3, 7), 32, 64, torch.bfloat16, device)
    for found, wanted in zip(separate(*given), truth(*given), strict=True):
        assert distance(found, wanted) < tolerance(torch.bfloat16)


def wrong(grad, w2, packed):
    return tuple(torch.full_like(t, float("nan")) for t in separate(grad, w2, packed))


def test_the_fastest_that_is_right_serves_and_is_remembered(device, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    given = inputs((5, 8), 32, 64, torch.float16, device)
    times = {"separate": 3.0, "slow": 4.0, "fast": 2.0, "wrong": 1.0}
    found = {"slow": partial(fused, tile=SMALL), "fast": partial(fused, tile=SMALL), "wrong": wrong}
    timed = []

    def time(way, inputs):
        timed.append(next((name for name, known in found.items() if known is way), "separate"))
        return times[timed[-1]]

    monkeypatch.setattr(swiglu_product, "_time", time)
    assert swiglu_product._choose(*given, found) == "fast"
    assert timed == ["separate", "slow", "fast"]
    assert "wrong is off by inf" in caplog.text
    assert swiglu_product._choose(*given, found) == "fast"
    assert len(timed) == 3  # the second time from the file
    assert swiglu_product._choose(*given, {"slow": found["slow"]}) == "separate"


def test_a_cpu_keeps_the_separate_way(device):
    grad, w2, packed = inputs((2, 3), 32, 64, torch.bfloat16, "cpu")
    assert swiglu_product._way(grad, w2, packed) is separate
