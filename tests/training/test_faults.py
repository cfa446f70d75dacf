"""What a run on two processes does when a process, the disk or a signal fails it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from mvsplit.data import Loader
from mvsplit.errors import UserError
from mvsplit.training.checkpoint import list_checkpoints, load_latest, step_of
from mvsplit.training.stall import STALLED, Seen, StallWatch, describe, stalled
from tests.slow import slow
from tests.training import ranks, runs

SIZES = "--model.depth 2 --model.width 16 --model.ffn-width 24 --model.text-width 16 --batch-size 4"
OPTIONS = f"{SIZES} --warmup 3 --probe-every 3 --device cpu --save-every 3 --steps 9".split()


def place(run: Path) -> list[str]:
    return [*OPTIONS, "--run-dir", str(run)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ranks.train(place(run), 2) == [0, 0]
    return run


def saved(run: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


# Hooks, which run in a process of the run before its command


def at_batch(rank: int, number: int, action: str, here: int) -> None:
    """Has rank `rank` die, hang or get a signal when it asks for its `number`-th batch."""
    if here == rank:
        asked, next_batch = 0, Loader.next_batch

        def disturbed(loader: Loader) -> object:
            nonlocal asked
            asked += 1
            if asked == number:
                _ACTIONS[action]()
            return next_batch(loader)

        Loader.next_batch = disturbed  # type: ignore[assignment, method-assign]


def terminate_twice() -> None:
    """Under torchrun a signal to all processes comes twice: torchrun hands it on."""
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


_ACTIONS: dict[str, Any] = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(1000),
    "end": terminate_twice,
}


def at_change(rank: int, number: int, here: int) -> None:
    """Has rank `rank` die before its `number`-th change of the disk, that of a save for example."""
    if here == rank:
        runs._crash_before_change(number)


@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_one_rank_ends_all_and_costs_the_steps_since_the_save(
    tmp_path: Path, undisturbed: Path, rank: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    statuses = ranks.train(place(run), 2, hook=partial(at_batch, rank, 8, "die"), log=log)
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 2
    assert log.read_text().count("another process of the run has ended") == 1
    assert saved(run)[-1] in (3, 6)  # the save of step 6 was under way, whole or not at all
    assert ranks.train(place(run), 2) == [0, 0]
    runs.assert_same_run(run, undisturbed)


@pytest.mark.parametrize(("rank", "number"), [(0, 13), (0, 19), (1, 2), (1, 9)])
def test_death_in_the_middle_of_a_save(
    tmp_path: Path, undisturbed: Path, rank: int, number: int
) -> None:
    run = tmp_path / "run"
    statuses = ranks.train(place(run), 2, hook=partial(at_change, rank, number))
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] != 0
    load_latest(run / "checkpoints")  # what has a name is whole
    assert ranks.train(place(run), 2) == [0, 0]
    runs.assert_same_run(run, undisturbed)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        f"step_{step:08}" for step in (3, 6, 9)
    ]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    statuses = ranks.train(place(run), 2, hook=partial(at_batch, 1, 5, "end"))
    assert statuses == [128 + signal.SIGTERM] * 2
    assert saved(run) == [3, 5]
    last = runs.lines(run / "events.jsonl")[-1]
    assert "stopped by SIGTERM after step 5 of 9, saved" in last["message"]
    assert ranks.train(place(run), 2) == [0, 0]
    assert runs.log_of(run) == runs.log_of(undisturbed)


def test_a_full_disk_stops_all_at_the_next_step(small_disk: Path) -> None:
    run, log = small_disk / "run", small_disk.parent / f"{small_disk.name}.log"
    wide = ["--model.width", "64", "--model.ffn-width", "96"]  # of one, not of two checkpoints
    assert ranks.train([*place(run), *wide], 2, log=log) == [2, 2]
    said = log.read_text()
    assert said.count("cannot save the checkpoint of step") == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert saved(run) in ([], [3])
    load_latest(run / "checkpoints")


@pytest.mark.parametrize("action", ["hang", "freeze"])
def test_a_rank_that_stalls_is_named_and_all_stop(tmp_path: Path, action: str) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = ["train", "tiny", *place(run), "--parallel.timeout", "2"]
    processes = ranks.start(arguments, 2, hook=partial(at_batch, 1, 5, action), log=log)
    processes[0].join(60)
    assert processes[0].exitcode == STALLED
    if action == "freeze":
        processes[1].kill()  # as torchrun does
    assert ranks.finish(processes)[1] in (STALLED, -signal.SIGKILL)
    assert log.read_text().count("rank 1 of 2 has not moved for") == 1
    last = runs.lines(run / "events.jsonl")[-1]
    assert last["event"] == "stalled"
    assert action == "freeze" or "at the batch of step 5;" in last["message"]
    assert ("sign of life" in last["message"]) == (action == "freeze")


def test_who_has_stalled() -> None:
    def seen(count: int, moved: float, alive: float, place: str = "") -> Seen:
        return Seen(count, place or (f"place {count}" if count else "the start"), 0, moved, alive)

    assert stalled([seen(5, 90, 99), seen(5, 95, 99)], now=100, timeout=10) == []
    assert stalled([seen(5, 89, 99), seen(4, 85, 99)], now=100, timeout=10) == [1]
    assert stalled([seen(5, 89, 99), seen(5, 95, 80)], now=100, timeout=10) == [1]
    assert stalled([seen(0, 20, 99), seen(0, 20, 99)], now=100, timeout=10) == []
    assert stalled([seen(0, 20, 120), seen(1, 99, 120)], now=121, timeout=10) == [0]
    assert stalled([seen(5, 20, 99), seen(4, 20, 99, "the save")], now=100, timeout=10) == []
    assert stalled([seen(5, 20, 120), seen(4, 20, 120, "the save")], now=121, timeout=10) == [1]
    both = [seen(5, 80, 99), seen(5, 80, 99)]
    assert stalled(both, now=100, timeout=10) == [0, 1]
    assert "no rank has moved for 20 s" in describe([0, 1], dict(enumerate(both)), now=100)


def test_a_stall_that_cannot_be_written_down_ends_the_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(message: str) -> None:
        raise UserError("cannot write events.jsonl: No space left on device")

    def leave(status: int) -> None:
        raise SystemExit(status)

    watch = StallWatch(HashStore(), 0, 2, timeout=1000)
    watch.close()
    watch.tell = full
    watch._seen = {n: Seen(5 - n, "the batch", 1, 0, time.monotonic()) for n in range(2)}
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        watch._end([1])
    assert left.value.code == STALLED
    said = capsys.readouterr().err
    assert "rank 1 of 2 has not moved for" in said
    assert "No space left on device" in said


def kill_first_rank(run: Path) -> None:
    """Kills the process that holds the run's folder, once a checkpoint is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list_checkpoints(run / "checkpoints"):
            return os.kill(int((run / ".lock").read_text().split()[1]), signal.SIGKILL)
        time.sleep(0.01)
    raise TimeoutError(f"{run} has no checkpoint")


@slow
def test_torchrun_carries_on_by_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--standalone", "--max-restarts", "1", "-m", "mvsplit", "train", "tiny"]
    arguments = [*place(run), "--steps", "60"]
    with subprocess.Popen([*torchrun, *options, *arguments]) as process:
        kill_first_rank(run)
        assert process.wait(120) == 0
    messages = [event["message"] for event in runs.lines(run / "events.jsonl")]
    assert any("resumed" in message for message in messages)
    assert "finished step 60 of 60" in messages[-1]
    assert [line["step"] for line in runs.lines(run / "metrics.jsonl")] == list(range(1, 61))
