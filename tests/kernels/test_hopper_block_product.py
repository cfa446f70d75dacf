"""Products of a block with what follows them in the same kernel: emulated on a CPU, and on a Hopper
GPU; whether they serve on a machine."""

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels import reference
from mvsplit.kernels.fused import products
from mvsplit.kernels.hopper import block_product as product
from mvsplit.kernels.hopper import block_product_choice as choice
from mvsplit.kernels.hopper.block_product import DOWN, HEAD, HEADS, UP, Cut, Turns
from tests.kernels.emulation import emulation, needs_compiler  # noqa: F401

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ROUNDING = 2.5e-3  # ‖bf16(y) − y‖/‖y‖ is 1.66e-3 for normal y; inputs are exact


def exact(*shape, seed, device="cpu"):
    """Values of order one that bf16 holds."""
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=noise).bfloat16().to(device)


def off(found, wanted):
    assert found.isfinite().all()
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def activated(packed):
    gate, value = packed.double().chunk(2, 1)
    return gate * gate.sigmoid() * value


def check_up(rows, width, hidden, cut, device="cpu"):
    y = exact(rows, width, seed=1, device=device)
    w13 = exact(2 * hidden, width, seed=2, device=device) / width**0.5 * 2
    packed, h = product.up(y, w13, cut=cut)
    assert off(packed, y.double() @ w13.double().T) < ROUNDING
    assert off(h, activated(packed)) < ROUNDING  # of what was rounded
    again, none = product.up(y, w13, hidden=False, cut=cut)
    assert none is None
    assert torch.equal(again, packed)


def check_down(rows, width, hidden, cut, device="cpu"):
    df = exact(rows, width, seed=3, device=device)
    w2 = exact(width, hidden, seed=4, device=device) / hidden**0.5
    packed = exact(rows, 2 * hidden, seed=5, device=device) * 2
    packed[0, :2], packed[1, :2] = -100.0, 100.0  # where the sigmoid has its ends
    grad, h = product.down(df, w2, packed, cut=cut)
    leaf = packed.double().requires_grad_()
    out = activated(leaf)
    (wanted,) = torch.autograd.grad(out, leaf, df.double() @ w2.double())
    for ours, right in zip(grad.chunk(2, 1), wanted.chunk(2, 1), strict=True):
        assert off(ours, right) < ROUNDING
    assert off(h, out.detach()) < ROUNDING


def check_heads(rows, width, n_heads, cut, device="cpu"):
    """Of heads, two thirds are turned; samples of 50 rows."""
    x = exact(rows, width, seed=6, device=device)
    w = exact(n_heads * HEAD, width, seed=7, device=device) / width**0.5
    x[2] = 0  # a norm that is ε's
    angle = torch.rand(50, HEAD // 2, generator=torch.Generator().manual_seed(8)).to(device) * 6
    turns = Turns(angle.cos(), angle.sin(), n_heads * 2 // 3, 1e-6)
    found, inverse = product.heads(x, w, turns, cut=cut)
    heads = (x.double() @ w.double().T).view(rows, n_heads, HEAD)
    at = torch.arange(rows, device=device) % 50
    by = torch.polar(torch.ones_like(angle).double(), -angle.double())[at, None]
    pairs = torch.complex(*heads[:, : turns.heads].chunk(2, -1)) * by
    heads[:, : turns.heads] = torch.cat((pairs.real, pairs.imag), -1)
    r = (heads[:, : turns.heads].square().mean(-1) + turns.eps).rsqrt()
    heads[:, : turns.heads] *= r[..., None]
    assert off(found, heads.flatten(1)) < ROUNDING
    assert off(inverse, r) < 1e-5


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


@needs_compiler
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "cut", "clusters"),
    [
        (150, 128, 128, Cut(256, 2, 4, 1), 132),
        (300, 64, 256, Cut(256, 2, 4, 2), 1),  # tile after tile, of two stages each
        (77, 320, 64, Cut(128, 3, 4, 2), 132),  # a block without a row
        (150, 128, 256, Cut(256, 2, 4, 1, beside=True), 1),
        (300, 192, 128, Cut(128, 2, 4, 2, beside=True), 2),
    ],
)
def test_up(rows, width, hidden, cut, clusters, emulation):  # noqa: F811
    emulation.most_clusters = clusters
    check_up(rows, width, hidden, cut)


@needs_compiler
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "cut", "clusters"),
    [
        (150, 128, 256, Cut(256, 2, 3, 1), 132),
        (300, 64, 256, Cut(256, 2, 3, 2), 1),
        (130, 320, 192, Cut(192, 2, 3, 2), 132),
        (77, 64, 256, Cut(128, 3, 2, 1), 1),
        (200, 64, 128, Cut(128, 2, 4, 2), 132),
        (150, 128, 512, Cut(256, 2, 3, 1, beside=True), 1),
        (300, 192, 256, Cut(128, 2, 3, 2, beside=True), 2),
    ],
)
def test_down(rows, width, hidden, cut, clusters, emulation):  # noqa: F811
    emulation.most_clusters = clusters
    check_down(rows, width, hidden, cut)


@needs_compiler
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rows", "width", "n_heads", "cut", "clusters"),
    [
        (150, 128, 6, Cut(256, 2, 4, 1), 1),
        (150, 64, 4, Cut(256, 2, 4, 2), 132),  # a tile of a key and a value
        (77, 64, 3, Cut(128, 3, 4, 2), 1),
    ],
)
def test_heads(rows, width, n_heads, cut, clusters, emulation):  # noqa: F811
    emulation.most_clusters = clusters
    check_heads(rows, width, n_heads, cut)


