"""The merge in clusters: how work is dealt, what it takes, and, on a Hopper GPU, what comes out."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels import Segments, reference, split_merge
from mvsplit.kernels.fused import split_merge as package
from mvsplit.kernels.fused.merge_parts import merged, weights
from mvsplit.kernels.hopper import merge
from mvsplit.kernels.hopper import merge_choice as choice
from mvsplit.kernels.hopper.driver import DriverError
from tests.kernels.fused import draw, tolerance, worst_error

BF16 = torch.bfloat16
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize(
    ("batch", "lengths", "clusters"),
    [(64, (256, 64), 15), (26, (256, 64), 15), (16, (64, 1024), 7), (1, (5, 0, 3), 2)],
)
def test_every_segment_of_every_sample_is_dealt_once_and_evenly(batch, lengths, clusters):
    bounds = merge.shares(batch, lengths, clusters)
    load = [0] * clusters
    for length, ends in zip(lengths, bounds, strict=True):
        assert (ends[0], ends[-1], len(ends)) == (0, batch, clusters + 1)
        for c in range(clusters):
            assert ends[c] <= ends[c + 1]
            load[c] += length * (ends[c + 1] - ends[c])
    assert max(load) - min(load) <= max(lengths)


@pytest.mark.parametrize("name", ["FORWARD", "LONG_FORWARD", "BACKWARD", "LONG_BACKWARD"])
def test_a_cut_fits_into_a_block(name):
    cut = getattr(merge, name)
    assert cut.shared <= 232_448
    assert 32 * cut.warps <= 1024
    assert cut.appliers % (merge.WIDTH // 256) == 0
    assert cut.f_slots or cut.appliers % cut.rows == 0
    text = merge.source(cut, torch.float16, 3, "int")
    assert "#define SEGMENTS 3\n" in text
    assert f"merge_{'backward' if cut.f_slots else 'forward'}(const u16" in text


def test_long_segments_have_more_blocks():
    for direction in ("forward", "backward"):
        assert merge.cut_for(direction, [256, 64]).cluster == 8
        assert merge.cut_for(direction, [64, 1024]).cluster == 16


class _Hopper:
    """A tensor as far as `obstacle` looks."""

    is_cuda, device, dtype, shape = True, torch.device("cuda", 0), BF16, (26, 320, 1024)

    def __init__(self, step=1024, address=0):
        self._step, self._address = step, address

    def stride(self, axis):
        return (8 * self._step, self._step)[axis]

    def data_ptr(self):
        return self._address


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(choice, "_untrusted", lambda *_: None)


def obstacle(x, f, found, gain=None, counts=None):
    gains = weights(gain, gain, None, [0.5] * 3, True)
    return choice.obstacle("forward", x, f, found, gains, counts, [256, 64])


def test_what_is_taken_and_what_is_not(hopper):
    x = torch.empty(3, 8, 1024, dtype=BF16)
    whole, bare = merged(x, 2, True, True), merged(x, 2, True, False)
    assert obstacle(_Hopper(), _Hopper(), whole) is None
    assert obstacle(_Hopper(), None, whole, torch.ones(1024), torch.ones(3, 2).int()) is None
    assert "norm" in obstacle(_Hopper(), _Hopper(), bare)
    assert "16 bytes" in obstacle(_Hopper(), _Hopper(1028), whole)
    assert "16 bytes" in obstacle(_Hopper(), _Hopper(address=8), whole)
    assert "gains" in obstacle(_Hopper(), _Hopper(), whole, torch.ones(1024).half())
    assert "counts" in obstacle(_Hopper(), _Hopper(), whole, None, torch.ones(3, 2).short())
    assert "Hopper" in obstacle(x, x, whole)
    for shape, reason in (((26, 320, 768), "D = 1024"), ((8, 320, 1024), "gave nothing")):
        other = _Hopper()
        other.shape = shape
        assert reason in obstacle(other, other, whole)


# The comparison before a kernel serves


def fill_forward(x, f, out, gains, valid, lengths, eps):
    """What the kernel has to do, by the reference."""
    segments = Segments(tuple(lengths), valid)
    x, f = (reference.zero_padding(t.float(), segments) for t in (x, f))
    beta, alpha, _ = gains.pointers
    y, r, *means = reference.merge_forward(x, f, beta, alpha, alpha, segments, eps)
    for target, value in zip(out, (y, r.squeeze(-1), *means), strict=True):
        target.copy_(value)


def fill_backward(g, f, found, out, gains, valid, lengths):
    segments = Segments(tuple(lengths), valid)
    clean = [None if t is None else reference.zero_padding(t.float(), segments) for t in (g, f)]
    kept = reference.Merged(found.y.float(), found.r[..., None], *found[2:])
    beta, alpha, _ = gains.pointers
    grads = reference.merge_backward(clean[0], kept, clean[1], beta, alpha, alpha, segments)
    out.x.copy_(grads.x)
    out.f.copy_(grads.f)
    if f is not None:
        out.beta.copy_(grads.beta)
        out.alpha.copy_(grads.alpha + grads.leak)


@pytest.fixture
def kernels(monkeypatch):
    """The reference in place of the kernels, at a small width."""
    monkeypatch.setattr(merge, "WIDTH", 16)
    monkeypatch.setattr(merge, "forward", fill_forward)
    monkeypatch.setattr(merge, "backward", fill_backward)


CPU = torch.device("cpu")
KINDS = [
    choice.Class("forward", BF16, 2, "", False, True),
    choice.Class("forward", torch.float16, 1, "int", True, True),
    choice.Class("backward", BF16, 3, "long long", False, True),
    choice.Class("backward", BF16, 2, "", True, False),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_right_passes_and_what_is_not_does_not(kind, kernels, monkeypatch):
    assert choice._verdict(kind, CPU) == ("right", True)
    name = kind.direction
    fill, calls = getattr(merge, name), []

    def wrong(by, when=0):
        def launch(*arguments):
            fill(*arguments)
            calls.append(None)
            result = arguments[2 if name == "forward" else 3]
            if len(calls) > when:
                result[0][-1, 0, 3] += by

        return launch

    for by, when in ((1e3, 0), (float("nan"), 0), (1.0, 1)):  # the last: launches differ
        calls.clear()
        monkeypatch.setattr(merge, name, wrong(by, when))
        assert choice._verdict(kind, CPU)[0].startswith("off by")

    def waits(*arguments):
        fill(*arguments)
        merge.fault.fill_(1)

    monkeypatch.setattr(merge, name, waits)
    verdict, lasting = choice._verdict(kind, CPU)
    assert "did not end" in verdict
    assert not lasting  # another process on the GPU may be why
    assert merge.fault is None


def test_a_verdict_is_kept_and_said_and_never_made_in_a_capture(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    capturing, asked = [True], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    given = ("off by inf", True)
    monkeypatch.setattr(choice, "_verdict_elsewhere", lambda *_: asked.append(None) or given)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(choice, "_verdicts", {})
    assert "captured" in choice._untrusted(KINDS[0], device)
    capturing[0] = False
    assert "off by inf" in choice._untrusted(KINDS[0], device)
    assert "off by inf" in choice._untrusted(KINDS[0], device)
    monkeypatch.setattr(choice, "_verdicts", {})  # another process
    assert "off by inf" in choice._untrusted(KINDS[0], device)
    assert len(asked) == 1
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize(
    ("there", "verdict", "lasting"),
    [
        ("return 'right' if kind == kinds[1] and device.type == 'cpu' else 'mixed up', True",
         "right", True),
        ("raise RuntimeError('an illegal access\\nand more')",
         "faults here (an illegal access)", True),
        ("import os; os._exit(3)", "the comparison ended without a verdict (status 3)", False),
        ("import time; time.sleep(60)", "no verdict within 5 s", False),
    ],
)  # fmt: skip
def test_the_comparison_has_a_process_of_its_own(there, verdict, lasting, monkeypatch, tmp_path):
    """Whatever happens in it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "from mvsplit.kernels.hopper import merge_choice as choice\n"
        f"kinds = [None, choice.Class('forward', torch.float16, 1, 'int', True, True)]\n"
        f"def verdict(kind, device):\n    {there}\n"
        "choice._verdict = verdict\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(choice, "PATIENCE", 5.0 if "sleep" in there else 60.0)
    assert choice._verdict_elsewhere(KINDS[1], CPU) == (verdict, lasting)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("frozen", True, "this program is no Python"),
    ("executable", "/nowhere/python", "a process for them cannot be started: "),
])  # fmt: skip
def test_where_no_process_can_be_begun_clusters_are_not_used_this_time(
    monkeypatch, name, value, reason
):
    monkeypatch.setattr(sys, name, value, raising=False)
    verdict, lasting = choice._verdict_elsewhere(KINDS[1], CPU)
    assert verdict.startswith(f"they cannot be compared, because {reason}")
    assert not lasting


