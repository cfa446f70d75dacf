"""The products in CUDA C++: which weight rows a tile holds, and, on a Hopper GPU, what comes out.

What can be checked without the device are the addresses that the bulk copies read, the rotation's
table, what suits which shape, and the binaries kept on disk.
"""

import itertools
import re

import pytest
import torch

from tests.oracles import complex_rotation, normalise, split_merge

pytest.importorskip("triton")

from mvsplit.kernels import Gains
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper import driver, product
from mvsplit.kernels.hopper.product import PART, QKV, SWIGLU, WRITE, Cut
from mvsplit.models.rope import rope_tables

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
WHOLE = Cut(288, 2, 2, 4)
ROUNDING = 2.5e-3  # ‖bf16(y) − y‖/‖y‖ is 1.66e-3 for normal y; inputs are exact


class Maps:
    """A driver that makes no tensor map and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def cuTensorMapEncodeTiled(self, at, dtype, rank, address, sizes, strides, box, *rest):
        self.asked.append((list(sizes), [2, *list(strides)[: rank - 1]], list(box)))
        return 0

    def cuCtxGetCurrent(self, to):
        to._obj.value = 1
        return 0

    def rows(self, place, pitch):
        """The rows of a matrix that the last map's box at `place` copies, in order."""
        sizes, strides, box = self.asked[-1]
        found = []
        for at in itertools.product(*(range(n) for n in reversed(box[1:]))):
            index = [p + i for p, i in zip(place[1:], reversed(at), strict=True)]
            assert all(i < n for i, n in zip(index, sizes[1:], strict=True))
            found.append(sum(i * s for i, s in zip(index, strides[1:], strict=True)) / pitch)
        return found


@pytest.fixture
def maps(monkeypatch):
    fake = Maps()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    return fake


def test_a_tile_of_swiglu_holds_eight_gates_then_their_eight_values(maps):
    weight = torch.empty(2 * 96, 64, dtype=torch.bfloat16)
    product._weight_map(weight, Cut(144, 1, 3, 4), SWIGLU)
    held = maps.rows([0, 0, 0, 0], pitch=128)
    gates = [8 * g + r for g in range(12) for r in range(8)]
    expected = [n for g in range(12) for n in (gates[8 * g : 8 * g + 8], gates[8 * g : 8 * g + 8])]
    assert held == [
        r + 96 * (i % 2) for i, group in enumerate(expected) for r in group
    ]  # values lie 96 rows below their gates


