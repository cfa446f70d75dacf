"""The reference ops against explicit matrices in fp64, and their backwards against gradcheck."""

import pytest
import torch
from torch.autograd import gradcheck

from mvsplit.errors import UserError
from mvsplit.kernels import Segments, qk_norm_rope, rms_norm, split_merge, swiglu
from tests import oracles

B, D = 3, 5
LAYOUTS = {
    "one": ((4,), None),
    "two": ((3, 2), None),
    "empty": ((3, 0, 1), None),
    "padded": ((3, 4), [(3, 4), (3, 2), (2, 1)]),
    "nothing real": ((2, 3), [(2, 0), (0, 3), (0, 0)]),
    "empty and padded": ((0, 1, 3), [(0, 1, 2), (0, 0, 3), (0, 1, 0)]),
}
GAINS = ["tied", "free", "none", "numbers", "numbers tied", "shared", "shared tied", "scalar"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_segments(lengths, valid):
    return Segments(lengths, None if valid is None else torch.tensor(valid))


def make_gains(kind, dtype=torch.float64):
    """(β, α, λ) as `split_merge` takes them, and the learned ones among them, each once."""
    beta, alpha, leak = (draw(D, seed=10 + i, dtype=dtype).requires_grad_() for i in range(3))
    a = draw(1, seed=13, dtype=dtype).requires_grad_()
    return {
        "tied": ((beta, alpha, None), (beta, alpha)),
        "free": ((beta, alpha, leak), (beta, alpha, leak)),
        "none": ((beta, alpha, 0), (beta, alpha)),
        "numbers": ((0.7, -0.4, 1.3), ()),
        "numbers tied": ((0.6, 0.6, None), ()),
        "shared": ((beta, beta, 0), (beta,)),
        "shared tied": ((beta, beta, None), (beta,)),
        "scalar": ((a, 0.3, a), (a,)),
    }[kind]


def by_matrices(x, f, gains, layout, **options):
    beta, alpha, leak = (g.double() if isinstance(g, torch.Tensor) else g for g in gains)
    leak = alpha if leak is None else leak
    return oracles.split_merge(x.double(), f.double(), beta, alpha, leak, *layout, **options)


def relative_error(value, expected):
    value, expected = value.detach().double(), expected.detach()
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_split_merge_is_the_formula_and_so_are_its_gradients(layout, kind, norm):
    tokens = sum(layout[0])
    x, f = (draw(B, tokens, D, seed=i).requires_grad_() for i in (1, 2))
    gains, learned = make_gains(kind)
    upstream = draw(B, tokens, D, seed=3)
    y = split_merge(x, f, *gains, make_segments(*layout), 1e-3, norm)
    expected = by_matrices(x, f, gains, layout, eps=1e-3, norm=norm)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    ours = torch.autograd.grad(y, (x, f, *learned), upstream)
    theirs = torch.autograd.grad(expected, (x, f, *learned), upstream)
    for value, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", GAINS)
def test_split_merge_gradcheck(kind, norm):
    layout = LAYOUTS["padded"]
    x, f = (draw(B, sum(layout[0]), D, seed=i).requires_grad_() for i in (4, 5))
    gains, learned = make_gains(kind)
    segments = make_segments(*layout)

    def merge(x, f, *_):
        return split_merge(x, f, *gains, segments, 1e-2, norm)

    assert gradcheck(merge, (x, f, *learned), fast_mode=False)


@pytest.mark.parametrize("which", range(5), ids=["x", "f", "beta", "alpha", "leak"])
def test_split_merge_gradient_of_one_input_alone(which):
    layout = LAYOUTS["padded"]
    tokens = sum(layout[0])
    inputs = [draw(B, tokens, D, seed=1), draw(B, tokens, D, seed=2)]
    inputs += [draw(D, seed=10 + i) for i in range(3)]
    leaf = inputs[which].requires_grad_()
    upstream = draw(B, tokens, D, seed=3)
    x, f, *gains = inputs
    y = split_merge(x, f, *gains, make_segments(*layout))
    (value,) = torch.autograd.grad(y, leaf, upstream)
    (wanted,) = torch.autograd.grad(by_matrices(x, f, gains, layout), leaf, upstream)
    torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)


