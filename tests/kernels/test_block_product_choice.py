"""Whether products of a block in CUDA C++ serve on a machine: compared, timed, kept."""

import json

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels import capture
from mvsplit.kernels.hopper import block_product as product
from mvsplit.kernels.hopper import block_product_choice as choice
from mvsplit.kernels.hopper import child
from mvsplit.kernels.hopper.block_product import DOWN, HEAD, HEADS, UP
from mvsplit.kernels.hopper.driver import DriverError, FaultError

CPU = torch.device("cpu")
SHAPES = {UP: 256, DOWN: 256, HEADS: 768}
KINDS = [choice.Class(which, torch.bfloat16, 64, n, 101) for which, n in SHAPES.items()]
each = pytest.mark.parametrize("kind", KINDS, ids=["up", "down", "heads"])


def in_fp64(given, cut=None):
    """Formulas in place of the kernels."""
    x, w = given.x.double(), given.w.double()
    if given.turns is not None:
        cos, sin, n, eps = given.turns
        heads = (x @ w.T).unflatten(1, (-1, HEAD))
        cos, sin = (t[: len(x), None].double().repeat(1, 1, 2) for t in (cos, sin))
        first, second = heads[:, :n].chunk(2, -1)
        turned = heads[:, :n] * cos + torch.cat((second, -first), -1) * sin
        r = (turned.square().mean(-1) + eps).rsqrt()
        found = torch.cat((turned * r[..., None], heads[:, n:]), 1).flatten(1)
        return found.to(given.x.dtype), r.float()
    packed = x @ w.T if given.packed is None else given.packed
    packed = packed.to(given.x.dtype)
    gate, value = packed.double().chunk(2, 1)
    s, found = gate.sigmoid(), packed
    if given.packed is not None:
        dh = x @ w
        found = torch.cat((dh * value * (s + gate * s * (1 - s)), dh * gate * s), 1)
    return found.to(given.x.dtype), (gate * s * value).to(given.x.dtype)


@pytest.fixture
def stand_ins(monkeypatch):
    """Formulas, and times of cuts; of libraries and of all others one second."""
    monkeypatch.setattr(choice, "run", in_fp64)
    monkeypatch.setattr(choice, "_LESS", 0)
    monkeypatch.setattr(capture, "recorded", lambda way: (way, None))
    times = {}
    monkeypatch.setattr(capture, "replay_time", lambda way, _: times.get(way.args[-1], 1.0))
    return times


@each
def test_what_it_replaces_is_the_same(kind):
    given = choice.draw(kind, 640, CPU)
    found = in_fp64(given._replace(turns=whole(given.turns)))
    for ours, theirs in zip(found, libraries(given), strict=True):
        assert (ours.double() - theirs.double()).norm() < 6e-3 * ours.double().norm()


def whole(turns):
    """Of two samples, one after the other."""
    return turns and turns._replace(cos=turns.cos.repeat(2, 1), sin=turns.sin.repeat(2, 1))


def libraries(given):
    first, second = choice.by_libraries(given)
    return first, second.flatten(0, -2)


@each
def test_the_fastest_that_is_right_serves_if_it_is_faster(kind, stand_ins, monkeypatch):
    cuts = choice.cuts_for(kind)
    assert choice._verdict(kind, CPU)[0].startswith("slower: 1000000 µs where libraries take 1000")
    stand_ins |= {cuts[1]: 0.5, cuts[0]: 0.7}
    assert choice._verdict(kind, CPU) == (f"right, {cuts[1]}", True)
    calls = []

    def wrong(change, *which):
        def found(given, cut):
            results = in_fp64(given)
            if cut in which:
                change(*results)
            return results

        return found

    def some_tile(first, second):
        first[16:32, 64:128] *= 1.02

    def last_row(first, second):
        second[-1, -1] = torch.nan

    def second_result(first, second):
        second[5] *= 1.02

    def now_and_then(first, second):
        calls.append(None)
        second[0, 0] += len(calls) % 2

    for change in (some_tile, last_row, second_result, now_and_then):
        monkeypatch.setattr(choice, "run", wrong(change, cuts[1]))
        assert choice._verdict(kind, CPU) == (f"right, {cuts[0]}", True)
    monkeypatch.setattr(choice, "run", wrong(some_tile, *cuts))
    words, lasting = choice._verdict(kind, CPU)
    assert words.startswith("off by 2")
    assert lasting