def test_a_kernel_that_cannot_be_made_is_not_used_this_time(kernels, monkeypatch):
    def refuse(*_):
        raise DriverError("no NVRTC here")

    monkeypatch.setattr(merge, "forward", refuse)
    assert choice._verdict(KINDS[0], CPU) == ("cannot be made here (no NVRTC here)", False)


def test_the_form_is_said_once(caplog):
    package._log.cache_clear()
    with caplog.at_level("INFO", logger=package._logger.name):
        for _ in range(2):
            package._log("forward", (3, 8, 768), BF16, "two launches", "because")
    assert [r.getMessage() for r in caplog.records] == [
        "merge with means, forward of [3, 8, 768] torch.bfloat16: two launches (because)"
    ]


# On the device

ON_DEVICE = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")]
CASES = [  # samples, lengths, valid
    (3, (256, 64), None),
    (70, (256, 64), None),
    (3, (300, 70), [(300, 70), (290, 1), (17, 0)]),
    (5, (1,), None),
    (2, (37, 0, 20), [(37, 0, 3), (0, 0, 20)]),
    (3, (1024, 256), None),
    (2, (9, 2100), [(9, 2100), (1, 1555)]),
    (40, (64, 1024), [(64, 1024), (3, 700)] * 20),  # several units a cluster, rows loaded twice
]


