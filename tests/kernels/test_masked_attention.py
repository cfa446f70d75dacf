"""Ways to leave padding out of attention; the libraries' part is plain fp64 PyTorch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvsplit.kernels import Segments
from mvsplit.kernels import masked_attention as masked
from mvsplit.kernels.attention import AGREEMENT
from mvsplit.kernels.masked_attention import in_sequences, off_by, with_unit_heads, with_zero_keys

BATCH, HEADS, IMAGE, TEXT, HEAD = 3, 2, 5, 4, 8
VALID = torch.tensor([2, 4, 0])
SEGMENTS = Segments.image_and_text(IMAGE, TEXT, VALID)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output; rows of padding are zero."""
    generator = torch.Generator().manual_seed(seed)
    size = (BATCH, IMAGE + TEXT, HEADS, HEAD)
    found = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4)]
    real = SEGMENTS.mask[..., None, None]  # type: ignore[index]
    return [(t * real).to(dtype).transpose(1, 2) for t in found]


def truth(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Sample by sample over its real tokens; zero elsewhere."""
    rows = []
    for b, text in enumerate(VALID.tolist()):
        n = IMAGE + text
        weights = torch.softmax(q[b, :, :n] @ k[b, :, :n].mT / HEAD**0.5, -1)
        empty = q.new_zeros(HEADS, TEXT - text, HEAD)
        rows.append(torch.cat((weights @ v[b, :, :n], empty), 1))
    return torch.stack(rows)


def with_gradients(way: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """Output and gradients of q, k and v, real rows only."""
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    out = way(*leaves, SEGMENTS)
    grads = torch.autograd.grad(out, leaves, given[3].to(out))
    return [t.transpose(1, 2)[SEGMENTS.mask].double() for t in (out.detach(), *grads)]


class Libraries:
    """The operators beneath `scaled_dot_product_attention`, as they are documented, in fp64."""

    def _flash_attention_forward(self, q, k, v, starts, _, longest, *rest):
        assert int((starts[1:] - starts[:-1]).max()) <= longest
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            scores = torch.einsum("qhk,shk->hqs", q[a:b], k[a:b]) / HEAD**0.5
            lse[a:b] = torch.logsumexp(scores, -1).T
            out[a:b] = torch.einsum("hqs,shk->qhk", torch.softmax(scores, -1), v[a:b])
        return out, lse, torch.zeros(2), torch.zeros(0), None

    def _flash_attention_backward(self, grad, q, k, v, out, lse, starts, *_):
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            parts = [t[a:b].transpose(0, 1) for t in (grad, q, k, v, out)]
            for target, part in zip(grads, flash_backward(*parts, lse[a:b].T), strict=True):
                target[a:b] = part.transpose(0, 1)
        return tuple(grads)

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, keep, *_):
        scores = q.double() @ k.double().mT / HEAD**0.5
        out = (torch.softmax(scores, -1) @ v.double()).to(q)
        lse = torch.logsumexp(scores, -1, keepdim=True).float()
        return out, lse, None, None, 0, 0, torch.tensor([1]), torch.tensor([2]), None

    def _scaled_dot_product_cudnn_attention_backward(self, grad, q, k, v, out, lse, *_):
        return flash_backward(grad, q, k, v, out, lse[..., 0])


def flash_backward(grad, q, k, v, out, lse):
    """Gradients from the output and the log-sum-exp that were kept, as flash attention has them."""
    p = torch.exp(q @ k.mT / HEAD**0.5 - lse[..., None])
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / HEAD**0.5
    return ds @ k, ds.mT @ q, p.mT @ grad


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "_aten", Libraries())
    monkeypatch.setattr(masked, "_require_half", lambda q: None)  # these are exact
    monkeypatch.setattr(masked, "_require_narrow", lambda q: None)


def test_sequences_are_attention_over_the_real_tokens() -> None:
    given = draw(0)
    found = with_gradients(in_sequences, given)
    for value, wanted in zip(found, with_gradients(truth, given), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_not_even_nan_passes_from_one_sequence_to_the_next() -> None:
    given = draw(1)
    padding = ~SEGMENTS.mask[:, None, :, None].expand_as(given[0])  # type: ignore[index]
    spoilt = [t.masked_fill(padding, torch.nan) for t in given[:3]]
    found = with_gradients(in_sequences, [*spoilt, given[3]])
    for value, wanted in zip(found, with_gradients(truth, given), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_zero_keys_are_left_out_of_output_and_gradients() -> None:
    """The kernel is fp32: what it corrects is right to its rounding."""
    pytest.importorskip("triton")
    given = [t.float() for t in draw(2)]
    found = with_gradients(with_zero_keys, given)
    wanted = with_gradients(truth, [t.double() for t in given])
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
    naive = with_gradients(lambda q, k, v, s: torch.softmax(q @ k.mT / HEAD**0.5, -1) @ v, given)
    assert (naive[0] - wanted[0]).abs().max() > 0.1  # zero keys do take part if they are let


@pytest.mark.parametrize("away", [4.0, 6.0, 8.0])
def test_real_keys_that_are_next_to_nothing_are_not_lost(away: float) -> None:
    """Z − m has no digit left in fp32; such rows are computed anew."""
    pytest.importorskip("triton")
    q, k, v, grad = draw(4)
    real = SEGMENTS.mask[:, None, :, None]  # type: ignore[index]
    given = [((q / 4 + away / HEAD**0.25) * real), ((k / 4 - away / HEAD**0.25) * real), v, grad]
    given = [t.float() for t in given]
    found = with_gradients(with_zero_keys, given)
    wanted = with_gradients(truth, [t.double() for t in given])
    for value, right in zip(found, wanted, strict=True):
        error = (value - right).norm() / right.norm()
        assert error < 2e-4, float(error)


def test_every_tile_of_unit_heads_may_serve() -> None:
    pytest.importorskip("triton")
    from mvsplit.kernels import attention
    from mvsplit.kernels.fused.unit_attention import TILES

    assert set(attention._UNIT_HEADS) == {f"unit heads, {tile}" for tile in TILES}
    unit = set(attention._UNIT_HEADS | attention._IN_CUDA)
    assert unit < set(attention.ways(SEGMENTS, True))
    assert not unit & set(attention.ways(SEGMENTS, False))


@pytest.mark.parametrize("masked", [True, False])
def test_unit_heads_need_no_maximum(masked: bool) -> None:
    """The kernel is fp32; heads in the packed projection, as a block has them."""
    pytest.importorskip("triton")
    q, k, v, grad = (t.float() for t in draw(8))
    packed = torch.cat([t.transpose(1, 2).flatten(-2) for t in (q, k, v)], -1)
    heads = packed.unflatten(-1, (3 * HEADS, HEAD)).transpose(1, 2).split(HEADS, 1)
    if masked:
        found = with_gradients(with_unit_heads, [*heads, grad])
        wanted = with_gradients(truth, [t.double() for t in (q, k, v, grad)])
    else:
        whole = Segments((IMAGE, TEXT))
        found = with_gradients(lambda *t: with_unit_heads(*t[:3], whole), [*heads, grad])
        plain = [t.double() for t in (q, k, v, grad)]
        wanted = with_gradients(
            lambda q, k, v, _: torch.softmax(q @ k.mT / HEAD**0.5, -1) @ v, plain
        )
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_at_their_bound_need_no_maximum(sign: int, device: str) -> None:
    """Heads of 128 that all point the same way, or away from it: every score is ±√128, and among
    them are keys of the other sign, e^22.6 times as heavy or as light."""
    pytest.importorskip("triton")
    from mvsplit.kernels.fused.unit_attention import TILES, unit_attention

    head, total = 128, 70
    chance = torch.Generator().manual_seed(1)
    one = torch.randn(head, generator=chance)
    one /= one.square().mean().sqrt()
    q = one.expand(1, 2, total, head)
    k = (sign * q).clone()
    k[:, :, ::7] *= -1
    v = torch.randn(q.shape, generator=chance)
    mask = torch.arange(total)[None] < 61
    dtype, off = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 8e-3)
    q, k, v = (t.to(device, dtype).contiguous() for t in (q, k, v))
    mask = mask.to(device)
    scores = (q.double() @ k.double().mT / head**0.5).masked_fill(~mask[:, None, None], -torch.inf)
    for tile in TILES.values():
        out, lse = unit_attention(q, k, v, mask, tile)
        wanted = torch.softmax(scores, -1) @ v.double()
        assert (out.double() - wanted).norm() < off * wanted.norm()
        torch.testing.assert_close(lse[..., 0].double(), scores.logsumexp(-1), rtol=1e-5, atol=0)


def test_unit_heads_refuse_what_their_exponentials_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    for dtype, head in ((torch.float16, 128), (torch.bfloat16, 256)):
        q = torch.zeros(1, 1, 4, head, dtype=dtype)
        with pytest.raises(RuntimeError, match="it takes bf16 and heads up to 128"):
            with_unit_heads(q, q, q, Segments((3, 1)))


def test_a_sample_without_a_real_token_stays_finite() -> None:
    pytest.importorskip("triton")
    q, k, v, _ = (t.float() for t in draw(9))
    mask = SEGMENTS.mask.clone()  # type: ignore[union-attr]
    mask[0] = False
    out, lse = masked_unit(q, k, v, mask)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def masked_unit(*given: Any) -> tuple[Tensor, Tensor]:
    from mvsplit.kernels.fused.unit_attention import TILES, unit_attention

    return unit_attention(*given, TILES["128 queries"])


def half(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Right but for what rounding to half precision does."""
    return truth(*(t + (t.bfloat16() - t).detach() for t in (q, k, v)))


@pytest.mark.parametrize("way", [in_sequences, with_zero_keys, with_unit_heads])
@pytest.mark.parametrize("learns", [False, True])
def test_ways_that_are_right_pass_the_check(way: Callable[..., Tensor], learns: bool) -> None:
    pytest.importorskip("triton")
    q, k, v, _ = draw(7, torch.float32)
    assert off_by(way, q.requires_grad_(learns), k, v, SEGMENTS, half) < 0.1  # these are fp32


def corrected_twice(rows: int) -> Callable[..., Tensor]:
    """Zero keys are left out twice of the output of the first rows of a sample that has any, as by
    threads that take in what others have stored."""

    def way(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        out = truth(q, k, v)
        m = (~SEGMENTS.mask).sum(1).view(-1, 1, 1)  # type: ignore[operator]
        z = (q @ k.mT / HEAD**0.5).exp().sum(-1)
        factor = torch.ones_like(z)
        factor[:1, :, :rows] = (z / (z - m))[:1, :, :rows].detach()
        return out * factor[..., None]

    return way


@pytest.mark.parametrize("rows", [1, 4])
def test_a_few_rows_that_are_wrong_are_found(rows: int) -> None:
    q, k, v, _ = draw(7, torch.float32)
    assert off_by(corrected_twice(rows), q.requires_grad_(), k, v, SEGMENTS, half) > AGREEMENT


def wrong_ways() -> dict[str, Callable[..., Tensor]]:
    def padding_is_a_key(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return torch.softmax(q @ k.mT / HEAD**0.5, -1) @ v

    def gradients_of_queries_are_halved(q: Tensor, *others: Any) -> Tensor:
        return truth((q + q.detach()) / 2, *others)

    def not_finite(*inputs: Any) -> Tensor:
        return truth(*inputs) + torch.nan

    return {
        way.__name__: way for way in (padding_is_a_key, gradients_of_queries_are_halved, not_finite)
    }


@pytest.mark.parametrize("way", wrong_ways().values(), ids=wrong_ways().keys())
def test_ways_that_are_wrong_do_not(way: Callable[..., Tensor]) -> None:
    q, k, v, _ = draw(7, torch.float32)
    assert off_by(way, q.requires_grad_(), k, v, SEGMENTS, half) > AGREEMENT


def test_the_check_reaches_the_rows_that_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from mvsplit.kernels.fused import zero_keys

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **sizes: None

    monkeypatch.setattr(zero_keys, "lost_rows_kernel", Nothing())
    q, k, v, _ = draw(7, torch.float32)
    assert off_by(with_zero_keys, q, k, v, SEGMENTS, half) > AGREEMENT


def test_sequences_want_the_real_tokens_first() -> None:
    q, k, v, _ = draw(3)
    elsewhere = Segments((IMAGE, TEXT), torch.tensor([[3, 4]] * BATCH))
    with pytest.raises(RuntimeError, match="a segment before the last may have padding"):
        in_sequences(q, k, v, elsewhere)
    with pytest.raises(RuntimeError, match="fewer key heads"):
        in_sequences(q, k[:, :1], v[:, :1], SEGMENTS)


def test_bounds_and_padding_count_the_tokens() -> None:
    assert SEGMENTS.sequence_bounds().tolist() == [0, 7, 9, 18, 18, 23, 27]  # type: ignore[union-attr]
    assert SEGMENTS.padding().tolist() == [2, 0, 4]  # type: ignore[union-attr]
    assert Segments((3, 2)).sequence_bounds() is None
    assert SEGMENTS.first_tokens().tolist() == [7, 9, 5]  # type: ignore[union-attr]
    assert Segments((3, 2)).first_tokens() is None
    assert Segments((3, 2)).padding() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", [in_sequences, with_zero_keys, with_unit_heads])
def test_what_a_library_does_not_take_is_refused(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's operator reads fp32 as half precision, and says nothing."""
    segments = Segments.image_and_text(IMAGE, TEXT, VALID.cuda())
    q, k, v, _ = (t.float().cuda() for t in draw(5))
    with pytest.raises(RuntimeError, match="does not take"):  # it is `takes` that is asked
        way(q, k, v, segments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_is_chosen_is_right(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvsplit.kernels.attention import attend

    monkeypatch.setattr(masked, "_aten", torch.ops.aten)
    given = draw(6, dtype)
    segments = Segments.image_and_text(IMAGE, TEXT, VALID.cuda())
    leaves = [t.detach().cuda().requires_grad_() for t in given[:3]]
    out = attend(*leaves, segments, zero_padding=True)
    found = [out.detach(), *torch.autograd.grad(out, leaves, given[3].cuda())]
    wanted = with_gradients(truth, [t.double() for t in given])
    for value, right in zip(found, wanted, strict=True):
        real = value.cpu().double().transpose(1, 2)[SEGMENTS.mask]
        assert (real - right).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * right.norm()
