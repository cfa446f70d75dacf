"""Attention of unit heads in CUDA C++ and its gradients: emulated on a CPU, and on a Hopper GPU;
whether it serves on a machine."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels import Segments, reference
from mvsplit.kernels import masked_attention as masked
from mvsplit.kernels.hopper import attention, unit_heads
from mvsplit.kernels.hopper import unit_heads_choice as choice
from mvsplit.kernels.hopper.driver import DriverError
from tests.kernels.emulation import emulation, needs_compiler  # noqa: F401

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BATCH, HEADS = 2, 2
SIZES = [
    (288, (270, 37)),  # keys by parts of 96, gradients by 48 and 96
    (320, None),  # more tiles of queries than have a place; gradients by 64
    (48, (48, 1)),  # fewer rows than a tile
    (224, (224, 0)),  # an even number of tiles, of which nothing is shared; a sample without a key
]


def draw(rows, counts, device="cpu"):
    """q, k, v and the gradient of the output, in a packed row of every token; zero on padding."""
    noise = torch.Generator().manual_seed(rows)
    x = torch.randn(BATCH, rows, 4 * HEADS, 128, generator=noise)
    x[:, :, : 2 * HEADS] *= 11.3 / x[:, :, : 2 * HEADS].norm(dim=-1, keepdim=True)
    x[:, :, 0], x[:, :, HEADS] = x[:, :, :1].mean(1), -x[:, :, :1].mean(1)  # apart as far as can be
    x[:, :, [0, HEADS]] *= 11.3 / x[:, :, [0, HEADS]].norm(dim=-1, keepdim=True)
    if counts is not None:
        x *= torch.arange(rows)[:, None, None] < torch.tensor(counts)[:, None, None, None]
    return x.bfloat16().to(device).transpose(1, 2).split(HEADS, 1)


def truth(q, k, v, grad, counts):
    """Output, log-sum-exp and gradients in fp64."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out = truth_of(*leaves, counts)
    grads = torch.autograd.grad(out, leaves, grad.double())
    return out.detach(), scores_of(*leaves[:2], counts).logsumexp(-1).detach(), grads


def scores_of(q, k, counts):
    scores = q @ k.mT / math.sqrt(128)
    if counts is None:
        return scores
    keys = torch.arange(q.shape[2]) < torch.tensor(counts)[:, None]
    return scores.masked_fill(~keys[:, None, None].to(q.device), -1e30)


def truth_of(q, k, v, counts):
    return scores_of(q, k, counts).softmax(-1) @ v


def check(rows, counts, device):
    given = draw(rows, counts, device)
    number = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device)
    out, lse = unit_heads.forward(*given[:3], number)
    found = unit_heads.backward(given[3], *given[:3], out, lse)
    wanted, of_lse, grads = truth(*given, counts)
    real = torch.ones(BATCH, rows, dtype=torch.bool, device=device)
    if number is not None:
        real = torch.arange(rows, device=device) < number[:, None]
    for ours in (out, lse, *found):
        assert ours.isfinite().all()
    for ours, right in zip((out, *found), (wanted, *grads), strict=True):
        ours, right = (t.transpose(1, 2)[real].double() for t in (ours, right))
        assert (ours - right).norm() / right.norm() < 6e-3
    assert (lse[..., 0].transpose(1, 2)[real] - of_lse.transpose(1, 2)[real]).abs().max() < 1e-5


def raw(rows, counts, device="cpu"):
    """A packed projection, zero on padding, and the tables that it is turned by; fp32."""
    noise = torch.Generator().manual_seed(rows)
    x = torch.randn(BATCH, rows, 3 * HEADS, 128, generator=noise)
    x *= torch.rand(BATCH, rows, 3 * HEADS, 1, generator=noise) + 0.1
    if counts is not None:
        x *= torch.arange(rows)[:, None, None] < torch.tensor(counts)[:, None, None, None]
    angles = 6 * torch.rand(rows, 64, generator=noise)
    angles[3 * rows // 4 :] = 0  # text is not turned
    tables = torch.stack((angles.cos(), angles.sin()), 1).to(device)  # rows of 128
    return x.flatten(-2).to(device), *tables.unbind(1)


def check_of_projection(rows, counts, device):
    x, cos, sin = raw(rows, counts, device)
    y = reference.qk_norm_rope_forward(x, cos, sin, HEADS, HEADS, 1e-6)
    heads = torch.cat((y.y, y.v), 2).bfloat16().transpose(1, 2)
    q, k, v = heads.split(HEADS, 1)
    grad = draw(rows, counts, device)[3]
    number = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device)
    out, lse = unit_heads.forward(q, k, v, number)
    r = y.r[..., 0].contiguous()
    assert unit_heads.takes_turn(r, cos, sin)
    found = unit_heads.backward_of_projection(grad, q, k, v, out, lse, r, cos, sin)
    leaf = x.double().requires_grad_()
    turned = reference.qk_norm_rope(leaf, cos.double(), sin.double(), HEADS, HEADS)
    (wanted,) = torch.autograd.grad(truth_of(*turned, counts), leaf, grad.double())
    real = torch.ones(BATCH, rows, dtype=torch.bool, device=device)
    if number is not None:
        real = torch.arange(rows, device=device) < number[:, None]
    assert found.isfinite().all()
    for ours, right in zip(found.chunk(3, -1), wanted.chunk(3, -1), strict=True):
        ours, right = ours[real].double(), right[real]
        assert (ours - right).norm() / right.norm() < 8e-3


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated holds NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan)
    )


