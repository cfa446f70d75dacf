from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.training import load_run, train
from mvsplit.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    load_latest,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
    step_of,
)
from tests.training import runs


def snapshot(step: int, elements: int = 10) -> Snapshot:
    tensors = {"model": {"w": torch.arange(float(elements)) + step, "g": torch.tensor([[step]])}}
    return Snapshot(step=step, tensors=tensors, values={"random": [1.5, None], "name": "ü"})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", snapshot(12), keep=1)
    assert path.name == "step_00000012"
    back = read_checkpoint(path)
    assert (back.step, back.values) == (12, {"random": [1.5, None], "name": "ü"})
    for name, tensor in snapshot(12).tensors["model"].items():
        assert torch.equal(back.tensors["model"][name], tensor)


def test_newest_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (5, 99_999_999, 100_000_000, 20):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]


def test_what_a_kill_left_behind_is_in_nobody_s_way(tmp_path: Path) -> None:
    for name in (".step_00000002.tmp", ".step_00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, snapshot(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert read_checkpoint(tmp_path / "step_00000002").step == 2


def test_a_step_that_is_saved_again_never_lacks_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the old one is removed, the new one has its name."""
    save_checkpoint(tmp_path, snapshot(2), keep=1)
    remove, seen = shutil.rmtree, []

    def removed(path: Path, ignore_errors: bool = False) -> None:
        seen.append(read_checkpoint(tmp_path / "step_00000002").values["name"])
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", removed)
    again = dataclasses.replace(snapshot(2), values={"name": "again"})
    save_checkpoint(tmp_path, again, keep=1)
    assert seen == ["again"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def save_again(folder: Path, crash_at: int) -> None:
    runs._crash_before_change(crash_at)
    again = dataclasses.replace(snapshot(2), values={"name": "again"})
    save_checkpoint(folder, again, keep=2)


@pytest.mark.parametrize("crash_at", range(9))
def test_death_while_a_step_is_saved_again_leaves_one_of_both(
    tmp_path: Path, crash_at: int
) -> None:
    """Before every change of the disk, the one between the two renames among them."""
    save_checkpoint(tmp_path, snapshot(2), keep=2)
    process = runs.PROCESSES.Process(target=save_again, args=(tmp_path, crash_at))
    process.start()
    process.join(60)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    name = read_checkpoint(tmp_path / "step_00000002").values["name"]
    assert name == ("ü" if crash_at < 5 else "again")


def test_views_of_one_buffer_are_saved_apart(tmp_path: Path) -> None:
    buffer = torch.arange(8.0)
    parts = {"a": buffer[:3], "b": buffer[3:7].view(2, 2)}
    path = save_checkpoint(tmp_path, Snapshot(step=1, tensors={"model": parts}, values={}), keep=1)
    back = read_checkpoint(path).tensors["model"]
    assert torch.equal(back["a"], parts["a"])
    assert torch.equal(back["b"], parts["b"])


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "model.safetensors", 40),
    "damaged": lambda path: flip_last_byte(path / "model.safetensors"),
    "missing": lambda path: (path / "model.safetensors").unlink(),
    "manifest.json is damaged": lambda path: os.truncate(path / "manifest.json", 40),
}


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, snapshot(step), keep=5)
    DAMAGES[damage](tmp_path / "step_00000002")
    found, damaged = load_latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(damaged) == 1
    assert "step_00000002" in str(damaged[0])
    assert damage in str(damaged[0])
    DAMAGES[damage](tmp_path / "step_00000001")
    with pytest.raises(UserError, match="and there is no older checkpoint"):
        load_latest(tmp_path)


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "step_00000007"
    foreign.mkdir()
    torch.save({}, foreign / "model.pt")
    with pytest.raises(UserError, match=r"step_00000007 is not a checkpoint of mvsplit"):
        load_latest(tmp_path)
    (foreign / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="is not a checkpoint of mvsplit"):
        load_latest(tmp_path)
    (foreign / "manifest.json").write_text('{"format": "mvsplit-checkpoint", "version": 99}')
    with pytest.raises(UserError, match="has checkpoint version 99"):
        load_latest(tmp_path)


def test_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, snapshot(1), keep=1)
    write = Path.write_text

    def full(path: Path, *args: object, **kwargs: object) -> int:
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot save the checkpoint of step 2.*00000001 stays"):
        save_checkpoint(tmp_path, snapshot(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert read_checkpoint(tmp_path / "step_00000001").step == 1


def test_really_full_disk(small_disk: Path) -> None:
    save_checkpoint(small_disk, snapshot(1, elements=100_000), keep=3)
    with pytest.raises(UserError, match=r"No space left on device.*00000001 stays") as caught:
        save_checkpoint(small_disk, snapshot(2, elements=200_000), keep=3)
    assert "\n" not in str(caught.value)
    assert [p.name for p in small_disk.iterdir()] == ["step_00000001"]
    assert read_checkpoint(small_disk / "step_00000001").step == 1


def test_run_goes_on_from_the_older_one_and_says_so(tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    os.truncate(run / "checkpoints" / "step_00000008" / "ema.safetensors", 99)
    train(runs.experiment(), run)
    runs.assert_same_run(run, whole_run)
    events = [event for event in runs.lines(run / "events.jsonl") if event["event"] == "damaged"]
    assert "step_00000008: ema.safetensors is truncated" in events[0]["message"]
    assert "going back to step 6" in events[0]["message"]
    assert (run / "checkpoints" / "step_00000008.damaged").is_dir()


def test_load_run(tmp_path: Path, whole_run: Path) -> None:
    before = torch.get_rng_state()
    averaged, trained = load_run(whole_run), load_run(whole_run, ema=False)
    assert torch.equal(torch.get_rng_state(), before)
    stored = read_checkpoint(whole_run / "checkpoints" / "step_00000008").tensors
    for loaded, name in ((averaged, "ema"), (trained, "model")):
        assert (loaded.step, loaded.experiment) == (8, runs.experiment())
        for key, value in loaded.model.state_dict().items():
            assert torch.equal(value, stored[name][key])
    assert not torch.equal(averaged.model.head.weight, trained.model.head.weight)
    text, _ = averaged.embedder.encode(["seven"])
    assert averaged.model(torch.zeros(1, 1, 8, 8), text).isfinite().all()
    assert load_run(whole_run / "checkpoints" / "step_00000006").step == 6


def test_load_run_passes_over_damage_with_a_warning(tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    flip_last_byte(run / "checkpoints" / "step_00000008" / "ema.safetensors")
    with pytest.warns(UserWarning, match="step_00000008.*damaged.*using step 6"):
        assert load_run(run).step == 6
    with pytest.raises(UserError, match="choose another checkpoint"):
        load_run(run / "checkpoints" / "step_00000008")


def test_load_run_refusals(tmp_path: Path, whole_run: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*nowhere"):
        load_run(tmp_path / "nowhere")
    train(runs.experiment(steps=1, ema_decay=0.0), tmp_path / "plain")
    with pytest.raises(UserError, match="keeps no averaged weights"):
        load_run(tmp_path / "plain")
    assert load_run(tmp_path / "plain", ema=False).step == 1
    shutil.copytree(whole_run, tmp_path / "empty", ignore=shutil.ignore_patterns("step_*"))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_run(tmp_path / "empty")


def test_checkpoint_of_another_model_names_the_tensor(tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["depth"] = 3
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"ema.safetensors lacks blocks\.2\..* and \d+ more"):
        load_run(run)