@needs_compiler
@pytest.mark.usefixtures("emulation", "poisoned")
@pytest.mark.parametrize(
    ("which", "wait"),
    [
        (UP, "if (me.lane == 0) stores_read<1>();"),
        (UP, "wgmma.wait_group.sync.aligned 0;"),
        (DOWN, "        stores_read<0>();"),
        (DOWN, "    stores_read<0>();\n    ask_first"),
    ],
)
def test_a_wait_that_is_missing_is_seen(which, wait, emulation, monkeypatch):  # noqa: F811
    emulation.most_clusters = 1
    source, left = product.source, wait.partition("\n")[2]
    cut = Cut(128, 2, 2, 1) if which == UP else Cut(192, 2, 2, 1)
    assert wait in source(cut, which, 64, torch.bfloat16)
    monkeypatch.setattr(product, "source", lambda *a: source(*a).replace(wait, left, 1))
    check = check_up if which == UP else check_down
    with pytest.raises(AssertionError):
        check(77, 64, 384, cut)


# In a block


@needs_compiler
@pytest.mark.usefixtures("emulation", "poisoned")
def test_a_branch_and_its_gradients_by_the_kernels(monkeypatch):
    asked = []

    def serving(which, *given):
        asked.append((which, *(list(t.shape) for t in given if t is not None)))
        return (Cut(128, 2, 2, 1), Cut(128, 2, 2, 2))[which]

    monkeypatch.setattr(products.block_product_choice, "serving", serving)
    monkeypatch.setattr(products, "_ways", {})
    y, df = exact(2, 21, 64, seed=1), exact(2, 21, 64, seed=3)
    w13, w2 = exact(256, 64, seed=2) / 4, exact(64, 128, seed=4) / 8
    packed, hidden = products.project(y, w13, hidden=True)
    grad, again = products.project_backward(df, w2, packed)
    assert asked == [
        (UP, [42, 64], [256, 64]), (DOWN, [42, 64], [64, 128], [42, 256])
    ]  # fmt: skip
    assert packed.shape == grad.shape == (2, 21, 256)
    assert torch.equal(again, hidden)  # what is computed again is the same, bit by bit
    leaf = packed.double().requires_grad_()
    out = activated(leaf.flatten(0, 1))
    (wanted,) = torch.autograd.grad(out, leaf, (df.double() @ w2.double()).flatten(0, 1))
    assert off(packed, y.double() @ w13.double().T) < ROUNDING
    assert off(hidden.flatten(0, 1), out.detach()) < ROUNDING
    assert off(grad, wanted) < ROUNDING
    assert [way.partition(":")[0] for way in products.ways_so_far()] == [
        "w13 and SwiGLU [42, 64] × [256, 64] torch.bfloat16 on cpu",
        "w2 backward and SwiGLU [42, 64] × [64, 128] torch.bfloat16 on cpu",
    ]


def test_what_does_not_serve_is_said_once_for_each_shape(monkeypatch, caplog):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(products, "_ways", {})
    monkeypatch.setattr(products.block_product_choice, "serving", lambda *_: "it is the wrong day")
    caplog.set_level("INFO")
    for rows in (3, 3, 5):
        assert products._serving(UP, exact(rows, 64, seed=1), exact(256, 64, seed=2)) is None
    assert len(products.ways_so_far()) == len(caplog.records) == 2
    assert all("wrong day" in way for way in products.ways_so_far())


@needs_compiler
@pytest.mark.usefixtures("emulation", "poisoned")
def test_heads_lie_as_attention_and_its_gradients_want_them(monkeypatch):
    asked, cut = [], Cut(128, 2, 2, 1)
    choose = lambda which, *given: asked.append(which) or cut  # noqa: E731
    monkeypatch.setattr(products.block_product_choice, "serving", choose)
    x, w = exact(2, 21, 64, seed=1), exact(6 * HEAD, 64, seed=2) / 8
    angle = torch.rand(21, HEAD // 2, generator=torch.Generator().manual_seed(3))
    cos, sin = angle.cos(), angle.sin()
    *found, r = products.heads(x, w, cos, sin, 2, 1e-6)
    qkv = (x.double() @ w.double().T).float()
    wanted = reference.qk_norm_rope(qkv, cos, sin, 2, 2, 1e-6)
    for ours, right in zip(found, wanted, strict=True):
        assert ours.stride()[1:] == (HEAD, 6 * HEAD, 1)
        assert off(ours, right.double()) < ROUNDING
    rms = qkv.view(2, 21, 6, HEAD)[:, :, :4].square().mean(-1).sqrt()
    assert off(r, 1 / rms.double()) < 1e-5
    monkeypatch.setattr(products.qk_norm_rope, "qk_norm_rope_", lambda *_: "by libraries")
    for tables in (
        (cos[:7], sin[:7]),
        (cos.bfloat16(), sin.bfloat16()),
        (cos[:, :32], sin[:, :32]),
    ):
        assert products.heads(x, w, *tables, 2, 1e-6) == "by libraries"
    assert asked == [HEADS]


# On the device

on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [8320, 1283])
@pytest.mark.parametrize(
    ("which", "cut"), [(which, cut) for which in product.CUTS for cut in product.CUTS[which]]
)
def test_on_a_gpu_too(which, cut, rows, poisoned):
    check, columns = ((check_up, 3072), (check_down, 3072), (check_heads, 24))[which]
    check(rows, 1024, columns, cut, "cuda")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("which", [UP, DOWN, HEADS])
def test_the_kernels_are_right_by_their_own_comparison(which):
    kind = choice.Class(which, torch.bfloat16, 1024, 3072, 4608)
    words, lasting = choice._verdict_elsewhere(kind, torch.device("cuda", 0))
    assert words.startswith(("right", "slower"))
    assert lasting
