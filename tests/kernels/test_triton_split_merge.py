"""The fused merge against the fp64 reference: outputs, every gradient, awkward sizes."""

import pytest
import torch

from mvsplit.kernels import Segments, rms_norm, split_merge
from mvsplit.kernels.dispatch import forced_backend
from tests.kernels.fused import draw, tolerance, worst_error

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EMPTY = (37, 0, 20)
PADDED = ((19, 8), [(19, 8), (19, 0), (3, 5)])
KINDS = {  # how many gains are tensors, and what `split_merge` gets
    "tied": (2, lambda b, a: (b, a, None)),
    "free": (3, lambda b, a, l: (b, a, l)),
    "no leak": (2, lambda b, a: (b, a, 0)),
    "numbers": (0, lambda: (0.7, -0.4, 1.3)),
    "mixed": (1, lambda a: (0.5, a, None)),
    "shared": (1, lambda b: (b, b, 0)),
    "plain": (0, lambda: (1.0, 1.0, 0)),
    "scaled": (0, lambda: (0.3, 0.3, 0)),
}
CASES = [  # kind, lengths, valid, width, dtype, norm
    ("tied", EMPTY, None, 40, FP32, True),
    ("tied", *PADDED, 33, BF16, True),
    ("tied", (1,), None, 8, FP32, True),
    ("free", (300, 70), [(300, 70), (290, 1), (17, 0)], 24, FP32, True),
    ("tied", (9, 4), None, 1000, FP16, True),
    ("free", *PADDED, 24, FP32, True),
    ("free", (5, 3), None, 1, FP32, False),
    ("no leak", *PADDED, 40, FP32, False),
    ("numbers", *PADDED, 40, FP32, True),
    ("mixed", EMPTY, None, 40, BF16, True),
    ("shared", *PADDED, 40, FP32, True),
    ("shared", EMPTY, None, 1000, BF16, False),
    ("plain", *PADDED, 40, BF16, True),
    ("scaled", (1, 2), None, 17, FP32, True),
]
LARGE = [
    ("tied", (256, 64), None, 1024, BF16, True),
    ("tied", (256, 77), [(256, 77), (256, 1), (256, 0)], 1024, BF16, True),
    ("free", (1024, 256), None, 1000, FP32, True),
    ("tied", (4096,), None, 128, FP16, True),
    ("tied", (70, 3), None, 8192, BF16, True),
    ("tied", (33, 3), None, 8192, FP32, True),
    ("shared", (300, 20), None, 8192, FP32, True),
    ("tied", (288, 32), None, 1536, BF16, True),
    ("shared", (1024, 256), None, 1024, FP32, True),
    ("tied", (5000, 3), [(5000, 3), (4999, 0), (1, 1)], 256, BF16, True),
    ("free", (129, 65, 0, 1), None, 2049, FP16, True),
]


def merge_error(case, device):
    kind, lengths, valid, width, dtype, norm = case
    n, gains = KINDS[kind]
    inputs = [draw(3, sum(lengths), width, seed=i, dtype=dtype) for i in (1, 2)]
    inputs += [draw(width, seed=3 + i) for i in range(n)]
    upstream = [draw(3, sum(lengths), width, seed=9, dtype=dtype)]

    def op(x, f, *learned):
        counts = None if valid is None else torch.tensor(valid, device=x.device)
        return split_merge(x, f, *gains(*learned), Segments(lengths, counts), 1e-5, norm)

    return worst_error(op, inputs, upstream, device)


@pytest.fixture(params=["waiting", "two launches"])
def form(request, monkeypatch):
    """The form that serves, whatever the size."""
    from mvsplit.kernels.fused import split_merge as module

    monkeypatch.setattr(module, "form_of", lambda *_: (request.param, "a test"))
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, form, device):
    assert merge_error(case, device) < tolerance(case[4])


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_samples_between_the_two_reads(samples, device, monkeypatch):
    """Of three samples: one or two ahead, and all reduced before any is merged."""
    from mvsplit.kernels.fused import merge_waiting as module

    monkeypatch.setattr(module, "lag", lambda *_: samples)
    assert merge_error(("free", (9, 4), [(9, 4), (9, 0), (2, 3)], 24, FP32, True), device) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_outputs_and_gradients_at_model_sizes(case, form):
    assert merge_error(case, "cuda") < tolerance(case[4])


def test_one_element_gain_learns(device, form):
    inputs = [draw(2, 6, 24, seed=i) for i in (1, 2)] + [draw(1, seed=3)]

    def op(x, f, a):
        return split_merge(x, f, a, 0.3, a, Segments((4, 2)))

    assert worst_error(op, inputs, [draw(2, 6, 24, seed=4)], device) < tolerance(FP32)


@pytest.mark.parametrize(("tokens", "name"), [(26 * 320, "two launches"), (64 * 320, "waiting")])
def test_the_form_follows_the_l2_cache(tokens, name, monkeypatch):
    """By the H200's 60 MB, where clusters cannot serve."""
    from mvsplit.kernels.fused import split_merge as module

    class Tensor:
        is_cuda, device = True, "cuda"

        def numel(self):
            return tokens * 1024

        def element_size(self):
            return 2

    monkeypatch.setattr(module, "_l2_bytes", lambda device: 60 << 20)
    monkeypatch.setattr(module.merge_choice, "obstacle", lambda *_: "no reason")
    served, why = module.form_of("forward", Tensor())
    assert served == name
    assert "no reason" in why


