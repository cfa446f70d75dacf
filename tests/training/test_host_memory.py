"""What a CPU's memory surely cannot hold is refused before any of it is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.training import build_state, host_memory, train, train_step
from mvsplit.training.builders import largest_sample
from mvsplit.training.host_memory import GIB, available_memory, least_need
from tests.training import runs


def of(experiment: runs.Experiment, samples: int) -> host_memory.Need:
    state = build_state(experiment)
    image, _ = largest_sample(state.loader.dataset, experiment.model)
    return least_need(experiment.model, experiment.train, samples, image)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB, 1 of them swap, and no control group."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {9 * 2**20} kB\nMemAvailable: {7 * 2**20} kB\nSwapFree: {2**20} kB\n"
    )
    for name, path in (("_MEMINFO", "meminfo"), ("_CGROUPS", "cgroup"), ("_CGROUP_ROOT", "fs")):
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    return tmp_path


def test_memory_and_swap_are_available(machine: Path) -> None:
    assert available_memory() == 8 * GIB


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/job/step", "job/memory.max"), ("9:memory:/job", "memory/job/memory.limit_in_bytes")],
)
def test_the_limit_of_a_control_group_counts_where_it_is_smaller(
    machine: Path, line: str, file: str
) -> None:
    (machine / "cgroup").write_text(f"8:pids:/\n{line}\n")
    limit = machine / "fs" / file
    limit.parent.mkdir(parents=True)
    for text, found in (("max", 8), (f"{2 * GIB}", 3), (f"{99 * GIB}", 8)):
        limit.write_text(f"{text}\n")
        assert available_memory() == found * GIB


def test_a_system_that_does_not_say_refuses_nothing(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert available_memory() is None
    train(runs.experiment(steps=1), machine / "run")


@pytest.mark.parametrize(
    ("share", "accumulate"), [(0.9, True), (0.1, False)], ids=["activations", "state"]
)
def test_what_cannot_fit_is_refused_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, accumulate: bool
) -> None:
    """More pieces of a batch are advised only where they can help."""
    experiment = runs.experiment()
    need = of(experiment, experiment.train.batch_size)
    there = sum(need.state.values()) + (need.activations if accumulate else 0) * share
    there *= 1 if accumulate else share
    monkeypatch.setattr(host_memory, "available_memory", lambda: there)
    with pytest.raises(UserError) as raised:
        train(experiment, tmp_path / "run")
    message = str(raised.value)
    assert f"at least {need.total / GIB:.3g} GiB" in message
    assert f"{there / GIB:.3g} GiB are available" in message
    assert ("--accumulate" in message, "mvsplit plan PRESET" in message) == (accumulate, True)
    assert not (tmp_path / "run").exists()


def test_what_may_fit_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = runs.experiment(steps=1)
    enough = of(experiment, experiment.train.batch_size).total
    monkeypatch.setattr(host_memory, "available_memory", lambda: enough)
    train(experiment, tmp_path / "run")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_activations_are_a_lower_bound(precision: str) -> None:
    """Of what autograd saves of a step, and not a far one."""
    e = runs.experiment(precision=precision, probe_every=0)
    e = replace(e, model=replace(e.model, depth=16))
    state = build_state(e)
    own = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            saved[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_step(state, e.train)
    samples = e.train.batch_size // e.train.accumulate
    deeper = replace(e, model=replace(e.model, depth=2 * e.model.depth))
    bound = of(deeper, samples).activations - of(e, samples).activations  # of the blocks alone
    assert bound <= sum(saved.values()) < 2 * bound


def test_what_is_frozen_keeps_nothing_for_backward() -> None:
    experiment = runs.experiment()
    tune = replace(experiment.train.tune, only=("head.*",))
    need = of(replace(experiment, train=replace(experiment.train, tune=tune)), 2)
    assert list(need.state) == ["weights"]
    assert need.activations == 0


def test_what_zfs_lets_go_is_available(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "arc").write_text(f"13 1 0x01\nname type data\nhits 4 7\nsize 4 {2 * GIB}\n")
    monkeypatch.setattr(host_memory, "_ZFS", machine / "arc")
    assert available_memory() == 10 * GIB
