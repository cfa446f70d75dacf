"""The timing of steps, with threads in place of processes and a clock in place of time."""

import itertools
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe

import pytest

from mvsplit.reproduce.depth import timing as module
from mvsplit.reproduce.depth.timing import STEPS, WARM_UP, time_sharing
from tests.reproduce.depth.tiny import TINY

SIZE = replace(TINY, shapes=((3, 16), (1, 32)))


@contextmanager
def threads(count: int):
    """In the place of `standing_workers`."""
    ends = [Pipe() for _ in range(count)]

    def serve(pipe) -> None:
        with suppress(EOFError):
            while True:
                function, args, kwargs = pipe.recv()
                pipe.send((function(*args, **kwargs), None))

    for _, theirs in ends:
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()
    yield [mine for mine, _ in ends]
    for mine, _ in ends:
        mine.close()


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The depths of the networks that took a step."""
    taken: list[int] = []
    monkeypatch.setattr(module, "standing_workers", threads)
    monkeypatch.setattr(module, "build_state", lambda experiment: experiment.model.depth)

    def train_step(state, config):
        taken.append(state)
        return {"loss": 1.0 + state}

    monkeypatch.setattr(module, "train_step", train_step)
    return taken


def test_copies_are_timed_side_by_side_and_others_alone(steps, monkeypatch):
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    found = time_sharing(SIZE, (1,))
    assert found["side_by_side"] == {"1": {"seconds": [0.5], "steps_a_second": 2.0}}
    networks = ["mvsplit-root-2x16", "mvsplit-root-3x16", "mvsplit-root-4x16"]
    networks += ["keel-3x16", "prenorm-3x16", "sandwich-3x16", "mvsplit-root-1x32"]
    assert found["alone"] == dict.fromkeys(networks, 0.5)
    depths = [3, *(int(name.rpartition("-")[2].split("x")[0]) for name in networks)]
    assert {d: steps.count(d) for d in depths} == {
        d: depths.count(d) * (WARM_UP + STEPS) for d in depths
    }


@pytest.mark.parametrize("other", [1.1, float("nan")])
def test_copies_that_step_otherwise_are_refused(steps, monkeypatch, other):
    losses = itertools.cycle([1.0, other])
    monkeypatch.setattr(module, "train_step", lambda state, config: {"loss": next(losses)})
    monkeypatch.setattr(module, "WARM_UP", 1)
    with pytest.raises(RuntimeError, match="does not step alike"):
        time_sharing(SIZE, (2,))