@needs_compiler
@pytest.mark.usefixtures("emulation", "poisoned")
@pytest.mark.parametrize(("rows", "counts"), SIZES)
def test_output_and_gradients_are_those_of_attention(rows, counts):
    check(rows, counts, "cpu")


@needs_compiler
@pytest.mark.usefixtures("emulation", "poisoned")
@pytest.mark.parametrize(("rows", "counts"), [SIZES[1], SIZES[2]])
def test_gradients_of_the_projection_are_those_of_autograd(rows, counts):
    check_of_projection(rows, counts, "cpu")


@needs_compiler
@pytest.mark.usefixtures("emulation", "poisoned")
@pytest.mark.parametrize(
    ("module", "wait"),
    [
        (attention, "barrier_wait(ops.of_values(i), 0, fault);"),  # for a copy
        (unit_heads, "barrier_wait(ops.bar + 8 * (from / BOX + i), 0, fault);"),
        (unit_heads, "products_sync<0>();"),
    ],
)
def test_a_wait_that_is_missing_is_seen_by_the_emulation(module, wait, monkeypatch):
    source = module.source
    assert wait in source(*((attention.Heads(3), 48, True) if module is attention else (48,)))
    monkeypatch.setattr(module, "source", lambda *a, **k: source(*a, **k).replace(wait, "", 1))
    with pytest.raises(AssertionError):
        check(48, (48, 1), "cpu")


@needs_compiler
@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("own", [True, False])
def test_autograd_takes_both_backwards(own, monkeypatch):
    segments = Segments.image_and_text(40, 8, torch.tensor([8, 1]))
    q, k, v, grad = draw(48, (48, 41))
    monkeypatch.setattr(masked, "_cudnn_backward", from_what_was_kept)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = masked.by_unit_heads_in_cuda(*leaves, segments, gradients=own)
    found = torch.autograd.grad(out, leaves, grad)
    wanted, _, grads = truth(q, k, v, grad, (48, 41))
    for ours, right in zip((out, *found), (wanted, *grads), strict=True):
        ours, right = (t.transpose(1, 2)[segments.mask].double() for t in (ours, right))
        assert (ours - right).norm() / right.norm() < 6e-3


@needs_compiler
@pytest.mark.usefixtures("emulation")
def test_a_block_takes_the_gradient_of_its_projection_from_the_kernel_that_gives_it():
    x, cos, sin = raw(48, (48, 41))
    y = reference.qk_norm_rope_forward(x, cos, sin, HEADS, HEADS, 1e-6)
    q, k, v = torch.cat((y.y, y.v), 2).bfloat16().transpose(1, 2).split(HEADS, 1)
    r, grad = y.r[..., 0].contiguous(), draw(48, (48, 41))[3]
    counts = torch.tensor((48, 41), dtype=torch.int32)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = masked._InCuda.apply(*leaves, counts, True, True)
    found = masked.gradient_of_projection(out, grad, r, cos, sin)
    of_q, of_k, of_v = (g.transpose(1, 2).float() for g in torch.autograd.grad(out, leaves, grad))
    heads = torch.cat((of_q, of_k), 2)
    wanted = reference.qk_norm_rope_backward(heads, of_v, y.y.bfloat16().float(), y.r, cos, sin)
    real = torch.arange(48) < counts[:, None]
    assert (found[real] - wanted[real]).norm() / wanted[real].norm() < 4e-3  # two roundings
    assert masked.gradient_of_projection(out, grad, r.double(), cos, sin) is None
    assert masked.gradient_of_projection(out, grad, r, cos[:, ::2], sin) is None
    for way in ((True, False), (False, False)):  # by a kernel of heads alone, by cuDNN
        other = masked._InCuda.apply(*leaves, counts, *way)
        assert masked.gradient_of_projection(other, grad, r, cos, sin) is None


def from_what_was_kept(grad, q, k, v, out, lse, *_):
    """As cuDNN's operator has it, in fp32."""
    q, k, v, grad, out = (t.float() for t in (q, k, v, grad, out))
    p = torch.exp(q @ k.mT / math.sqrt(128) - lse)
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / math.sqrt(128)
    return tuple(t.bfloat16() for t in (ds @ k, ds.mT @ q, p.mT @ grad))


