"""No worker outlives the process that started it, however that one ends, and none begins anything
after a signal."""

import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from mvsplit.reproduce.workers import worker_pool
from tests.reproduce.processes import begun, wait_until

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
FOLDER = Path(__file__).parents[2] / "mvsplit" / "reproduce"
SCRIPT = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
import workers  # alone: the package around it takes seconds to import

FOLDER = Path(sys.argv[1])

def begin(name):
    (FOLDER / name).write_text("")

def sleeping(name):
    begin(name)
    time.sleep(600)

def saving(name):  # as a training does
    told = []
    signal.signal(signal.SIGTERM, lambda *_: (told.append(1), signal.signal(signal.SIGTERM, 0)))
    begin(name)
    while not told:
        time.sleep(0.01)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # a second SIGTERM would end it here
        time.sleep(0.01)
    begin(name + ".saved")

def deaf(name):  # in C, and holding the interpreter
    code = f"import time; open({str(FOLDER / name)!r} + '.CHILD', 'w'); time.sleep(600)"
    for session in (False, True):
        command = [sys.executable, "-c", code.replace("CHILD", f"child{session:d}")]
        subprocess.Popen(command, start_new_session=session)
    orphan = code.replace("CHILD", "orphan")
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}])"
    subprocess.run([sys.executable, "-c", code], start_new_session=True)
    while len(list(FOLDER.glob(name + ".*"))) < 3:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, lambda *_: None)
    begin(name)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second is never over
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)

def mixed(name):
    (deaf if name == "0" else saving)(name)

if __name__ == "__main__":
    workers.GRACE = float(sys.argv[3])
    with workers.worker_pool(2) as pool:
        begin("pool")
        jobs = [pool.submit(globals()[sys.argv[2]], str(k)) for k in range(5)]
        begin("submitted")
        for job in jobs:
            job.result()
            begin("went on")
"""


@pytest.fixture
def start(tmp_path):
    """Begins the script; its jobs say when they have begun by files in `tmp_path / "began"`."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "began").mkdir()

    def start(job: str, grace: float = 600.0):
        command = [sys.executable, tmp_path / "script.py", tmp_path / "began", job, str(grace)]
        return begun(command, PYTHONPATH=str(FOLDER))

    return start


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "began").iterdir()} - {"pool", "submitted"}


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["pool", "submitted", "0", "1"])
def test_a_signal_ends_all_and_begins_nothing(tmp_path, start, number, moment):
    with start("sleeping") as it:
        it.wait_until((tmp_path / "began" / moment).exists)
        before = names(tmp_path)
        it.send(number, group=number == signal.SIGINT)  # as a terminal does
        status, _, errors = it.end()
        assert (status, errors) == (128 + number, "")
        wait_until(lambda: not it.left())
        assert before <= names(tmp_path) <= {"0", "1"}


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_saves_itself_and_nothing_that_waits_begins(tmp_path, start, number):
    with start("saving") as it:
        it.wait_until(lambda: names(tmp_path) == {"0", "1"})
        it.send(number, group=number == signal.SIGINT)
        status, _, errors = it.end()
        assert (status, errors) == (128 + number, "")
        wait_until(lambda: not it.left())
        assert names(tmp_path) - {"went on"} == {"0", "0.saved", "1", "1.saved"}


@linux
def test_what_does_not_hear_is_killed_in_time_with_all_that_it_began(tmp_path, start):
    with start("mixed", grace=3.0) as it:
        it.wait_until(lambda: {"0", "1"} <= names(tmp_path))
        assert len(it.left()) == 7  # it, a tracker of resources, two workers, three children
        it.send(signal.SIGTERM)
        status, _, errors = it.end()
        assert (status, errors) == (143, "")
        wait_until(lambda: not it.left())
        assert "1.saved" in names(tmp_path)
        assert "2" not in names(tmp_path)


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_all_at_once(tmp_path, start, number):
    with start("deaf") as it:
        it.wait_until(lambda: {"0", "1"} <= names(tmp_path))
        it.insist(number)
        status, _, errors = it.end()
        assert (status, errors) == (128 + number, "")
        wait_until(lambda: not it.left())
        assert "2" not in names(tmp_path)


@linux
def test_many_signals_end_it_whatever_it_is_about(tmp_path, start):
    with start("saving") as it:
        it.wait_until((tmp_path / "began" / "pool").exists)
        while it.process.poll() is None:
            it.send(signal.SIGTERM)
            time.sleep(0.01)
        assert it.end()[0] in (143, -signal.SIGTERM)  # the latter where Python is ending
        wait_until(lambda: not it.left())
        assert "2" not in names(tmp_path)


@linux
def test_workers_end_with_a_parent_that_is_killed(tmp_path, start):
    with start("sleeping") as it:
        it.wait_until(lambda: names(tmp_path) == {"0", "1"})
        it.send(signal.SIGKILL)
        assert it.process.wait() == -signal.SIGKILL
        wait_until(lambda: not it.left())
        assert names(tmp_path) == {"0", "1"}


class Odd(Exception):
    """One that does not come through a pipe."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two}")


def task(name: str):
    if name == "error":
        raise ValueError("no such thing")
    if name == "odd":
        raise Odd(1, 2)
    if name == "function":
        return lambda: 0
    if name == "dies":
        signal.raise_signal(signal.SIGKILL)
    return name


def test_results_and_errors_come_back_and_a_death_ends_the_pool():
    with worker_pool(1) as pool:
        assert list(pool.map(task, ["a", "b"])) == ["a", "b"]
        with pytest.raises(ValueError, match="no such thing") as caught:
            pool.submit(task, "error").result()
        assert "in task" in caught.value.__notes__[0]
        for name in ("function", "odd"):
            assert pool.submit(task, name).exception() is not None
        assert pool.submit(task, "c").result() == "c"
        jobs = [pool.submit(task, name) for name in ("dies", "d")]
        for job in jobs:
            with pytest.raises(BrokenProcessPool, match="status -9"):
                job.result()
        with pytest.raises(BrokenProcessPool):
            pool.submit(task, "e")


def test_what_waits_when_something_fails_does_not_begin():
    with worker_pool(1) as pool:
        jobs = [pool.submit(task, "error"), *(pool.submit(time.sleep, 0.2) for _ in range(20))]
        with pytest.raises(ValueError, match="no such thing"):
            jobs[0].result()
    assert jobs[-1].cancelled()