@pytest.mark.parametrize("gains", [(0.6, 0.2, None), (0.6, 0.6, 0)], ids=["means", "no means"])
def test_strided_inputs_and_gradients(device, form, gains):
    """Slices of larger tensors, a transposed one, and an expanded upstream gradient."""
    wide, other = draw(2, 9, 40, seed=1), draw(2, 32, 7, seed=2)

    def op(x, f):
        return split_merge(x[:, 1:8, 4:36], f.transpose(1, 2), *gains, Segments((5, 2))).sum(0)

    upstream = [draw(1, 1, seed=3).expand(7, 32)]
    assert worst_error(op, [wide, other], upstream, device) < tolerance(FP32)


@pytest.mark.parametrize("leak", [None, 0], ids=["means", "no means"])
def test_padding_has_no_influence_and_leaves_as_zero(device, form, leak):
    segments = Segments((5, 4), torch.tensor([[5, 2], [3, 0]], device=device))
    x, f, g = (draw(2, 9, 16, seed=i).to(device) for i in (1, 2, 3))
    gain = draw(16, seed=4).to(device).requires_grad_()
    results = []
    for filler in (0.0, float("nan")):
        xs, fs, gs = (
            torch.where(segments.mask[..., None], t, filler).requires_grad_() for t in (x, f, g)
        )
        with forced_backend("triton"):
            y = split_merge(xs, fs, gain, gain, leak, segments)
        results.append([y, *torch.autograd.grad(y, (xs, fs, gain), gs)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    for value in results[0][:3]:
        assert value[~segments.mask].eq(0).all()
        assert value[segments.mask].ne(0).any()


def test_rms_norm(device):
    inputs, upstream = [draw(2, 3, 5, 48, seed=1)], [draw(2, 3, 5, 48, seed=2)]
    assert worst_error(lambda x: rms_norm(x, 1e-3), inputs, upstream, device) < tolerance(FP32)


def test_empty_batch(device):
    gain = torch.ones(4, device=device, requires_grad=True)
    x = torch.ones(0, 3, 4, device=device, requires_grad=True)
    with forced_backend("triton"):
        for leak in (None, 0):
            y = split_merge(x, x, gain, gain, leak, Segments((3,)))
            assert torch.autograd.grad(y.sum(), gain)[0].eq(0).all()


def test_registered_split_merge(device, form):
    from mvsplit.kernels.fused import split_merge as module

    x, f = (draw(2, 6, 8, seed=i).to(device).requires_grad_() for i in (1, 2))
    beta, alpha = (draw(8, seed=i).to(device).requires_grad_() for i in (3, 4))
    valid = torch.tensor([[4, 1], [2, 2]], device=device)
    gains = (beta, alpha, None, [0.0, 0.0, 0.0], True, valid, [4, 2])
    torch.library.opcheck(module._forward_op, (x, f, *gains, 1e-5, True))
    y, r, mean_f, mean_x = module._forward_op(x, f, *gains, 1e-5, True)
    kept = [t.detach() for t in (y, f, r, mean_f, mean_x, beta, alpha)]
    torch.library.opcheck(module._backward_op, (kept[0] * 2, *kept, *gains[2:]))


def test_registered_scaled_merge(device):
    from mvsplit.kernels.fused import scaled_merge as module

    x, f = (draw(2, 6, 8, seed=i).to(device).requires_grad_() for i in (1, 2))
    gain = draw(8, seed=3).to(device).requires_grad_()
    torch.library.opcheck(module._forward_op, (x, f, gain, 0.0, None, [4, 2], 1e-5, True))
    torch.library.opcheck(module._forward_op, (x, None, None, 1.0, None, [6], 1e-5, True))
    y, r = (t.detach() for t in module._forward_op(x, f, gain, 0.0, None, [4, 2], 1e-5, True))
    torch.library.opcheck(
        module._backward_op, (y * 2, y, f.detach(), r, gain.detach(), 0.0, None, [4, 2])
    )


def merge_and_gradients(op, tensors, upstream):
    y = op(*tensors)
    return [y, *torch.autograd.grad(y, tensors, upstream)]


@pytest.mark.parametrize("leak", [None, 0], ids=["means", "no means"])
def test_traces_into_one_graph(device, leak):
    x, f, upstream = (draw(2, 6, 16, seed=i).to(device) for i in (1, 2, 4))
    tensors = [t.requires_grad_() for t in (x, f, draw(16, seed=3).to(device))]

    def merge(x, f, gain):
        return split_merge(x, f, gain, gain, leak, Segments((4, 2)))

    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    with forced_backend("triton"):
        eager = merge_and_gradients(merge, tensors, upstream)
        traced = merge_and_gradients(compiled, tensors, upstream)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("leak", [None, 0], ids=["means", "no means"])
def test_repeats_bit_for_bit(leak, form):
    x, f, upstream = (draw(16, 1280, 1024, seed=i, dtype=BF16).cuda() for i in (1, 2, 4))
    tensors = [t.requires_grad_() for t in (x, f, draw(1024, seed=3).cuda())]

    def merge(x, f, gain):
        return split_merge(x, f, gain, gain, leak, Segments((1024, 256)))

    first = merge_and_gradients(merge, tensors, upstream)
    for _ in range(20):
        other = merge_and_gradients(merge, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
