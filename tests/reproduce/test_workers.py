"""No worker outlives the process that started it, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path
from workers import worker_pool  # alone: the package around it takes seconds to import

def work(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    with worker_pool(2) as pool:
        jobs = [pool.submit(work, f"{sys.argv[1]}/{k}") for k in range(3)]
        jobs[0].result()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().split()[2] != "Z"


def wait_until(holds, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_workers_end_with_their_parent(tmp_path, sent, status):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    files = [tmp_path / "0", tmp_path / "1"]
    folder = Path(__file__).parents[2] / "mvsplit" / "reproduce"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    process = subprocess.Popen([sys.executable, script, tmp_path], env=environment)
    try:
        wait_until(lambda: all(f.exists() and f.read_text() for f in files))
        workers = [int(f.read_text()) for f in files]
        assert all(map(alive, workers))
        process.send_signal(sent)
        assert process.wait(30) == status
        wait_until(lambda: not any(map(alive, workers)), 10)
        assert not (tmp_path / "2").exists()
    finally:
        process.kill()
