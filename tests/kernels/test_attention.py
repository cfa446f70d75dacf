"""Which attention kernel is chosen, with the measurement replaced (the choice needs no GPU)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mvsplit.kernels import Segments, attention
from mvsplit.kernels.attention import attend
from mvsplit.kernels.choices import recall

TIMES = {
    "cudnn": 0.2,
    "flash": 0.3,
    "mem-efficient": 0.5,
    "flash in sequences": 0.19,
    "cudnn with zero keys": 0.1,
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A GPU on which kernels take `times`, or raise what stands there instead."""
    times: dict[str, Any] = dict(TIMES)

    def trial(*inputs: Any) -> Any:
        return next(name for name, way in attention._ALL_WAYS.items() if way is inputs[-1])

    def milliseconds(name: str) -> float:
        if isinstance(times[name], Exception):
            raise times[name]
        return times[name]

    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(attention, "_trial", trial)
    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    monkeypatch.setattr(attention, "off_by", lambda *inputs: 0.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return times


NO_PADDING = Segments((1, 1))


def choose(segments: Segments = NO_PADDING, zero: bool = False) -> str:
    q = torch.zeros(1, 1, 2, 4)
    way = attention._choose(q, q, q, segments, zero)
    if way is attention._ANY:
        return "any"
    return next(name for name, known in attention._ALL_WAYS.items() if known is way)


def kept() -> str | None:
    q = torch.zeros(1, 1, 2, 4)
    return recall("attention", attention._name(attention._key(q, q, NO_PADDING, False)))


class OnGpu(torch.Tensor):
    """A tensor that says so, and is no more to a `TorchFunctionMode` than any other."""

    is_cuda = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (attend, functional.scaled_dot_product_attention):
            self.calls.append((func, args, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("zero", [False, True])
def test_on_a_gpu_those_who_listen_are_shown_one_call_whichever_way_serves(
    monkeypatch: pytest.MonkeyPatch, zero: bool
) -> None:
    """And the trials by which a way is chosen are none."""
    q, k, v = (torch.randn(1, 1, 2, 4) for _ in range(3))

    def choose(*inputs: Any) -> Any:
        assert inputs[-1] is zero
        functional.scaled_dot_product_attention(q, k, v)
        return lambda q, k, v, segments: q + k + v

    monkeypatch.setattr(attention, "_choose", choose)
    ours = [each.as_subclass(OnGpu) for each in (q, k, v)]
    with Listening() as outer, Listening() as inner:
        out = attend(*ours, NO_PADDING, zero_padding=zero)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), q + k + v)
    for mode in (outer, inner):
        ((func, args, kwargs),) = mode.calls
        assert func is attend
        assert all(one is other for one, other in zip(args, (*ours, NO_PADDING), strict=True))
        assert kwargs == {"zero_padding": zero}


def test_the_fastest_serves_and_is_kept(machine: dict[str, Any]) -> None:
    assert choose() == "cudnn"
    machine.update(cudnn=9.0)
    attention._chosen.clear()  # as in another process
    assert choose() == "cudnn"
    assert kept() == "cudnn"


def test_a_choice_that_is_not_trusted_any_more_is_made_anew(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    reasons: list[str | None] = [None]
    monkeypatch.setattr(attention, "obstacle_in_cuda", lambda *a, gradients: reasons[0])
    name = "unit heads in CUDA C++, gradients by it"
    machine.update({name: 0.05})
    assert choose(zero=True) == name
    machine.update({name: 0.5})
    attention._chosen.clear()  # as in another process
    assert choose(zero=True) == name
    attention._chosen.clear()
    reasons[0] = "no verdict"
    assert choose(zero=True) == "cudnn"


def test_a_kernel_that_refuses_is_passed_over(machine: dict[str, Any]) -> None:
    machine.update(cudnn=RuntimeError("no bias of odd length"))
    assert choose() == "flash"
    assert kept() == "flash"


def test_a_choice_made_without_memory_does_not_last(machine: dict[str, Any]) -> None:
    machine.update(cudnn=torch.OutOfMemoryError("full"))
    assert choose() == "flash"
    assert kept() is None


def test_a_choice_without_kernels_that_could_not_be_compared_does_not_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from mvsplit.kernels.hopper import unit_heads, unit_heads_choice

    verdicts = [("no verdict within 120 s", False), ("faults here (an illegal access)", True)]
    monkeypatch.setattr(unit_heads, "obstacle", lambda *_: None)
    monkeypatch.setattr(unit_heads_choice, "_verdict_elsewhere", lambda *_: verdicts[0])
    monkeypatch.setattr(unit_heads_choice, "_verdicts", {})
    monkeypatch.setattr(unit_heads_choice, "_name", lambda kind, device: str(kind))
    monkeypatch.setattr(attention, "ways", lambda *_: attention._IN_CUDA | attention._WAYS)
    monkeypatch.setattr(attention, "off_by", lambda way, *inputs: way(*inputs[:4]) and 0.0)
    assert choose() == "cudnn"
    assert kept() is None
    attention._chosen.clear()  # as in another process
    unit_heads_choice._verdicts.clear()
    del verdicts[0]
    assert choose() == "cudnn"
    assert kept() == "cudnn"


def test_a_choice_says_nothing_of_kernels_that_are_cut_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever file of theirs has changed."""
    folder = attention._HOPPER
    names = set(re.findall(r'"(\w+\.cu)"', (folder / "unit_heads.py").read_text()))
    names |= {"attention_three.cu", "unit_heads.py", "attention.py", "wgmma.py"}
    assert "attention_backward.cu" in names
    shutil.copytree(folder, tmp_path / "hopper")
    monkeypatch.setattr(attention, "_HOPPER", tmp_path / "hopper")
    found = [attention._kernels.__wrapped__()]
    for name in sorted(names):
        with (tmp_path / "hopper" / name).open("a") as file:
            file.write("\n")
        found.append(attention._kernels.__wrapped__())
    assert len(set(found)) == 1 + len(names)


def test_no_kernel_at_all_is_an_error(machine: dict[str, Any]) -> None:
    machine.update({name: RuntimeError("refused") for name in attention._WAYS})
    with pytest.raises(RuntimeError, match="no attention kernel takes"):
        choose()


def test_nothing_is_measured_during_a_capture(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "any"
    assert kept() is None


@pytest.mark.parametrize(
    ("real_first", "zero", "chosen"),
    [
        (True, False, "flash in sequences"),
        (True, True, "cudnn with zero keys"),
        (False, True, "cudnn with zero keys"),
        (False, False, "cudnn"),
    ],
)
def test_ways_that_need_a_promise_serve_only_where_it_was_given(
    real_first: bool, zero: bool, chosen: str
) -> None:
    segments = Segments((1, 1), torch.tensor([[1, 0]]), real_first)
    assert choose(segments, zero) == chosen
    assert choose() == "cudnn"  # without padding none of them is asked


@pytest.mark.parametrize("error", [3.0, float("inf"), float("nan"), TypeError("no such kernel")])
def test_a_way_of_ours_that_is_wrong_does_not_serve(
    error: Any,
    machine: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def off_by(way: Any, *inputs: Any) -> float:
        if way is not attention.with_zero_keys:
            return 1.2
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr(attention, "off_by", off_by)
    segments = Segments((1, 1), torch.tensor([[1, 0]]), real_first=True)
    assert choose(segments, zero=True) == "flash in sequences"
    said = "attention by cudnn with zero keys is off" in caplog.text
    assert said != isinstance(error, Exception)


def test_padding_is_no_key() -> None:
    """Against softmax over the real keys alone, in fp64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    found = attend(q, k, v, Segments((2, 3), torch.tensor([[2, 1], [2, 3]])))
    for b, real in ((0, 3), (1, 5)):
        for h in range(4):
            keys, values = k[b, h // 2, :real], v[b, h // 2, :real]
            wanted = torch.softmax(q[b, h] @ keys.T / 2, -1) @ values
            torch.testing.assert_close(found[b, h], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["flash in sequences", "cudnn with zero keys"])
def test_ways_beneath_the_checks_of_pytorch_refuse_what_they_would_misread(
    way: str, dtype: torch.dtype
) -> None:
    """cuDNN's operator takes fp32 for fp16: its answer came soonest, and was NaN."""
    segments = Segments.image_and_text(3, 2, torch.tensor([1]))
    q = torch.randn(1, 1, 5, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"takes bf16 and fp16, not torch\.float"):
        attention._ALL_WAYS[way](q, q, q, segments)
