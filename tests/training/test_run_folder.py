from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.training import Experiment, RunFolder, read_experiment, train
from mvsplit.training.files import JsonLines, keep_lines, read_lines
from mvsplit.training.observer import Observer
from mvsplit.training.state import TrainState
from tests.training import runs


def test_two_on_one_folder_are_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", runs.experiment()):
        with pytest.raises(UserError, match=r"run is in use by process \d+ on") as caught:
            RunFolder(tmp_path / "run", runs.experiment())
        assert "\n" not in str(caught.value)
    with RunFolder(tmp_path / "run", runs.experiment()):
        pass


def test_another_experiment_is_refused_with_its_fields(tmp_path: Path) -> None:
    train(runs.experiment(steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    other = replace(
        runs.experiment(steps=2, lr=0.5), model=replace(runs.MODEL, width=32, text_width=32)
    )
    with pytest.raises(UserError) as caught:
        train(other, tmp_path / "run")
    message = str(caught.value)
    assert "model.width: 16 there, 32 now" in message
    assert "train.lr: 0.01 there, 0.5 now" in message
    assert "steps" not in message
    assert "\n" not in message
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_fields_that_may_change_on_continuation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(runs.experiment(steps=2), run)
    later = runs.experiment(
        steps=4, save_every=1, keep=1, probe_every=1, probe="all", accumulate=2, device="cpu"
    )
    train(later, run)
    assert read_experiment(run) == later
    resumed = next(e for e in runs.lines(run / "events.jsonl") if e["event"] == "resumed")
    assert resumed["changed"]["train.steps"] == [2, 4]
    assert [line["step"] for line in runs.lines(run / "layers.jsonl")] == [2, 3, 4]


class _At(Observer):
    """Wants a look in some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def wants_look(self, step: int) -> bool:
        return step in self.steps


def test_an_observer_gets_the_looks_that_it_wants_and_changes_no_step(tmp_path: Path) -> None:
    for name, every, looks in (("some", 5, [1, 4, 5]), ("alone", 0, [1, 4])):
        given = runs.experiment(steps=6, probe_every=every, probe_burst=0)
        train(given, tmp_path / name, observers=[_At(9), _At(1, 4)])
        taken = [line["step"] for line in runs.lines(tmp_path / name / "layers.jsonl")]
        assert taken == looks
    train(runs.experiment(steps=6, probe_every=5, probe_burst=0), tmp_path / "none")
    assert runs.log_of(tmp_path / "none") == runs.log_of(tmp_path / "some")


def test_what_a_run_leaves(whole_run: Path) -> None:
    assert read_experiment(whole_run) == runs.experiment()
    environment = json.loads((whole_run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["device"] in ("cpu", "cuda")
    assert environment["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    metrics = runs.lines(whole_run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    fields = "step loss grad_norm lr seconds tokens_per_second grad_writer_attn grad_writer_ffn"
    assert {*fields.split(), "grad_query", "grad_key"} == metrics[0].keys()
    assert [m["lr"] for m in metrics[:4]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    layers = runs.lines(whole_run / "layers.jsonl")
    assert [line["step"] for line in layers] == [2, 4, 6, 8]
    assert layers[0]["layer"] == [0, 1]
    assert len(layers[0]["tcs"]) == 2
    assert [e["event"] for e in runs.lines(whole_run / "events.jsonl")] == (
        ["started", "watching", "saved", "saved", "saved", "finished"]
    )


def test_folders_that_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match=r"photos is not a run folder: it holds cat\.png"):
        RunFolder(tmp_path / "photos", runs.experiment())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create the run folder"):
        RunFolder(tmp_path / "file", runs.experiment())
    with pytest.raises(UserError, match="no run at"):
        read_experiment(tmp_path)


def test_an_impossible_experiment_leaves_the_folder_free(tmp_path: Path) -> None:
    impossible = replace(runs.experiment(), model=replace(runs.MODEL, patch=3))
    with pytest.raises(UserError, match=r"model\.patch=3 does not divide the image size 8×8"):
        train(impossible, tmp_path / "run")
    train(runs.experiment(steps=1), tmp_path / "run")


def test_what_is_refused_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    impossible = replace(runs.experiment(), model=replace(runs.MODEL, patch=3))
    (tmp_path / "mine").mkdir()
    for name in ("runs/new", "mine"):
        with pytest.raises(UserError, match=r"model\.patch=3"):
            train(impossible, tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


class _Refuses(Observer):
    """When the run's files are written."""

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        raise UserError("not today")


def test_a_refusal_takes_away_only_what_it_has_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not today"):
        train(runs.experiment(steps=1), tmp_path / "new", observers=[_Refuses()])
    assert list(tmp_path.iterdir()) == []
    run = tmp_path / "run"
    train(runs.experiment(steps=1), run)
    before = {path: path.stat().st_size for path in run.rglob("*") if path.suffix != ".jsonl"}
    with pytest.raises(UserError, match="not today"):
        train(runs.experiment(steps=2), run, observers=[_Refuses()])
    with pytest.raises(UserError, match="another experiment"):
        train(runs.experiment(steps=2, lr=0.5), run)
    assert before.keys() <= set(run.rglob("*"))
    assert train(runs.experiment(steps=2), run).step == 2


def test_log_that_a_kill_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "x": 0.1}\n{"step": 2, "x": NaN}\n{"step": 3, "x"')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    log = JsonLines(path, keep_lines(path, 1))
    log.append({"step": 2, "x": 1 / 3})
    assert [line["x"] for line in read_lines(path)] == [0.1, 1 / 3]  # while the log is open
    assert log.lines == 2
    log.close()
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_lines(path)


def test_full_disk_before_the_first_step_is_one_line(small_disk: Path) -> None:
    """A run that goes on, one that has only its lock, and one that has not even that."""
    train(runs.experiment(steps=1), small_disk / "run")
    (small_disk / "locked").mkdir()
    (small_disk / "locked" / ".lock").write_text("process 1 on elsewhere")
    with pytest.raises(OSError, match="No space left"), open(small_disk / "fill", "wb") as file:
        file.write(bytes(2**21))
    for name in ("run", "locked", "new"):
        with pytest.raises(UserError, match=r"No space left on device; .*--run-dir") as caught:
            train(runs.experiment(steps=2), small_disk / name)
        assert "\n" not in str(caught.value)
    (small_disk / "fill").unlink()
    assert train(runs.experiment(steps=2), small_disk / "run").step == 2


def test_the_package_imports_where_there_are_no_file_locks(tmp_path: Path) -> None:
    """As on Windows, where training says what it needs."""
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from mvsplit.cli import main\n"
        f"sys.exit(main(['train', 'tiny', '--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "mvsplit: training needs the file locks of Linux or macOS; on Windows use WSL\n"
    )


@pytest.mark.parametrize("line", ["7", "null", '"text"'])
def test_log_lines_that_are_no_objects_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_lines(path)


def test_log_on_a_full_disk(tmp_path: Path) -> None:
    log = JsonLines(Path("/dev/full"))
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        log.append({"step": 1})
    log.close()  # which does not try again