def test_split_merge_default_is_one_segment_and_a_tied_leak():
    x, f, beta, alpha = draw(2, 7, D), draw(2, 7, D, seed=1), draw(D, seed=2), draw(D, seed=3)
    expected = oracles.split_merge(x, f, beta, alpha, alpha, (7,))
    torch.testing.assert_close(split_merge(x, f, beta, alpha), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("filler", [1e3, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", GAINS)
def test_padding_has_exactly_zero_influence(kind, norm, filler):
    layout = LAYOUTS["padded"]
    segments = make_segments(*layout)
    real = torch.stack([oracles.real_tokens(layout[0], counts) for counts in layout[1]]) > 0
    values = [draw(B, sum(layout[0]), D, seed=i, dtype=torch.float32) for i in range(3)]

    def run(padding):
        x, f, upstream = (torch.where(real, v, padding) for v in values)
        x, f = x.requires_grad_(), f.requires_grad_()
        gains, learned = make_gains(kind, torch.float32)
        y = split_merge(x, f, *gains, segments, norm=norm)
        return (y, *torch.autograd.grad(y, (x, f, *learned), upstream))

    clean, dirty = run(torch.zeros(())), run(torch.tensor(filler))
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before, after)
    for per_token in dirty[:3]:
        assert torch.all(per_token[~real.expand_as(per_token)] == 0)
        assert torch.all(per_token[real.expand_as(per_token)] != 0)


def test_a_real_non_finite_value_is_not_hidden():
    x, f = draw(2, 5, D), draw(2, 5, D, seed=1)
    f[0, 1, 2] = float("nan")
    y = split_merge(x, f, 1.0, 0.5, None, make_segments((2, 3), [(2, 3), (2, 1)]))
    assert y[0, :2].isnan().all(), "NaN reaches its segment through the mean"
    assert y[1].isfinite().all(), "no sample depends on another"


@pytest.mark.parametrize(
    ("dtype", "roundoff"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)],
)
@pytest.mark.parametrize("kind", GAINS)
def test_low_precision_rounds_only_what_it_stores(kind, dtype, roundoff):
    """Arithmetic is fp32, so only stored tensors are rounded, each by at most `roundoff`, relative
    to itself. The output is one such tensor. A gradient meets three (the upstream output Y twice,
    itself once); for fp32 itself about 70 terms accumulate on top."""
    layout = ((37, 31), [(37, 31), (37, 7), (30, 1)])
    slack = 70 if dtype == torch.float32 else 1
    x, f = (draw(B, 68, D, seed=i).to(dtype).requires_grad_() for i in (1, 2))
    upstream = draw(B, 68, D, seed=3).to(dtype)
    gains, learned = make_gains(kind, dtype)
    y = split_merge(x, f, *gains, make_segments(*layout))
    expected = by_matrices(x, f, gains, layout)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= 1.01 * slack * roundoff
    ours = torch.autograd.grad(y, (x, f, *learned), upstream)
    theirs = torch.autograd.grad(expected, (x, f, *learned), upstream.double())
    for value, wanted in zip(ours, theirs, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, wanted.double()) <= 3 * slack * roundoff


@pytest.mark.parametrize(("kind", "kept"), [("tied", 2), ("free", 2), ("numbers", 1)])
def test_backward_keeps_the_output_and_f_and_no_other_full_tensor(kind, kept):
    x, f = (draw(2, 11, D, seed=i).requires_grad_() for i in (1, 2))
    gains, _ = make_gains(kind)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = split_merge(x, f, *gains, Segments((6, 5)))
    full = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert full <= {y.data_ptr(), f.data_ptr()}
    assert len(full) == kept


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda x: Segments((4, -1)), ("lengths", "-1", "negative")),
        (lambda x: Segments(17), ("lengths=17", "write Segments((17,))")),
        (lambda x: Segments(("4",)), ("lengths is ('4',)", "tuple of whole numbers")),
        (lambda x: Segments((8 / 2,)), ("lengths is (4.0,)", "tuple of whole numbers")),
        (
            lambda x: Segments(torch.ones(2, 99)),
            ("lengths is a Tensor", "Segments((256, 77))"),
        ),
        (lambda x: Segments((2, 2), torch.tensor([2, 2])), ("valid", "(2,)", "[batch, 2]")),
        (lambda x: split_merge(x, x, 1.0, 0.0, None, Segments((2, 3))), ("lengths", "5", "4", "T")),
        (
            lambda x: split_merge(x, x, 1.0, 0.0, None, Segments((4,), torch.tensor([[4]]))),
            ("valid", "1 samples", "has 2"),
        ),
    ],
)
def test_wrong_segments_are_named_in_one_line(build, words):
    with pytest.raises(UserError) as error:
        build(draw(2, 4, D))
    assert one_line(error)
    assert all(word in str(error.value) for word in words)