@pytest.fixture
def clusters(monkeypatch):
    monkeypatch.setattr(package, "form_of", lambda *_: ("clusters", "a test"))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
class TestOnDevice:
    pytestmark = ON_DEVICE

    def test_outputs_and_gradients(self, case, tied, dtype, clusters, poisoned_memory):
        batch, lengths, valid = case
        inputs = [draw(batch, sum(lengths), 1024, seed=i, dtype=dtype) for i in (1, 2)]
        inputs += [draw(1024, seed=3 + i) for i in range(2 if tied else 3)]

        def op(x, f, *gains):
            counts = None if valid is None else torch.tensor(valid, device=x.device)
            gains = (*gains, None)[:3]
            return split_merge(x, f, *gains, Segments(lengths, counts), 1e-5)

        upstream = [draw(batch, sum(lengths), 1024, seed=9, dtype=dtype)]
        assert worst_error(op, inputs, upstream, "cuda") < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_strided_rows_and_numbers_for_gains(clusters, poisoned_memory):
    wide = [draw(3, 47, 2048, seed=i, dtype=BF16) for i in (1, 2)]
    alpha = draw(1, seed=3)

    def op(x, f, a):
        return split_merge(x[:, 3:40, 64:1088], f[:, 1:38, :1024], 0.3, a, 0.8, Segments((30, 7)))

    upstream = [draw(3, 37, 1024, seed=4, dtype=BF16)]
    assert worst_error(op, [*wide, alpha], upstream, "cuda") < tolerance(BF16)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_repeats_bit_for_bit_and_in_a_graph(clusters):
    x, f, g = (draw(64, 320, 1024, seed=i, dtype=BF16).cuda() for i in (1, 2, 3))
    gains = [draw(1024, seed=i).cuda().requires_grad_() for i in (4, 5)]
    leaves = [x.requires_grad_(), f.requires_grad_(), *gains]

    def both():
        y = split_merge(*leaves, None, Segments((256, 64)))
        return [y, *torch.autograd.grad(y, leaves, g)]

    first = [t.detach() for t in both()]  # nothing of its graph lives on
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [t.detach() for t in both()]
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_gains_that_are_numbers_need_no_branch_output_backward(clusters, poisoned_memory):
    inputs = [draw(3, 40, 1024, seed=i, dtype=BF16) for i in (1, 2)]

    def op(x, f):
        return split_merge(x, f, 0.6, 0.2, None, Segments((30, 10)))

    upstream = [draw(3, 40, 1024, seed=4, dtype=BF16)]
    assert worst_error(op, inputs, upstream, "cuda") < tolerance(BF16)
