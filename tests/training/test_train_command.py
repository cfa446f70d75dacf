"""`mvsplit train`, as it is typed."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mvsplit.cli import main
from mvsplit.presets import get_preset
from mvsplit.training import ProgressLine, RunFolder, read_experiment, train
from tests.training import runs


def test_tiny_trains_and_the_same_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "tiny", "--run-dir", str(tmp_path / "run")]
    options = ["--seed", "5", "--save-every", "10"]
    assert main([*command, *options, "--steps", "12"]) == 0
    assert main([*command, *options, "--steps", "40"]) == 0
    shown = capsys.readouterr().err
    assert f"resumed {tmp_path}/run at step 12" in shown
    assert "step 40/40  loss " in shown
    assert "finished step 40 of 40" in shown
    train_config = read_experiment(tmp_path / "run").train
    assert (train_config.steps, train_config.seed, train_config.save_every) == (40, 5, 10)
    losses = [line["loss"] for line in runs.lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:2]) / 2 * 5  # it learns, visibly


def test_options_reach_every_part(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    changes = (
        "--model.depth 1 --model.rule.beta 0.5 --data.embedder-seed 3 --lr None --betas 0.8 0.9"
    )
    assert main(["train", "tiny", "--run-dir", run, "--steps", "1", *changes.split()]) == 0
    found, preset = read_experiment(run), get_preset("tiny")
    assert (found.model.depth, found.model.rule.beta) == (1, 0.5)
    assert (found.data.embedder_seed, found.train.lr, found.train.betas) == (3, None, (0.8, 0.9))
    assert found.model.width == preset.model.width
    assert found.train.batch_size == preset.train.batch_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "preset='tinny' is unknown: did you mean tiny"),
        ([], "preset: name one first, for example tiny"),
        (["--steps", "3"], "preset: name one first"),
        (["tiny", "--steps", "0"], "train.steps=0: must be at least 1"),
        (["tiny", "--model.rule.name", "mvspilt"], "did you mean mvsplit"),
        (["tiny", "--model.heads", "3"], "model.width=32 is not divisible by model.heads=3"),
        (["tiny", "--model.patch", "3"], "model.patch=3 does not divide the image size 8×8"),
        (["tiny", "--model.channels", "3"], "use --model.channels 1"),
        (
            ["tiny", "--data.dataset", "digit"],
            "data.dataset='digit' is unknown; did you mean digits",
        ),
        (["tiny", "--data.size", "16"], "data.size=16: dataset digits: unknown option"),
        (["shapes-12l", "--data.dataset", "digits"], "; for none: --data.size None"),
        (["shapes-12l", "--data.size", "16"], "data.size=16 is not possible for shapes"),
        (["tiny", "--from", "nowhere"], "--from nowhere: no run at nowhere; "),
        (["tiny", "--split-from", "nowhere"], "--split-from nowhere: no run at nowhere; "),
        (["tiny", "--grow-from", "nowhere"], "--grow-from nowhere: no run at nowhere; "),
        (["tiny", "--device", "meta"], "train.device='meta' cannot be used here: "),
        (["tiny", "--device", "tpu"], "train.device='tpu' cannot be used here: "),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    place = ["--run-dir", str(tmp_path / "run")] if arguments else []
    assert main(["train", *arguments, *place]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_folders_in_use_or_of_another_experiment_are_one_line(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    command = ["train", "tiny", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "holds another experiment (model.depth: 2 there, 4 now, " in shown
    assert shown.count("\n") == 1
    with RunFolder(tmp_path / "run", runs.experiment()):
        assert main(command) == 2
    shown = capsys.readouterr().err
    assert "is in use by process" in shown
    assert shown.count("\n") == 1


def test_live_line_on_a_terminal(tmp_path: Path) -> None:
    screen = io.StringIO()
    progress = ProgressLine(Console(file=screen, force_terminal=True, width=120, _environ={}))
    train(runs.experiment(), tmp_path / "run", observers=[progress])
    shown = screen.getvalue()
    last = runs.lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert f"loss {last['loss']:.4f}  grad {last['grad_norm']:.3g}" in shown
    assert "8/8" in shown
    assert "finished step 8 of 8" in shown
