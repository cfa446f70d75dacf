"""The kernels in CUDA C++, emulated on a CPU (emulation.py), against fp32 and fp64 formulas."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels import Gains
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper import attention, product
from mvsplit.kernels.hopper.attention import Heads
from mvsplit.kernels.hopper.product import Cut
from mvsplit.models.rope import rope_tables
from tests.kernels.emulation import emulation, library, needs_compiler  # noqa: F401
from tests.oracles import complex_rotation, normalise, split_merge

pytestmark = needs_compiler

ROOT = Path(__file__).parents[2]
ROUNDING = 1.75e-3  # ‖bf16(y) − y‖/‖y‖ is 1.66e-3 for normal y; inputs are exact
COUNTS = (32, 5, 17)
STREAM = Stream(3, 256, 32)
ROWS = STREAM.rows


def exact(*shape, seed):
    """Values of order one that bf16 holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def unwritten(*shape):
    return torch.full(shape, torch.nan, dtype=torch.bfloat16)


def relative(actual, truth):
    assert actual.isfinite().all()
    return ((actual.double() - truth).norm() / truth.norm()).item()


def valid():
    return torch.tensor(COUNTS, dtype=torch.int32)


def is_real():
    position, count = torch.arange(ROWS) % 288, valid().repeat_interleave(288)
    return (position < 256) | (position - 256 < count)


def by_segment(rows):
    rows = torch.where(is_real()[:, None], rows.double(), 0).view(3, 288, -1)
    return torch.stack((rows[:, :256].sum(1), rows[:, 256:].sum(1)), 1)


@pytest.fixture(params=[132, 4], ids=["all at once", "tile after tile"])
def device(request, emulation):  # noqa: F811
    emulation.most_clusters = request.param


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("cut", "side"), [
    (Cut(288, 2, 2, 4), 16), (Cut(144, 1, 2, 4), 16), (Cut(288, 2, 2, 3), 4),
    (Cut(144, 1, 2, 4), 64),
])  # fmt: skip
def test_heads_are_turned_and_normalised(cut, side):
    a, w, out = exact(ROWS, 128, seed=1), exact(4 * 128, 128, seed=2), unwritten(ROWS, 512)
    cos, sin = rope_tables(256 // side, side, 32, 128, 10000.0, a.device)
    turn = product.rotation(cos, sin, 256, side)
    product.qkv(a, w, turn, out, STREAM, 2, 1, 1e-6, cut)
    heads = (a.double() @ w.double().T).view(3, 288, 4, 128)
    angle = torch.atan2(sin.double(), cos.double())[:, None]
    turned = normalise(complex_rotation(heads[:, :, :3], angle), 1e-6)
    assert relative(out, torch.cat((turned, heads[:, :, 3:]), 2).view(ROWS, 512)) < ROUNDING


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cut", [
    Cut(288, 2, 2, 4), Cut(192, 1, 3, 4), Cut(144, 1, 3, 2),
])  # fmt: skip
def test_swiglu_and_the_sums_beside_it(cut):
    a, w, out = exact(ROWS, 192, seed=1), exact(384, 192, seed=2) / 8, unwritten(ROWS, 192)
    sums = torch.full((3, 2, 192), torch.nan)
    product.swiglu(a, w, out, sums, valid(), STREAM, cut)
    gate, value = (a.double() @ w.double().T).chunk(2, 1)
    assert relative(out, gate / (1 + (-gate).exp()) * value) < ROUNDING
    assert relative(sums, by_segment(a)) < 1e-6


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cut", [
    Cut(144, 1, 2, 4, 3), Cut(96, 1, 1, 4, 2), Cut(288, 2, 1, 4),
])  # fmt: skip
def test_parts_along_k_add_up_and_so_do_their_sums(cut):
    a, w = exact(ROWS, 384, seed=1), exact(256, 384, seed=2)
    out, partial = product.part_buffers(STREAM, 256, cut, a.device)
    out.fill_(torch.nan), partial.fill_(torch.nan)
    product.part(a, w, out, partial, valid(), STREAM, cut)
    f = a.double() @ w.double().T
    assert relative(out.sum(0), f) < 1e-6
    assert relative(partial.sum((0, 2)), by_segment(f)) < 1e-5


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cut", [Cut(288, 2, 2, 4), Cut(288, 2, 2, 3)])
def test_a_writer_with_its_merge_again_and_again(cut, masked):
    a, w, x = exact(ROWS, 192, seed=1), exact(256, 192, seed=2) / 8, exact(ROWS, 256, seed=3)
    x = torch.where(is_real()[:, None], x, 0) if masked else x
    beta, alpha, leak = exact(256, seed=4), exact(1, seed=5), 0.25
    place = product.meeting(STREAM, 256, x.device)
    truth = split_merge(
        x.double().view(3, 288, -1), (a.double() @ w.double().T).view(3, 288, -1), beta.double(),
        alpha.double(), leak, (256, 32), [(256, n) for n in COUNTS] if masked else None,
    ).view(ROWS, 256)  # fmt: skip
    for _ in range(3):  # the count of those who told goes on from launch to launch
        y = x.clone()
        product.write(
            a, w, y, y, Gains(beta, alpha, leak), valid() if masked else None, STREAM, 1e-5, place,
            cut,
        )  # fmt: skip
        assert relative(y, truth) < ROUNDING
        assert not masked or (y[~is_real()] == 0).all()


