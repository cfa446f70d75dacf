"""The process in which kernels are tried: where they run, and which of its verdicts last."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels.hopper import (
    block_product_choice,
    child,
    driver,
    merge_choice,
    unit_heads_choice,
)

BOTH = [
    (merge_choice, ["forward", "bfloat16", 2, "", False, True]),
    (unit_heads_choice, [64, True, True]),
    (block_product_choice, [0, "bfloat16", 64, 256, 4608, False]),
]


@pytest.mark.parametrize(("choice", "kind"), BOTH)
def test_kernels_are_tried_on_the_device_that_was_asked_about(choice, kind, monkeypatch, capsys):
    current, empty = [0], torch.empty
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(torch, "empty", lambda *a, device: empty(*a))
    monkeypatch.setattr(
        choice, "_verdict", lambda kind, device, **_: (f"{current[-1]} {device}", True)
    )
    monkeypatch.setattr(sys, "argv", ["-c", json.dumps(["cuda:3", *kind])])
    choice._tell_verdict()
    assert json.loads(capsys.readouterr().out) == ["3 cuda:3", True]


@pytest.fixture
def word(monkeypatch):
    """What kernels write when a wait in them did not end."""
    there = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(driver, "_faults", [there])
    return there


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: unspecified launch failure\nSearch for it"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        driver.FaultError("launch: unspecified launch failure (719)"),
    ],
)
def test_a_fault_lasts_and_a_wait_in_vain_does_not(error, word, capsys):
    """Whoever is told of it."""

    def find():
        raise error

    child.tell(find)
    verdict, lasting = json.loads(capsys.readouterr().out)
    assert verdict == f"faults here ({str(error).splitlines()[0]})"
    assert lasting
    word.fill_(1)
    child.tell(find)
    verdict, lasting = json.loads(capsys.readouterr().out)
    assert "did not end within seconds" in verdict
    assert not lasting


@pytest.mark.parametrize(("code", "fault"), [(700, True), (719, True), (2, False), (701, False)])
@pytest.mark.parametrize("choice", [merge_choice, unit_heads_choice])
def test_a_fault_that_the_driver_tells_is_none_of_what_cannot_be_made(
    choice, code, fault, monkeypatch
):
    class Driver:
        def cuGetErrorString(self, code, to):
            pass

    kind = SimpleNamespace(turned=False)
    monkeypatch.setattr(driver, "_driver", Driver)
    monkeypatch.setattr(choice, "_off_by", lambda *_: driver._check(code, "launch"))
    if fault:
        with pytest.raises(driver.FaultError, match=f"unknown error .{code}."):
            choice._verdict(kind, torch.device("cpu"))
    else:
        verdict, lasting = choice._verdict(kind, torch.device("cpu"))
        assert verdict == f"cannot be made here (launch: unknown error ({code}))"
        assert not lasting


def test_what_a_verdict_is_kept_by_is_found_out_once(monkeypatch, tmp_path):
    """It takes the kernels' sources, and every call of a merge asks for the verdict."""
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked, verdicts, device = [], {}, torch.device("cpu")

    def name(kind, _):
        asked.append(kind)
        return f"of {kind}"

    found = [
        child.known(verdicts, "a kind", device, "merge", name, lambda *_: ("right", True))
        for _ in range(3)
    ]
    assert found == [("right", True)] * 3
    assert asked == ["a kind"]
