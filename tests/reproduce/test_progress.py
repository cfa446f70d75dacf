"""How far runs are: what is said while they train, to whom, and of whose runs."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mvsplit.reproduce import Study, get_claim, study
from mvsplit.reproduce.progress import Progress, read_progress, time_left
from mvsplit.reproduce.trial import RECORD, Trial, run_trial
from mvsplit.training.run_folder import FolderInUse, holder_of
from mvsplit.training.traces import LOCK
from tests.reproduce.tiny import TINY

CLAIM = get_claim("thousand")
ALONE = dataclasses.replace(TINY, seeds=(0,), few=(0,))
FIRST, SECOND = CLAIM.trials(ALONE)


def run(name: str, step: int = 0, seconds: float | None = None, seen: int = 9) -> Progress:
    seen = seen if seconds else 0
    return Progress(name=name, steps=100, layers=10, step=step, seconds=seconds, seen=seen)


def test_a_pace_is_that_of_the_latest_steps_and_says_what_is_left(tmp_path):
    path = tmp_path / "a"
    found = read_progress(path, steps=60, layers=4)
    assert found.line() == "a: no step of 60 yet"
    path.mkdir()
    lines = [{"step": n, "seconds": 9.0 if n <= 2 else 0.5} for n in range(1, 13)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"step": 13, "sec')  # being written
    found = read_progress(path, steps=60, layers=4)
    assert found.line() == "a: step 12 of 60, 0.500 s a step, 24 s left"
    (path / "metrics.jsonl").write_text(text[: text.index("\n") + 1])
    found = read_progress(path, steps=60, layers=4)
    assert found.line() == "a: step 1 of 60, 9.000 s a step"  # too early for more
    assert run("b", 10, 2.0).line() == "b: step 10 of 100, 2.000 s a step, 3 min left"


def test_what_is_left_of_all_counts_runs_that_have_not_begun():
    half, new = run("a", 50, 0.1), run("b")
    assert time_left([half], 2) == pytest.approx(5)
    assert time_left([half, new], 1) == pytest.approx(5 + 10)
    assert time_left([half, new], 2) == pytest.approx(10)  # no sooner than the longest
    deep = dataclasses.replace(new, layers=40)
    assert time_left([half, deep], 1) == pytest.approx(5 + 40)
    assert time_left([new, run("c", 1, 3.0, seen=1)], 2) is None


def test_a_study_says_at_once_what_it_begins_and_then_how_far_it_is(tmp_path, monkeypatch):
    heard, said = threading.Event(), list[str]()
    words = (f"{FIRST.name}: step 4 of 8, 0.250 s a step, 1 s left", "2 runs are left, about 3 s")

    def say(text: str) -> None:
        said.append(text)
        if all(any(line.startswith(part) for line in said) for part in words):
            heard.set()
            (tmp_path / "over").touch()

    one = Study(tmp_path, ALONE, workers=1, say=say)
    one.patience = 0.05
    monkeypatch.setattr(study, "run_trial", long)
    assert one.run([CLAIM]) == []
    assert heard.is_set()
    assert said[0] == "2 runs to train, 1 at a time; how far they are is told as they go"


def long(trial: Trial, folder: Path, end: float) -> bool:
    """A run that stands at step 4 until somebody has heard of it; in a worker."""
    log = folder / trial.name / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    lines = [{"step": n, "seconds": 0.25} for n in range(1, 5)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    while not (folder.parents[1] / "over").exists():
        time.sleep(0.01)
    return True


def test_a_log_has_each_line_as_it_is_said(tmp_path):
    code = (
        "import sys; from mvsplit.reproduce.progress import say_at_once;"
        "say_at_once('a line'); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        reader = threading.Thread(target=process.stdout.readline, daemon=True)
        reader.start()
        reader.join(60)
        assert not reader.is_alive()
        process.stdin.close()


def test_two_processes_share_the_runs_of_one_folder(tmp_path):
    """The other one, here this process, holds a run and goes away without having trained it."""
    said: list[str] = []
    runs = tmp_path / "tiny" / "runs"
    lock = runs / FIRST.name / LOCK
    lock.parent.mkdir(parents=True)
    with open(lock, "w", encoding="utf-8") as file:
        file.write("process 7 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holder_of(lock.parent) == "process 7 on elsewhere"
        with pytest.raises(FolderInUse, match="in use by process 7"):
            run_trial(FIRST, runs)

        def say(text: str) -> None:
            said.append(text)
            if text.startswith(SECOND.name):  # trained, with the other one still held
                fcntl.flock(file, fcntl.LOCK_UN)

        results = Study(tmp_path, ALONE, workers=1, say=say).run([CLAIM], minutes=5)
    assert [result["claim"] for result in results] == ["thousand"]
    assert (runs / FIRST.name / RECORD).exists()
    assert said[0] == (
        f"other processes work in {tmp_path / 'tiny'}, too ({FIRST.name} by process 7 on "
        "elsewhere): each run is trained by one of them, and this one waits for those that it needs"
    )
    assert said[2] == f"{FIRST.name}: another process trains it; waiting for that"
    assert [line.partition(" ")[0] for line in said[3:]] == [SECOND.name, FIRST.name]
    assert holder_of(lock.parent) is None
    assert holder_of(tmp_path) is None