@pytest.mark.parametrize("rows", range(32, 321, 16))
def test_what_it_takes_fits_into_shared_memory(rows):
    if not any(rows % n == 0 for n in unit_heads._AT_A_TIME):
        pytest.skip("it does not take so many")
    assert unit_heads.shared_bytes(rows) <= 232_448
    assert "#define TRAP 1" in unit_heads.source(rows)
    assert "#define TRAP 1" in unit_heads.forward_source(rows, True)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("rows", "counts"), [*SIZES, (64, (3, 64)), (256, None)])
def test_on_a_gpu_too(rows, counts):
    check(rows, counts, "cuda")
    check_of_projection(rows, counts, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_a_thread_that_has_not_called_the_gpu_yet():
    """As autograd's is, of a process whose first gradients these are."""
    q, k, v, grad = draw(48, None, "cuda")

    def launch():
        out, lse = unit_heads.forward(q, k, v, None)
        return out, lse, *unit_heads.backward(grad, q, k, v, out, lse)

    wanted = launch()
    launch()  # memory for the thread, which need not ask the GPU for it
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(launch).result()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "kind",
    [
        choice.Class(320, False, True),
        choice.Class(288, True, True),
        choice.Class(320, False, True, turned=True),
        choice.Class(288, False, True, turned=True),
    ],
)
def test_the_kernels_are_right_by_their_own_comparison(kind):
    words, lasting = choice._verdict_elsewhere(kind, torch.device("cuda", 0))
    assert lasting
    assert words == "right" or (kind.turned and words.startswith("not faster"))


# Whether it serves

CPU = torch.device("cpu")
KINDS = [choice.Class(64, True, True), choice.Class(48, False, True), choice.Class(64, True, False)]
TURNED = choice.Class(64, False, True, turned=True)


def formula(q, k, v, counts):
    scores = q.float() @ k.float().mT / math.sqrt(128)
    if counts is not None:
        keys = torch.arange(q.shape[2]) < counts[:, None]
        scores = scores.masked_fill(~keys[:, None, None], -torch.inf)
    out = (scores.softmax(-1) @ v.float()).to(q.dtype)
    return out, scores.logsumexp(-1, keepdim=True)


@pytest.fixture
def stand_ins(monkeypatch):
    """The formula in place of the kernels."""
    monkeypatch.setattr(choice, "SAMPLES", 3)
    monkeypatch.setattr(choice, "HEADS", 2)
    monkeypatch.setattr(unit_heads, "forward", formula)
    monkeypatch.setattr(unit_heads, "backward", from_what_was_kept)
    monkeypatch.setattr(unit_heads, "backward_of_projection", projection_from_what_was_kept)
    monkeypatch.setattr(choice._Given, "by_two_kernels", choice._Given.by_one_kernel)
    monkeypatch.setattr(masked, "_cudnn_backward", from_what_was_kept)


def projection_from_what_was_kept(grad, q, k, v, out, lse, r, cos, sin):
    of_q, of_k, of_v = (
        t.transpose(1, 2).float() for t in from_what_was_kept(grad, q, k, v, out, lse)
    )
    heads, y = (torch.cat(t, 2) for t in ((of_q, of_k), (q.transpose(1, 2), k.transpose(1, 2))))
    return reference.qk_norm_rope_backward(
        heads, of_v, y.float(), r.unsqueeze(-1), cos, sin
    ).bfloat16()