def test_a_writer_whose_neighbour_never_comes_ends_with_nan_and_tells(emulation):  # noqa: F811
    emulation.missing = 1
    a, w, x = exact(ROWS, 64, seed=1), exact(256, 64, seed=2), exact(ROWS, 256, seed=3)
    place = product.meeting(STREAM, 256, x.device)
    y = x.clone()
    product.write(a, w, y, y, Gains(0.5, 0.25, 0.0), None, STREAM, 1e-5, place, Cut(288, 2, 2, 4))
    assert y[:576].isfinite().all()  # two samples are whole
    assert y[576:, :128].isnan().all()
    assert torch.equal(y[576:, 128:], x[576:, 128:])  # what its neighbour should have written


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("image", "text", "counts"), [
    (256, 32, None), (250, 20, (20, 0)), (64, 40, (3, 40)), (1, 0, None),
])  # fmt: skip
def test_heads_are_averages_over_real_keys_and_sums_lie_beside(groups, image, text, counts):
    stream = Stream(2, image, text)
    rows = stream.sample_rows
    heads = exact(2 * rows, 4, 128, seed=1)  # two of queries, one of keys and of values
    heads[:, :3] *= (11.3 / heads[:, :3].float().norm(dim=-1, keepdim=True)).bfloat16()
    heads[0, 2] = heads[0, 0]  # as near as two rows can be
    q, k, v = heads.view(2, rows, 4, 128).transpose(1, 2).split((2, 1, 1), 1)
    x, sums = exact(2 * rows, 64, seed=2), torch.full((2, 2, 64), torch.nan)
    out = unwritten(2 * rows, 256)
    given = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    attention.attention(q, k, v, out, given, x, sums, stream, Heads(groups))

    mask = stream.segments(given, x.device).mask
    real = torch.ones(2, rows, dtype=torch.bool) if mask is None else mask
    scores = torch.where(
        real[:, None, None], q.double() @ k.double().mT / math.sqrt(128), -torch.inf
    )
    truth = (scores.softmax(-1) @ v.double()).transpose(1, 2).reshape(2 * rows, 256)
    assert relative(out, truth) < 3e-3  # the probabilities are rounded too
    kept = torch.where(real.flatten()[:, None], x.double(), 0).view(2, rows, 64)
    at = stream.image_rows
    expected = torch.stack((kept[:, :at].sum(1), kept[:, at:].sum(1)), 1)
    assert (sums.double() - expected).abs().max() < 1e-4


PROBE = """
import ctypes, sys
out = (ctypes.c_int * 64)(*[-1] * 64)
place = ctypes.c_void_p(ctypes.addressof(out))
given = (ctypes.c_void_p * 1)(ctypes.addressof(place))
assert ctypes.CDLL(sys.argv[1]).run(1, 64, 16, given) == 0
assert list(out) == [0] * 32 + [1] * 32
"""


@pytest.mark.parametrize(("lanes", "same"), [(32, True), (16, False)])
def test_lanes_that_differ_in_what_is_uniform_are_found(lanes, same, shared_folder):
    base = (ROOT / "mvsplit" / "kernels" / "hopper" / "base.cu").read_text()
    body = f"{{ out[threadIdx.x] = uniform(threadIdx.x / {lanes}); }}"
    kernel = f'extern "C" __global__ void probe(int *out) {body}'
    source = f'#define TYPE "bf16"\n#define BF16 1\n{base}{kernel}'
    command = [sys.executable, "-c", PROBE, library(source, "probe", shared_folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode == 0) == same, found.stderr
    assert ("lanes differ in what is uniform" in found.stderr) != same
