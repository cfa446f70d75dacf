"""Saving in the background: what is written is what was, and what fails is not lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.training import Observer, TrainState, checkpoint_saver, train
from mvsplit.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
    step_of,
)
from mvsplit.training.checkpoint_saver import Saver, Staging
from tests.training import runs


def snapshot(step: int, tensors: dict[str, torch.Tensor]) -> Snapshot:
    return Snapshot(step=step, tensors={"model": tensors}, values={"n": step})


def views() -> dict[str, torch.Tensor]:
    """Views of one buffer, one of them transposed, a tensor of its own, and empty ones."""
    buffer = torch.arange(24.0)
    return {
        "a": buffer[2:8].view(2, 3),
        "b": buffer[8:20].view(3, 4).T,
        "c": torch.arange(5, dtype=torch.uint8)[1:4],
        "d": torch.zeros(0, 3),
        "e": torch.tensor(7.0),
    }


def test_a_copy_is_the_state_of_its_moment_in_memory_of_its_own() -> None:
    staging = Staging()
    for _ in range(2):  # the second time in the memory of the first
        tensors = views()
        wanted = {name: tensor.clone() for name, tensor in tensors.items()}
        copied = staging.copy(snapshot(1, tensors)).tensors["model"]
        for tensor in tensors.values():
            tensor.fill_(99)
        for name, tensor in wanted.items():
            assert torch.equal(copied[name], tensor), name


def test_what_is_written_is_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert gate.wait(30)
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr(checkpoint_saver, "save_checkpoint", slow)
    weight = torch.ones(3)
    with Saver(tmp_path, keep=1) as saver:
        saver.begin(snapshot(4, {"w": weight}))
        weight.fill_(2)
        assert saver.finished() is None
        assert not saver.failed
        gate.set()
        assert saver.wait() == tmp_path / "step_00000004"
        assert saver.wait() is None
    assert read_checkpoint(tmp_path / "step_00000004").tensors["model"]["w"].tolist() == [1, 1, 1]


def test_a_run_that_ends_by_an_error_still_completes_its_save(tmp_path: Path) -> None:
    def run() -> None:
        with Saver(tmp_path, keep=1) as saver:
            saver.begin(snapshot(4, {"w": torch.ones(3)}))
            raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        run()
    assert read_checkpoint(tmp_path / "step_00000004").step == 4


@pytest.mark.parametrize("failing", [3, 8])
def test_a_failed_save_ends_the_run_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """In the middle of the run within the steps that follow, at the last step at once."""

    def full(folder: Path, state: Snapshot, **kwargs: Any) -> Path:
        if state.step == failing:
            raise UserError("the disk is full")
        return save_checkpoint(folder, state, **kwargs)

    monkeypatch.setattr(checkpoint_saver, "save_checkpoint", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(runs.experiment(), tmp_path / "run")
    events = [event["event"] for event in runs.lines(tmp_path / "run" / "events.jsonl")]
    assert "finished" not in events
    assert events.count("saved") == (0 if failing == 3 else 2)


def test_a_failure_is_kept_for_the_one_who_waits(tmp_path: Path) -> None:
    """The ranks of a run meet to hear of it, which a rank that had it raised could not."""
    (tmp_path / "file").touch()
    with Saver(tmp_path / "file", keep=1) as saver:
        saver.begin(snapshot(1, {"w": torch.ones(3)}))
        assert saver._job is not None
        assert saver._job.exception(timeout=30) is not None
        assert saver.finished() is None
        assert saver.failed
        with pytest.raises(UserError, match="cannot save the checkpoint of step 1"):
            saver.wait()
        assert not saver.failed


def test_multiples_stay(tmp_path: Path) -> None:
    train(runs.experiment(save_every=1, keep=2, keep_every=3, steps=8), tmp_path / "run")
    saved = [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == [3, 6, 7, 8]


def test_what_cannot_be_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, snapshot(1, {"w": torch.ones(3)}), keep=1)

    def refuse(path: Path, *args: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(UserError, match=r"cannot tidy up .*Permission denied .*make it writable"):
        save_checkpoint(tmp_path, snapshot(2, {"w": torch.ones(3)}), keep=1)
    assert read_checkpoint(tmp_path / "step_00000002").step == 2


def test_steps_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 3 is held back until step 5 is taken."""
    gate = threading.Event()

    class Open(Observer):
        def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
            if state.step == 5:
                gate.set()

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert gate.wait(30)
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr(checkpoint_saver, "save_checkpoint", slow)
    train(runs.experiment(keep=9), tmp_path / "run", observers=[Open()])
    saved = [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == [3, 6, 8]
