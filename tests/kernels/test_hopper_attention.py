"""Attention in CUDA C++: what suits it, its source, and, on a Hopper GPU, what comes out."""

import math

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper import attention
from mvsplit.kernels.hopper.attention import Heads

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ROUNDING = (
    3e-3  # of the output and of the probabilities, 1.66e-3 and 1.1e-3 in the root mean square
)


def test_what_suits_it():
    assert attention.suits(Stream(2, 256, 32), 128, torch.bfloat16)
    assert not attention.suits(Stream(2, 256, 40), 128, torch.bfloat16)  # no room for more keys
    assert not attention.suits(Stream(2, 256, 32), 64, torch.bfloat16)
    assert not attention.suits(Stream(2, 256, 32), 128, torch.float16)  # exp without a maximum


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("rows", range(32, 289, 32))
def test_what_it_loads_fits_into_shared_memory(groups, rows):
    assert attention._shared_bytes(Heads(groups), rows) <= 232_448
    text = attention.source(Heads(groups), rows, masked=True)
    columns = rows // attention._parts(Heads(groups), rows)
    assert columns <= (256 if groups < 3 else 96)
    assert columns % 16 == 0
    assert f"m64n{columns}k16.f32.bf16.bf16" in text
    assert "m64n128k16.f32.bf16.bf16" in text


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("image", "text", "counts"), [
    (256, 32, None), (256, 32, (32, 5, 0)), (250, 20, None), (64, 40, (3, 40, 1)), (1, 0, None),
])  # fmt: skip
def test_heads_are_averages_over_real_keys_and_sums_lie_beside(groups, image, text, counts):
    torch.manual_seed(0)
    stream = Stream(3, image, text)
    rows = stream.sample_rows
    qkv = torch.randn(3 * rows, (4 + 2 * 2) * 128, device="cuda")
    qkv = qkv.unflatten(-1, (-1, 128))
    qkv[:, :6] *= 11.3 / qkv[:, :6].norm(dim=-1, keepdim=True)
    qkv[0, 4] = qkv[0, 0]  # as near as two rows can be
    heads = qkv.bfloat16().flatten(1).view(3, rows, 8, 128).transpose(1, 2)
    q, k, v = heads.split((4, 2, 2), 1)
    x, sums = torch.randn(3 * rows, 64, device="cuda").bfloat16(), torch.full((3, 2, 64), torch.nan)
    sums, out = sums.cuda(), torch.full((3 * rows, 512), torch.nan, device="cuda").bfloat16()
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32, device="cuda")
    attention.attention(q, k, v, out, valid, x, sums, stream, Heads(groups))

    mask = stream.segments(valid, q.device).mask
    real = torch.ones(3, rows, dtype=torch.bool, device="cuda") if mask is None else mask
    k, v = (t.double().repeat_interleave(2, 1) for t in (k, v))
    scores = q.double() @ k.mT / math.sqrt(128)
    weights = torch.where(real[:, None, None], scores, -torch.inf).softmax(-1)
    truth = (weights @ v).transpose(1, 2).reshape(3 * rows, 512)
    assert out.isfinite().all()
    assert (out.double() - truth).norm() / truth.norm() < ROUNDING
    kept = torch.where(real.flatten()[:, None], x.double(), 0).view(3, rows, 64)
    at = stream.image_rows
    expected = torch.stack((kept[:, :at].sum(1), kept[:, at:].sum(1)), 1)
    assert (sums.double() - expected).abs().max() < 1e-4
