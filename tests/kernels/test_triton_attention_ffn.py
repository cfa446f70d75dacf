"""RoPE with QK-norm, and SwiGLU: the fused ops against the fp64 reference."""

import pytest
import torch

from mvsplit.kernels import qk_norm_rope, swiglu
from tests.kernels.fused import draw, tolerance, worst_error

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEADS = [  # heads, kv_heads, half a head, tokens, dtype
    (2, 2, 8, 5, FP32),
    (3, 1, 5, 1, FP32),
    (6, 2, 16, 7, BF16),
    (4, 4, 12, 9, FP16),
    pytest.param((8, 8, 64, 320, BF16), marks=on_gpu),
    pytest.param((8, 2, 64, 77, FP32), marks=on_gpu),
    pytest.param((12, 3, 48, 301, BF16), marks=on_gpu),
]
PACKED = [  # shape of the packed projection, dtype
    ((3, 5, 14), FP32),
    ((7, 2), FP32),
    ((2, 3, 200), BF16),
    ((1, 2, 2600), FP16),
    pytest.param((4, 320, 6144), BF16, marks=on_gpu),
    pytest.param((2, 77, 5462), FP32, marks=on_gpu),
]


def rotation(tokens, half):
    """Tables whose last token is text: unrotated."""
    angles = draw(tokens, half, seed=7).double()
    angles[-1] = 0
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_qk_norm_rope(case, device):
    heads, kv_heads, half, tokens, dtype = case
    cos, sin = rotation(tokens, half)
    packed = (heads + 2 * kv_heads) * 2 * half
    counts = (heads, kv_heads, kv_heads)
    upstream = [draw(2, n, tokens, 2 * half, seed=i, dtype=dtype) for i, n in enumerate(counts)]

    def op(qkv):
        tables = (t.to(qkv.device) for t in (cos, sin))
        return qk_norm_rope(qkv, *tables, heads, kv_heads, 1e-6)

    qkv = draw(2, tokens, packed, seed=5, dtype=dtype)
    assert worst_error(op, [qkv], upstream, device) < tolerance(dtype)


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_qk_norm_rope_in_place(case, device):
    """What the other kernel writes, where the projection was; the rest of a larger tensor stays as
    it is. A GPU may fuse other multiply-adds: the last bit of a few may differ."""
    from mvsplit.kernels.fused.qk_norm_rope import _forward_op, qk_norm_rope_

    heads, kv_heads, half, tokens, dtype = case
    tables = [t.to(device) for t in rotation(tokens, half)]
    packed = (heads + 2 * kv_heads) * 2 * half
    whole = draw(2, tokens, packed + 8, seed=5, dtype=dtype).to(device)
    wanted = _forward_op(whole[..., :packed], *tables, heads, kv_heads, 1e-6)
    beside = whole[..., packed:].clone()
    qkv = whole[..., :packed]
    found = qk_norm_rope_(qkv, *tables, heads, kv_heads, 1e-6)
    for mine, other in zip(found, wanted, strict=True):
        last_bit = torch.finfo(mine.dtype).eps  # 1/RMS is fp32, a sum over a head in another order
        torch.testing.assert_close(mine, other, rtol=4 * last_bit if mine is found[3] else last_bit,
                                   atol=last_bit / 64)  # fmt: skip
    assert torch.equal(found[2], wanted[2])
    assert all(t.untyped_storage().data_ptr() == whole.data_ptr() for t in found[:3])
    assert torch.equal(whole[..., packed:], beside)


def test_in_place_wants_a_dense_axis(device):
    from mvsplit.kernels.fused.qk_norm_rope import qk_norm_rope_

    cos, sin = (t.to(device) for t in rotation(3, 4))
    qkv = draw(1, 3, 48, seed=1).to(device)[..., ::2]
    with pytest.raises(ValueError, match="dense"):
        qk_norm_rope_(qkv, cos, sin, 1, 1, 1e-6)


def test_qk_norm_rope_of_a_slice_with_token_major_gradients(device):
    """A projection that also holds other columns; gradients in the layout attention returns."""
    cos, sin = rotation(6, 8)
    upstream = [draw(2, 6, 2, 16, seed=i).transpose(1, 2) for i in range(3)]

    def op(packed):
        tables = (t.to(packed.device) for t in (cos, sin))
        return qk_norm_rope(packed[:, :, 3:99], *tables, 2, 2)

    assert worst_error(op, [draw(2, 6, 101, seed=5)], upstream, device) < tolerance(FP32)


def test_values_alone_carry_a_gradient(device):
    """As when queries and keys are detached: the missing gradients count as zero."""
    cos, sin = rotation(3, 4)

    def op(qkv):
        return qk_norm_rope(qkv, cos.to(qkv.device), sin.to(qkv.device), 1, 1)[2]

    upstream = [draw(1, 1, 3, 8, seed=2)]
    assert worst_error(op, [draw(1, 3, 24, seed=1)], upstream, device) < tolerance(FP32)


@pytest.mark.parametrize(("shape", "dtype"), PACKED)
def test_swiglu(shape, dtype, device):
    packed = draw(*shape, seed=1, dtype=dtype) * 3
    upstream = [draw(*shape[:-1], shape[-1] // 2, seed=2, dtype=dtype)]
    assert worst_error(swiglu, [packed], upstream, device) < tolerance(dtype)


def test_swiglu_of_a_slice_and_far_from_zero(device):
    def op(packed):
        return swiglu(packed[:, 1:, 2:14])

    packed = draw(2, 4, 20, seed=1) * 60  # silu's exponential overflows to its limits
    assert worst_error(op, [packed], [draw(2, 3, 6, seed=2)], device) < tolerance(FP32)


def test_registered_ops(device):
    from mvsplit.kernels.fused import qk_norm_rope as rope
    from mvsplit.kernels.fused import swiglu as glu

    qkv = draw(2, 3, 32, seed=1).to(device).requires_grad_()
    cos, sin = (t.to(device) for t in rotation(3, 4))
    torch.library.opcheck(rope._forward_op, (qkv, cos, sin, 2, 1, 1e-6))
    torch.library.opcheck(rope._in_place_op, (qkv.detach().clone(), cos, sin, 2, 1, 1e-6))
    q, k, v, r = (t.detach() for t in rope._forward_op(qkv, cos, sin, 2, 1, 1e-6))
    torch.library.opcheck(rope._backward_op, (q, k, v, q, k, r, cos, sin))
    packed = draw(2, 3, 10, seed=2).to(device).requires_grad_()
    torch.library.opcheck(glu._forward_op, (packed,))
    grad = draw(2, 3, 5, seed=3).to(device)
    for again in (False, True):
        torch.library.opcheck(glu._backward_op, (grad, packed.detach(), again))
