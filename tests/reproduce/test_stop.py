"""`python -m mvsplit reproduce` and the depth bench are stopped at several moments, and go on."""

import json
import signal
import sys
from pathlib import Path

import pytest

from mvsplit.reproduce import get_claim
from mvsplit.reproduce.trial import RECORD, run_trial
from mvsplit.training.checkpoint import list_checkpoints
from tests.reproduce.processes import Begun, begun, wait_until
from tests.reproduce.tiny import ONE_SEED
from tests.slow import slow

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
TRIALS = get_claim("collapse").trials(ONE_SEED)  # four
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mvsplit", "reproduce", "collapse", "--workers", "1", "--out"]
# Python imports it as it starts; in the command itself, not in its workers, it changes the size and
# what a trial is. A worker finds that by its name.
CUSTOM = """
import sys
if "reproduce" in sys.orig_argv:
    import stand_in
    stand_in.put()
"""
STAND_IN = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from mvsplit.reproduce import sizes, study, trial
from tests.reproduce.tiny import ONE_SEED

HERE = Path(__file__).parent

def put():
    sizes.SIZES["small"] = ONE_SEED
    study.run_trial = {"waits": waits, "deaf": deaf}[os.environ["TRIAL"]]

class Waits(trial.Deadline):
    def on_step(self, state, metrics):
        waiting = signal.getsignal(signal.SIGTERM)  # of the training, until it has heard one
        if state.step == 4:
            (HERE / f"began-{os.getpid()}").write_text("")
            while signal.getsignal(signal.SIGTERM) == waiting:
                time.sleep(0.01)

def waits(each, folder, end):
    trial.Deadline = Waits
    return trial.run_trial(each, folder, end)

def deaf(each, folder, end):
    signal.signal(signal.SIGTERM, lambda *_: None)
    code = "import time; time.sleep(600)"
    subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
    (folder / each.name).mkdir(parents=True)
    (folder / each.name / "metrics.jsonl").write_text("{")
    (HERE / f"began-{os.getpid()}").write_text("")
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second is never over
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.fixture
def start(tmp_path):
    """Begins the command with such a trial; `tmp_path / "began-*"` is there for each under way."""
    (tmp_path / "sitecustomize.py").write_text(CUSTOM)
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def start(trial: str):
        environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TRIAL": trial}
        return begun([*COMMAND, tmp_path / "out"], **environment)

    return start


def began(folder: Path) -> int:
    return len([*folder.glob("began-*")])


def stopped(it: Begun, number: int) -> str:
    """Sends it that, and gives what it said, once it and all of its processes are gone."""
    it.send(number, group=number == signal.SIGINT)  # as a terminal does
    status, said, errors = it.end()
    assert (status, errors) == (128 + number, "")
    wait_until(lambda: not it.left())
    return said


BEGUN = "4 runs to train, 1 at a time; how far they are is told as they go\n"


def lines(number: int, finished: int, saved: int, out: Path) -> str:
    return (
        f"{BEGUN}stopped by {signal.Signals(number).name}: of 4 runs {finished} finished and "
        f"{saved} begun are kept in {out / 'small' / 'runs'}; give the same command "
        "again to go on\n"
    )


@slow
def test_the_run_that_trains_is_saved_and_goes_on(tmp_path, start):
    out, runs = tmp_path / "out", tmp_path / "out" / "small" / "runs"
    with start("waits") as it:
        it.wait_until(lambda: began(tmp_path) == 1)
        assert stopped(it, signal.SIGTERM) == lines(signal.SIGTERM, 0, 1, out)
    (stopped_run,) = runs.iterdir()  # what waited was not begun
    assert not (stopped_run / RECORD).exists()
    (saved,) = list_checkpoints(stopped_run / "checkpoints")
    assert saved.name == "step_00000004"
    (begun,) = [t for t in TRIALS if t.name == stopped_run.name]
    assert run_trial(begun, runs)
    log = (stopped_run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(each)["step"] for each in log] == [*range(1, 9)]
    assert "resumed" in (stopped_run / "events.jsonl").read_text()


def test_a_signal_while_workers_start_ends_it(tmp_path, start):
    with start("waits") as it:
        it.wait_until(lambda: len(it.left()) >= 3)  # it, a tracker of resources, a worker
        assert stopped(it, signal.SIGINT) == lines(signal.SIGINT, 0, 0, tmp_path / "out")
    assert began(tmp_path) == 0
    assert not (tmp_path / "out" / "small" / "runs").exists()


def test_a_second_signal_ends_it_at_once_and_half_a_run_counts_as_none(tmp_path, start):
    with start("deaf") as it:
        it.wait_until(lambda: began(tmp_path) == 1)
        it.insist(signal.SIGTERM)
        assert it.end() == (143, BEGUN, "")
        wait_until(lambda: not it.left())
    (run,) = (tmp_path / "out" / "small" / "runs").iterdir()
    assert not (run / RECORD).exists()


BENCH = [sys.executable, "-m", "mvsplit", "bench", "depth_bench"]


@slow
def test_the_depth_bench_stops_likewise(tmp_path):
    names = [f"mvsplit-root-4x48-lr1.0e-03-seed{seed}" for seed in range(3)]
    rest = ["--gate", "elsewhere", "--out", tmp_path, "--workers", "1", "--runs", *names]
    with begun([*BENCH, *rest], PYTHONPATH=str(ROOT)) as it:
        it.wait_until((tmp_path / "runs" / names[0] / "metrics.jsonl").exists)
        said = stopped(it, signal.SIGTERM)
    assert f"0 runs finished and 1 begun are kept in {tmp_path}; give the same" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list_checkpoints(folder / "checkpoints")) == 1
    assert not (tmp_path / "rows").exists()


@slow
def test_every_run_of_the_depth_bench_that_took_a_step_is_saved(tmp_path):
    """Of two side by side; the processes under it get one signal each."""
    names = [f"mvsplit-root-4x48-lr1.0e-03-seed{seed}" for seed in range(3)]
    rest = ["--gate", "elsewhere", "--out", tmp_path, "--workers", "2", "--runs", *names]
    with begun([*BENCH, *rest], PYTHONPATH=str(ROOT)) as it:
        logs = [tmp_path / "runs" / name / "metrics.jsonl" for name in names[:2]]
        it.wait_until(lambda: all(log.exists() and log.read_text() for log in logs))
        said = stopped(it, signal.SIGTERM)
    assert f"0 runs finished and 2 begun are kept in {tmp_path}; give the same" in said
    for log in logs:
        (saved,) = list_checkpoints(log.parent / "checkpoints")
        assert saved.name == f"step_{len(log.read_text().splitlines()):08d}"


@slow
def test_the_gate_of_the_depth_bench_stops_likewise(tmp_path):
    (tmp_path / "gate").mkdir()
    rest = ["--out", tmp_path / "out", "--depths", "4"]
    with begun([*BENCH, *rest], PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path / "gate")) as it:
        it.wait_until(lambda: [*(tmp_path / "gate").glob("*/metrics.jsonl")])
        said = stopped(it, signal.SIGTERM)
    assert f"0 runs finished and 0 begun are kept in {tmp_path / 'out'}; give the same" in said
