"""Which runs are trained as one: the order, the room, the time, and that nothing is left out."""

import signal
import time
from dataclasses import replace

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.reproduce.depth import groups as module
from mvsplit.reproduce.depth.groups import family, next_group, study_together, wanted
from mvsplit.reproduce.depth.order import in_order
from mvsplit.reproduce.depth.plan import BenchRun, get_entries, get_run
from mvsplit.reproduce.depth.run import read_rows, write_row
from mvsplit.reproduce.workers import Stopped
from tests.reproduce.depth.tiny import TINY, entry, row

RATES, SEEDS = (1e-3, 1e-2), (0, 1, 2)
ENTRIES = get_entries(["plain", "mvsplit-root", "keel"])


def run(name: str = "plain", depth: int = 2, rate: float = 1e-3, seed: int = 0) -> BenchRun:
    return BenchRun(entry=entry(name), depth=depth, width=16, rate=rate, seed=seed)


def test_what_is_wanted_comes_first_and_then_all_seeds_of_the_sweeps():
    rows = [row(1e-3, 0.5, name="plain")]
    first = in_order(TINY, ENTRIES, rows)
    found = wanted(TINY, ENTRIES, rows)
    assert found[: len(first)] == first
    assert len(found) == len(set(found))
    swept = {(r.entry.name, r.depth, r.rate, r.seed) for r in found if r.depth != TINY.depths[-1]}
    assert len(swept) == 3 * 2 * 3 * 3 - 1
    assert ("plain", 2, 1e-3, 0) not in swept


def test_a_group_is_of_one_shape_and_family_and_no_larger_than_the_room():
    runs = [
        run("keel"),
        run(),
        run(depth=3),
        run("mvsplit-root"),
        run("keel", rate=1e-2),
        run("rezero"),
    ]
    always = lambda run, members: True  # noqa: E731
    assert next_group(runs, lambda run: 9, always) == [runs[0], runs[4]]
    rest = [r for r in runs if r.entry.name != "keel"]
    assert next_group(rest, lambda run: 9, always) == [runs[1], runs[3], runs[5]]
    assert next_group(rest, lambda run: 2, always) == [runs[1], runs[3]]
    assert family(run("prenorm")) != family(run("sandwich"))


def test_where_the_time_is_too_short_for_the_first_another_shape_may_fit():
    runs = [run(depth=4), run(depth=2)]
    assert next_group(runs, lambda run: 9, lambda run, members: run.depth < 3) == [runs[1]]
    assert next_group(runs, lambda run: 9, lambda run, members: False) == []


@pytest.mark.parametrize(("room", "members"), [(5, 5), (9, 7), (0, 1)])
def test_a_group_is_as_large_as_memory_allows(monkeypatch, room, members):
    def room_for(experiment, device, recompute):
        return room if not recompute else 2 * room

    monkeypatch.setattr(module, "room_for", room_for)
    assert module._members(run(), TINY, 7, False) == members
    assert module._members(run(), TINY, 30, True) == max(1, 2 * room)


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """The groups that were trained, by the names of their runs; a run takes no time."""
    groups: list[list[str]] = []

    def together(runs, size, out, end, **options) -> bool:
        groups.append([run.name for run in runs])
        if time.time() > end:
            return False
        for each in runs:
            shape = {"depth": each.depth, "width": each.width, "seed": each.seed}
            loss = 0.5 + abs(each.rate - 3.2e-3)
            write_row(row(each.rate, loss, name=each.entry.name, **shape), out)
        return True

    monkeypatch.setattr(module, "run_together", together)
    return groups


def test_it_goes_on_until_nothing_is_left(tmp_path, trained):
    rows = study_together(tmp_path, TINY, ENTRIES, most=8, say=lambda text: None)
    assert max(map(len, trained)) == 8
    names = [name for group in trained for name in group]
    assert len(names) == len(set(names)) == len(rows)
    assert not wanted(TINY, ENTRIES, rows)