def test_a_cut_that_cannot_be_made_is_passed_over_and_a_fault_is_not(stand_ins, monkeypatch):
    kind = KINDS[0]
    cuts = choice.cuts_for(kind)
    stand_ins |= dict.fromkeys(cuts, 0.5)

    def fails(error, *which):
        def found(given, cut):
            if cut in which:
                raise error
            return in_fp64(given)

        return found

    monkeypatch.setattr(choice, "run", fails(DriverError("no room"), cuts[0]))
    assert choice._verdict(kind, CPU) == (f"right, {cuts[1]}", True)
    monkeypatch.setattr(choice, "run", fails(DriverError("no NVRTC"), *cuts))
    assert choice._verdict(kind, CPU) == ("cannot be made here (no NVRTC)", False)
    monkeypatch.setattr(choice, "run", fails(FaultError("launch"), cuts[0]))
    with pytest.raises(FaultError):
        choice._verdict(kind, CPU)
    assert choice._verdict(kind, CPU, plainest=True) == (f"right, {cuts[-1]}", True)


def test_after_a_fault_the_plainest_is_asked_about_alone(monkeypatch, caplog):
    asked = []
    answers = {False: ("faults here (719)", True), True: ("right, the plainest", True)}

    def tell(code, task, patience):
        asked.append(json.loads(task)[-1])
        return answers[asked[-1]]

    monkeypatch.setattr(child, "verdict", tell)
    assert choice._verdict_elsewhere(KINDS[0], CPU) == ("right, the plainest", True)
    assert asked == [False, True]
    assert "719" in caplog.text
    ended = "the comparison ended without a verdict (no memory)"  # no kernel's doing
    for words in ("right, a cut", "slower: 2 µs where libraries take 1 µs", "off by 1e-1", ended):
        answers[False] = words, True
        asked.clear()
        assert choice._verdict_elsewhere(KINDS[0], CPU) == (words, True)
        assert asked == [False]


def test_the_comparison_has_a_process_of_its_own(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "from mvsplit.kernels.hopper import block_product_choice as choice\n"
        "def verdict(kind, device, *, plainest): return f'right {kind.rows} {plainest}', True\n"
        "choice._verdict = verdict\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choice._verdict_elsewhere(KINDS[1], CPU) == ("right 101 False", True)


def test_what_serves_is_kept_and_never_found_out_in_a_capture(monkeypatch, tmp_path):
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    capturing, asked, cut = [True], [], choice.CUTS[DOWN][1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    given = f"right, {cut}", True
    monkeypatch.setattr(choice, "_verdict_elsewhere", lambda kind, _: asked.append(kind) or given)
    monkeypatch.setattr(choice, "_verdicts", {})
    x, w, packed = (
        torch.empty(s, dtype=torch.bfloat16) for s in ((4608, 64), (64, 768), (4608, 1536))
    )
    assert "captured" in choice.serving(DOWN, x, w, packed)
    capturing[0] = False
    assert choice.serving(DOWN, x, w, packed) == cut
    capturing[0] = True  # what is known may be used there
    assert choice.serving(DOWN, x, w, packed) == cut
    assert asked == [choice.Class(DOWN, torch.bfloat16, 64, 768, 4608)]
    assert "fewer than 4000" in choice.serving(DOWN, x[:3999], w, packed[:3999])


def test_what_the_kernels_do_not_take_is_told(monkeypatch):
    x, w13 = (torch.empty(s, dtype=torch.bfloat16) for s in ((8, 64), (512, 64)))
    assert "Hopper" in product.obstacle(UP, x, w13, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert product.obstacle(UP, x, w13, None) is None
    assert "alike" in product.obstacle(UP, x, w13.half(), None)
    assert "alike" in product.obstacle(UP, x.float(), w13.float(), None)
    assert "multiple" in product.obstacle(UP, x, w13[:192], None)
    assert "multiple" in product.obstacle(UP, x[:, :48], w13[:, :48], None)
    assert "16 bytes" in product.obstacle(UP, torch.empty(8, 68, dtype=x.dtype)[:, :64], w13, None)
    assert "16 bytes" in product.obstacle(UP, x, torch.empty(64, 512, dtype=x.dtype).T, None)
    assert product.obstacle(DOWN, x, w13.view(64, 512), torch.empty(8, 1024, dtype=x.dtype)) is None


@pytest.mark.parametrize("which", [UP, DOWN])
def test_every_cut_fits_and_is_plain_at_last(which):
    for cut in product.CUTS[which]:
        assert product.shared_bytes(cut, which) <= 232_448
        assert "#define TRAP 1" in product.source(cut, which, 1024, torch.float16)
    assert product.CUTS[which][-1].cluster == 1