@pytest.mark.usefixtures("stand_ins")
def test_the_gradient_of_a_projection_is_compared_too(monkeypatch):
    assert choice._verdict(TURNED, CPU) == ("right", True)
    right, calls = projection_from_what_was_kept, []
    monkeypatch.setattr(choice._Given, "by_two_kernels", lambda self: right(
        self.grad, *self.heads, self.out, self.lse, self.r, self.cos, self.sin
    ))  # fmt: skip

    def unturned(grad, q, k, v, out, lse, r, cos, sin):
        return right(grad, q, k, v, out, lse, r, cos, -sin)

    def one_head_longer(*given):
        found = right(*given)
        found[..., 128:256] *= 1.02
        return found

    def now_and_then(*given):
        calls.append(None)
        found = right(*given)
        found[0, 0, 0] += len(calls) % 2 * 0.1
        return found

    def not_finite(*given):
        found = right(*given)
        found[-1, -1, -1] = torch.nan
        return found

    for wrong in (unturned, one_head_longer, now_and_then, not_finite):
        monkeypatch.setattr(unit_heads, "backward_of_projection", wrong)
        assert choice._verdict(TURNED, CPU)[0].startswith("off ")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_right_passes_and_what_is_not_does_not(kind, monkeypatch):
    assert choice._verdict(kind, CPU) == ("right", True)
    calls = []

    def wrong_value(*given):
        out, lse = formula(*given)
        out[0, 1] *= 1.02
        return out, lse

    def other_lse(*given):
        out, lse = formula(*given)
        return out, lse + 0.02

    def not_finite(*given):
        out, lse = formula(*given)
        out[-1, 0, 0, 3] = torch.nan
        return out, lse

    for forward in (wrong_value, other_lse, not_finite):
        monkeypatch.setattr(unit_heads, "forward", forward)
        assert choice._verdict(kind, CPU)[0].startswith("off ")
    monkeypatch.setattr(unit_heads, "forward", formula)

    def now_and_then(*given):
        calls.append(None)
        grads = from_what_was_kept(*given)
        grads[1][0, 0, 0, 0] += len(calls) % 2 * 0.1
        return grads

    monkeypatch.setattr(unit_heads, "backward", now_and_then)
    differs = ("off inf times as far as a mask", True)
    assert choice._verdict(kind, CPU) == (differs if kind.gradients else ("right", True))
    monkeypatch.setattr(unit_heads, "backward", from_what_was_kept)

    def by_a_bit_now_and_then(*given):
        calls.append(None)
        out, lse = formula(*given)
        return out, lse + len(calls) % 2 * 1e-6

    monkeypatch.setattr(unit_heads, "forward", by_a_bit_now_and_then)
    assert choice._verdict(kind, CPU) == differs


@pytest.mark.usefixtures("stand_ins")
def test_a_kernel_that_cannot_be_made_is_said_to_be_so(monkeypatch):
    def refuse(*_):
        raise DriverError("no NVRTC here")

    monkeypatch.setattr(unit_heads, "forward", refuse)
    assert choice._verdict(KINDS[0], CPU) == ("cannot be made here (no NVRTC here)", False)


def test_a_verdict_is_kept_and_said_and_never_made_in_a_capture(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    capturing, asked = [True], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    given = ("off 3.0 times as far as a mask", True)
    monkeypatch.setattr(choice, "_verdict_elsewhere", lambda *_: asked.append(None) or given)
    monkeypatch.setattr(choice, "_verdicts", {})
    device = torch.device("cuda", 0)
    found = choice.untrusted(KINDS[0], device)
    assert "captured" in found.reason
    assert not found.lasting
    capturing[0] = False
    found = choice.untrusted(KINDS[0], device)
    assert "off 3.0" in found.reason
    assert found.lasting
    monkeypatch.setattr(choice, "_verdicts", {})  # another process, that captures
    capturing[0] = True
    found = choice.untrusted(KINDS[0], device)
    assert "off 3.0" in found.reason
    assert found.lasting
    assert len(asked) == 1
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]


def test_forward_is_asked_about_alone_only_where_backward_is_not_right(monkeypatch):
    asked, answers = [], {}
    monkeypatch.setattr(choice, "obstacle", lambda kind, _: asked.append(kind) or answers[kind])
    both, alone = choice.Class(64, True, True), choice.Class(64, True, False)
    answers |= {both: None, alone: "off"}
    assert choice.untrusted(alone, CPU) is None
    assert asked == [both]
    answers |= {both: "off", alone: None}
    assert choice.untrusted(both, CPU) == "off"
    assert choice.untrusted(alone, CPU) is None


def test_the_comparison_has_a_process_of_its_own(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "from mvsplit.kernels.hopper import unit_heads_choice as choice\n"
        "choice._verdict = lambda kind, device: (f'{kind.rows} {kind.masked} {device}', True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choice._verdict_elsewhere(KINDS[0], CPU) == ("64 True cpu", True)


def test_what_the_kernels_do_not_take_is_told(monkeypatch):
    q = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    assert "Hopper" in unit_heads.obstacle(q, q, q)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert unit_heads.obstacle(q, q, q) is None
    for rows in (352, 80, 17):
        x = torch.zeros(1, 2, rows, 128, dtype=torch.bfloat16)
        assert "tokens" in unit_heads.obstacle(x, x, x)
    assert "bf16" in unit_heads.obstacle(q.half(), q.half(), q.half())
    for k, v in ((q.half(), q), (q, q.half()), (q, q.float())):
        assert "bf16" in unit_heads.obstacle(q, k, v)
    for k, v in ((q[:, :1], q[:, :1]), (q, q[:, :1]), (q, q[:, :, :32]), (q, q[..., :64])):
        assert "as many" in unit_heads.obstacle(q, k, v)
    narrow = torch.zeros(1, 2, 64, 132, dtype=torch.bfloat16)[..., :128]
    assert "16 bytes" in unit_heads.obstacle(q, narrow, q)
    segments = Segments((32, 32), torch.tensor([[5, 32]]))
    assert "padding" in masked.obstacle_in_cuda(q, q, q, segments, True).reason