def test_rms_norm_is_the_formula_and_passes_gradcheck():
    x = draw(2, 3, 7).requires_grad_()
    torch.testing.assert_close(rms_norm(x, 1e-3), oracles.normalise(x, 1e-3))
    assert gradcheck(lambda x: rms_norm(x, 1e-3), (x,))
    assert torch.equal(rms_norm(torch.zeros(2, 7)), torch.zeros(2, 7))


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_qk_norm_rope_is_a_complex_rotation_then_a_norm(kv_heads):
    heads, k, tokens = 3, 4, 5
    qkv = draw(2, tokens, (heads + 2 * kv_heads) * k).requires_grad_()
    angles = 3 * draw(tokens, k // 2, seed=1)
    q, key, v = qk_norm_rope(qkv, angles.cos(), angles.sin(), heads, kv_heads, 1e-3)
    split = qkv.split([heads * k, kv_heads * k, kv_heads * k], dim=-1)
    by_head = [part.unflatten(-1, (-1, k)).transpose(1, 2) for part in split]
    rotated = [oracles.complex_rotation(part, angles) for part in by_head[:2]]
    torch.testing.assert_close(q, oracles.normalise(rotated[0], 1e-3))
    torch.testing.assert_close(key, oracles.normalise(rotated[1], 1e-3))
    assert torch.equal(v, by_head[2])
    tables = angles.cos(), angles.sin()
    assert gradcheck(lambda p: qk_norm_rope(p, *tables, heads, kv_heads, 1e-3), (qkv,))


def test_swiglu_puts_the_gate_first_and_passes_gradcheck():
    packed = draw(2, 3, 8).requires_grad_()
    gate, value = packed[..., :4], packed[..., 4:]
    torch.testing.assert_close(swiglu(packed), gate / (1 + torch.exp(-gate)) * value)
    assert gradcheck(swiglu, (packed,))


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(
    ("op", "width"),
    [
        (rms_norm, 6),
        (swiglu, 6),
        (lambda p: qk_norm_rope(p, torch.ones(9, 1), torch.zeros(9, 1), 1, 1)[0], 6),
    ],
    ids=["rms_norm", "swiglu", "qk_norm_rope"],
)
def test_token_ops_in_low_precision_round_only_what_they_store(op, width, dtype, roundoff):
    x = draw(2, 9, width).to(dtype).requires_grad_()
    y, expected = op(x), op(x.double())
    upstream = draw(*y.shape, seed=1).to(dtype)
    (value,) = torch.autograd.grad(y, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream.double())
    assert y.dtype == value.dtype == dtype
    assert relative_error(y, expected) <= 1.01 * roundoff
    assert relative_error(value, wanted.double()) <= 3 * roundoff
