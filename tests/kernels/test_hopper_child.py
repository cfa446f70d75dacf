"""The process in which kernels are tried: where they run, and which of its verdicts last."""

import json
import os
import sys
import threading
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


def test_what_another_process_has_found_meanwhile_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def find(kind, device):
        child.remember("merge", kind, "right, by another")
        return "right, by this one", True

    found = child.known({}, "a kind", torch.device("cpu"), "merge", lambda kind, _: kind, find)
    assert found == ("right, by another", True)


def test_processes_are_asked_side_by_side_and_none_stays(tmp_path):
    meet = (
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / sys.argv[1]).touch()\n"
        "while len(list(folder.iterdir())) < 2: time.sleep(0.01)\n"
        "print('[\"right ' + sys.argv[1] + '\", true]')\n"
    )
    assert child.verdicts([(meet, "a"), (meet, "b")], 20.0) == [
        ("right a", True),
        ("right b", True),
    ]
    pids = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid ' + sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    found = child.verdicts([(pids, "c"), (pids, "d")], 1.0)
    assert found == [("no verdict within 1 s", False)] * 2
    for name in "cd":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid {name}").read_text()), 0)


def test_a_gpu_is_timed_by_one_process_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path / "new"))
    order, device = [], torch.device("cuda", 0)

    def other():
        with child.alone(device):
            order.append("other")

    with child.alone(device):
        thread = threading.Thread(target=other)
        thread.start()
        with child.alone(torch.device("cuda", 1)):  # another GPU
            thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path / "file"))  # no place for a lock
    with child.alone(device):
        order.append("without")
    assert order[-1] == "without"