def test_a_tile_of_heads_holds_the_two_halves_that_a_rotation_combines(maps):
    weight = torch.empty(5 * 128, 64, dtype=torch.bfloat16)
    product._weight_map(weight, WHOLE, QKV)
    held = maps.rows([0, 0, 0, 0, 3], pitch=128)  # the fourth head
    assert sorted(held) == list(range(3 * 128, 4 * 128))
    for i in range(0, 128, 16):
        assert held[i : i + 8] == list(range(384 + i // 2, 384 + i // 2 + 8))
        assert held[i + 8 : i + 16] == [row + 64 for row in held[i : i + 8]]


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (3, 20), (20, 3)])
def test_the_rotations_table_has_each_row_and_column_of_the_image_once(rows, columns):
    cos, sin = rope_tables(rows, columns, 4, 128, 10000.0, torch.device("cpu"))
    table, side = product.rotation(cos, sin, rows * columns, columns)
    assert side == columns
    assert len(table) >= max(-(-rows * columns // 32) * 32 / columns, columns)
    for token in range(rows * columns):
        place = torch.tensor([token // columns] * 32 + [token % columns] * 32)
        turns = table[place, torch.arange(64)]
        assert torch.equal(turns, torch.stack((cos[token], sin[token]), -1))


def test_the_source_has_a_register_for_every_token_of_a_thread():
    text = product.source(Cut(96, 1, 2, 4), SWIGLU, 3000, 0, torch.float16)
    assert "m64n96k16.f32.f16.f16" in text  # and nothing else
    assert len(set(re.findall(r'"\+f"\(d\[(\d+)\]\)', text))) == 48
    assert "#define KS 47\n" in text  # the last step is filled with zeros


@pytest.mark.parametrize(
    ("cut", "kind", "stream", "shape", "fits"),
    [
        (WHOLE, WRITE, Stream(2, 256, 32), (1024, 3072), True),
        (WHOLE, WRITE, Stream(2, 250, 32), (1024, 3072), False),  # image tokens are padded
        (WHOLE, WRITE, Stream(2, 256, 40), (1024, 3072), False),  # a sample is no tile
        (WHOLE, WRITE, Stream(17, 256, 32), (1024, 3072), False),  # more blocks than processors
        (Cut(288, 2, 2, 5), WRITE, Stream(2, 256, 32), (1024, 3072), False),  # shared memory
        (Cut(144, 1, 2, 4, 4), PART, Stream(2, 256, 32), (1024, 3072), True),
        (Cut(144, 1, 2, 4, 5), PART, Stream(2, 256, 32), (1024, 3072), False),  # 9.6 steps
        (Cut(192, 1, 2, 4, 4), PART, Stream(2, 256, 32), (1024, 3072), False),  # across samples
        (Cut(144, 1, 2, 4), QKV, Stream(2, 256, 32), (3072, 1024), True),
        (Cut(192, 1, 2, 4), QKV, Stream(2, 256, 32), (3072, 1024), False),  # across samples
        (Cut(192, 1, 3, 4), SWIGLU, Stream(2, 256, 32), (6144, 1024), True),
        (Cut(192, 1, 3, 4), SWIGLU, Stream(2, 256, 32), (6272, 1024), False),  # 32⅔ tiles
    ],
)
def test_what_suits_a_shape(monkeypatch, cut, kind, stream, shape, fits):
    class Device:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    assert product.suits(cut, kind, stream, torch.empty(shape, device="meta")) == fits


def test_a_binary_is_made_once_for_each_source_and_kept(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(driver, "_compile", lambda source: made.append(source) or source.encode())
    folder = tmp_path / "deep" / "cuda"
    assert [driver.compiled(s, folder) for s in ("a", "b", "a")] == [b"a", b"b", b"a"]
    assert made == ["a", "b"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert driver.compiled("c", blocked / "cuda") == b"c"  # a cache that cannot be written


# On the device


def exact(*shape, seed):
    """Values of order one that bf16 holds."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


def relative(actual, truth):
    assert actual.isfinite().all()
    return ((actual.double() - truth).norm() / truth.norm()).item()


class OnDevice:
    """Two samples of 256 + 32 tokens, their truths in fp64."""

    counts = (32, 5)

    def __init__(self, depth, columns):
        self.stream = Stream(2, 256, 32)
        self.a, self.w = exact(576, depth, seed=1), exact(columns, depth, seed=2) / 16
        self.out = torch.full((576, columns), torch.nan, device="cuda", dtype=torch.bfloat16)
        self.f = self.a.double() @ self.w.double().T
        self.valid = torch.tensor(self.counts, dtype=torch.int32, device="cuda")
        position = torch.arange(576, device="cuda") % 288
        count = self.valid.repeat_interleave(288)
        self.real = (position < 256) | (position - 256 < count)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
class TestOnHopper:
    @pytest.mark.parametrize("side", [16, 4, 64])
    @pytest.mark.parametrize("cut", [Cut(144, 1, 2, 5), WHOLE])
    def test_heads_are_rotated_and_normalised(self, cut, side):
        case = OnDevice(256, 6 * 128)
        cos, sin = rope_tables(256 // side, side, 32, 128, 10000.0, case.a.device)
        turn = product.rotation(cos, sin, 256, side)
        product.qkv(case.a, case.w, turn, case.out, case.stream, 2, 2, 1e-6, cut)
        heads = case.f.view(2, 288, 6, 128)
        angle = torch.atan2(sin.double(), cos.double())
        turned = complex_rotation(heads[:, :, :4], angle[:, None])
        truth = torch.cat((normalise(turned, 1e-6), heads[:, :, 4:]), 2).view(576, -1)
        assert relative(case.out, truth) < ROUNDING

    @pytest.mark.parametrize("cut", [Cut(144, 1, 3, 4), WHOLE])
    def test_swiglu_and_the_sums_beside_it(self, cut):
        case = OnDevice(128, 2 * 768)
        out = case.out[:, :768].contiguous()
        sums = torch.full((2, 2, 128), torch.nan, device="cuda")
        product.swiglu(case.a, case.w, out, sums, case.valid, case.stream, cut)
        gate, value = case.f.chunk(2, 1)
        assert relative(out, gate / (1 + (-gate).exp()) * value) < ROUNDING
        real = torch.where(case.real[:, None], case.a.double(), 0).view(2, 288, -1)
        truth = torch.stack((real[:, :256].sum(1), real[:, 256:].sum(1)), 1)
        assert relative(sums, truth) < 1e-6

    @pytest.mark.parametrize("cut", [Cut(144, 1, 2, 4, 3), Cut(96, 1, 1, 4, 2), Cut(288, 2, 1, 4)])
    def test_parts_along_k_add_up_and_so_do_their_sums(self, cut):
        case = OnDevice(384, 768)
        out, partial = product.part_buffers(case.stream, 768, cut, case.a.device)
        product.part(case.a, case.w, out, partial, case.valid, case.stream, cut)
        assert relative(out.sum(0), case.f) < 1e-6
        real = torch.where(case.real[:, None], case.f, 0).view(2, 288, -1)
        truth = torch.stack((real[:, :256].sum(1), real[:, 256:].sum(1)), 1)
        assert relative(partial.sum((0, 2)), truth) < 1e-5

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("cut", [WHOLE])
    def test_a_writer_with_its_merge_again_and_again(self, cut, masked):
        case, x = OnDevice(192, 1024), exact(576, 1024, seed=3)
        x = torch.where(case.real[:, None], x, 0) if masked else x
        beta, alpha, leak = exact(1024, seed=4), exact(1, seed=5), 0.25
        place = product.meeting(case.stream, 1024, x.device)
        truth = split_merge(
            x.double().view(2, 288, -1).cpu(), case.f.view(2, 288, -1).cpu(),
            beta.double().cpu(), alpha.double().cpu(), leak, (256, 32),
            [(256, n) for n in case.counts] if masked else None,
        ).view(576, -1).cuda()  # fmt: skip
        for _ in range(3):  # the count of those who met goes on from launch to launch
            y = x.clone()
            product.write(
                case.a, case.w, y, y, Gains(beta, alpha, leak),
                case.valid if masked else None, case.stream, 1e-5, place, cut,
            )  # fmt: skip
            assert relative(y, truth) < ROUNDING
            if masked:
                assert (y[~case.real] == 0).all()