def test_where_memory_is_too_short_half_as_many_are_trained_as_one(tmp_path, trained, monkeypatch):
    """Of that shape; what was trained before stays, and the memory of what failed is given back."""
    train, said, freed = module.run_together, [], []

    def together(runs, *given, **how) -> bool:
        if len(runs) > 3 and runs[0].depth == 3:
            raise torch.OutOfMemoryError
        return train(runs, *given, **how)

    monkeypatch.setattr(module, "run_together", together)
    monkeypatch.setattr(module, "_free", freed.append)
    rows = study_together(tmp_path, TINY, ENTRIES, most=6, say=said.append)
    assert len(freed) == len(trained) + 1
    sizes = {depth: {len(g) for g in trained if f"-{depth}x16-" in g[0]} for depth in (2, 3)}
    assert max(sizes[2]) == 6
    assert max(sizes[3]) == 3
    assert said.count("no memory for 6 of 3 layers as one; 3 at a time") == 1
    assert not wanted(TINY, ENTRIES, rows)
    trained.clear()
    order = [
        run("plain", depth, rate, seed) for depth in (3, 2) for rate in RATES for seed in SEEDS
    ]
    study_together(tmp_path / "two", TINY, ENTRIES, most=6, only=order, say=said.append)
    assert [len(group) for group in trained] == [3, 3, 6]
    monkeypatch.setattr(module, "run_together", lambda *_, **how: _no_memory())
    with pytest.raises(torch.OutOfMemoryError):
        study_together(tmp_path / "other", TINY, ENTRIES, most=6, say=said.append)


def _no_memory() -> bool:
    raise torch.OutOfMemoryError


def test_a_signal_stops_it_and_it_is_said_what_is_kept(tmp_path, trained, monkeypatch):
    before, train, said = signal.getsignal(signal.SIGTERM), module.run_together, []

    def together(*given, **how) -> bool:
        if trained:
            signal.raise_signal(signal.SIGTERM)
        return train(*given, **how)

    monkeypatch.setattr(module, "run_together", together)
    with pytest.raises(Stopped) as stopped:
        study_together(tmp_path, TINY, ENTRIES, most=8, say=said.append)
    assert stopped.value.code == 143
    words = f"stopped by SIGTERM: 8 runs finished and 0 begun are kept in {tmp_path}; give the same"
    assert said[-1] == f"{words} command again to go on"
    assert len(trained) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_runs_that_are_named_are_the_only_ones(tmp_path, trained):
    names = [
        "plain-2x16-lr1.0e-03-seed0",
        "keel-3x16-lr3.2e-03-seed1",
        "rezero-2x16-lr3.2e-04-seed2",
    ]
    only = [get_run(name) for name in names]
    rows = study_together(tmp_path, TINY, ENTRIES, most=8, only=only, say=lambda text: None)
    assert sorted(row["run"] for row in rows) == sorted(names)
    assert trained == [[names[0], names[2]], [names[1]]]
    for wrong in ("plain", "plain-2x16-lr1.0e-03", "plane-2x16-lr1.0e-03-seed0"):
        with pytest.raises(UserError, match=r"run=|entry="):
            get_run(wrong)


def test_the_clock_ends_it(tmp_path, trained):
    rows = study_together(tmp_path, TINY, ENTRIES, most=8, minutes=0, say=lambda text: None)
    assert (rows, trained) == ([], [])


def test_what_others_took_says_whether_there_is_time(tmp_path, trained, monkeypatch):
    """With a clock that a group moves by ten seconds, a minute has room for five."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    inner = module.run_together

    def slow(*args, **kwargs) -> bool:
        now[0] += 10
        return inner(*args, **kwargs)

    monkeypatch.setattr(module, "run_together", slow)
    same = replace(TINY, depths=(2, 2))
    study_together(tmp_path, same, ENTRIES, most=2, minutes=1, say=lambda text: None)
    assert len(trained) == 5
    assert len(read_rows(tmp_path)) == 10
