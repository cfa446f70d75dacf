"""A command, and workers that stay, end with all that they began after a signal."""

import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from mvsplit.reproduce.workers import Stopped, ask_each, run_command, standing_workers
from tests.reproduce.processes import begun, wait_until

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
WORKERS = Path(__file__).parents[2] / "mvsplit" / "reproduce"
SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
import workers  # alone: the package around it takes seconds to import

FOLDER, WHAT = Path(sys.argv[1]), sys.argv[2]
workers.GRACE, workers.LAST = 0.5, 1.0  # of what does not hear

def busy(name):  # with a child that has left its group
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (FOLDER / name).write_text("")
    time.sleep(600)

def saving(name):
    def save(number, frame):
        (FOLDER / "saved").write_text(str(number))
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    busy(name)

def deaf(name):
    signal.signal(signal.SIGTERM, lambda *_: None)
    busy(name)
    time.sleep(600)

def standing(name):
    with workers.standing_workers(2) as pipes:
        workers.ask_each(pipes, [(busy, ("0",), {}), (deaf, ("1",), {})])

if __name__ == "__main__":
    if WHAT.startswith("command "):
        alone = [sys.executable, __file__, sys.argv[1], WHAT.removeprefix("command ")]
        sys.exit(workers.run_command(alone, os.environ))
    globals()[WHAT]("0")
"""


@pytest.fixture
def start(tmp_path):
    """Begins the script, in a folder where its jobs say that they have begun."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(what: str):
        command = [sys.executable, tmp_path / "script.py", tmp_path, what]
        return begun(command, PYTHONPATH=str(WORKERS))

    return start


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("what", ["busy", "saving"])
def test_a_signal_goes_on_to_a_command_as_one_sigterm(tmp_path, start, number, what):
    with start(f"command {what}") as it:
        it.wait_until((tmp_path / "0").exists)
        assert len(it.left()) == 3
        it.send(number, group=number == signal.SIGINT)  # as a terminal does
        status, _, errors = it.end()
        assert (status, errors) == (128 + number, "")
        wait_until(lambda: not it.left())
    saved = tmp_path / "saved"
    assert saved.exists() is (what == "saving")
    assert what == "busy" or saved.read_text() == str(int(signal.SIGTERM))


@linux
def test_a_command_that_does_not_hear_is_killed_in_time(tmp_path, start):
    with start("command deaf") as it:
        it.wait_until((tmp_path / "0").exists)
        it.send(signal.SIGTERM)
        assert it.end()[0] == 143
        wait_until(lambda: not it.left())


@linux
@pytest.mark.parametrize("what", ["command deaf", "standing"])
def test_a_second_signal_ends_all_at_once(tmp_path, start, what):
    with start(what) as it:
        it.wait_until((tmp_path / "0").exists)
        it.insist(signal.SIGTERM)
        assert it.end()[0] in (143, -signal.SIGTERM)  # the latter where it was about to end
        wait_until(lambda: not it.left())


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_stay_end_whatever_they_are_about(tmp_path, start, number):
    with start("standing") as it:
        it.wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        it.send(number, group=number == signal.SIGINT)
        status, _, errors = it.end()
        assert (status, errors) == (128 + number, "")
        wait_until(lambda: not it.left())


def test_a_command_that_ends_gives_its_status_and_hears_its_environment():
    command = [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['STATUS']))"]
    assert run_command(command, {**os.environ, "STATUS": "7"}) == 7
    before = signal.getsignal(signal.SIGTERM)
    stops = f"import os, time; os.kill({os.getpid()}, {int(signal.SIGTERM)}); time.sleep(30)"
    with pytest.raises(Stopped) as stopped:
        run_command([sys.executable, "-c", stops], os.environ)
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_workers_that_stay_keep_what_they_hold_and_say_what_went_wrong():
    with standing_workers(1) as pipes:
        (first,) = ask_each(pipes, [(os.getpid, (), {})])
        assert ask_each(pipes, [(os.getpid, (), {})]) == [first] != [os.getpid()]
        with pytest.raises(ValueError, match="invalid literal"):
            ask_each(pipes, [(int, ("x",), {})])
        with pytest.raises(BrokenProcessPool, match="has died"):
            ask_each(pipes, [(os._exit, (3,), {})])
