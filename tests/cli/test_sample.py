"""`mvsplit sample` on a run of two steps: what it writes, and every way in which it refuses."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mvsplit.cli.sample as command
from mvsplit.cli import main
from mvsplit.sampling import read_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--steps", "2", "--save-every", "1", "--batch-size", "8", "--device", "cpu"]
    assert main(["train", "tiny", "--run-dir", str(path), *options]) == 0
    return path


@pytest.fixture(autouse=True)
def warnings_as_the_command_shows_them():
    """Not as pytest collects them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "digits"))


def draw(run: Path, *options: str, count: int = 5, prompt: str = "seven") -> int:
    fixed = ["--prompt", prompt, "--num-images", str(count), "--steps", "2", "--device", "cpu"]
    return main(["sample", str(run), *fixed, *options])


def pixels(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("0*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)


def error_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("mvsplit: ")
    assert err.count("\n") == 1
    return err


def test_pictures_records_and_grid(run, capsys):
    assert draw(run, "--seed", "3") == 0
    folder = run / "samples" / "step_00000002_seven_seed3"
    assert capsys.readouterr().out == f"5 of 5 pictures are in {folder}\n"
    expected = {
        "prompt": "seven", "seed": 3, "steps": 2, "guidance": 2.0, "shift": 1.0,
        "run": str(run), "step": 2, "weights": "averaged",
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        assert line == {"file_name": f"{index:05d}.png", **expected, "index": index}
        assert read_record(folder / line["file_name"]) == {**expected, "index": index}
    assert len(lines) == 5
    assert read_record(folder / "grid.png") == expected
    grid = np.asarray(Image.open(folder / "grid.png"))[:64, 66:130, 0]
    assert (grid == pixels(folder)[1]).all()


def test_picture_k_is_the_same_in_any_batch_size_and_number(run, tmp_path):
    for batch_size, count in ((1, 5), (2, 5), (8, 3)):
        out = tmp_path / f"{batch_size}"
        assert draw(run, "--batch-size", str(batch_size), "--out", str(out), count=count) == 0
    first = pixels(tmp_path / "1")
    assert np.ptp(first, axis=0).max() > 50
    # A latent may lie on the edge of two grey levels, and matrix products round by their size.
    assert abs(pixels(tmp_path / "2") - first).max() <= 1
    assert abs(pixels(tmp_path / "8") - first[:3]).max() <= 1


def test_options_reach_the_sampler(run, tmp_path):
    variants = {
        "base": [],
        "trained": ["--no-ema"],
        "seed": ["--seed", "1"],
        "guidance": ["--guidance", "6"],
        "shift": ["--shift", "5"],
    }
    for name, options in variants.items():
        assert draw(run, *options, "--out", str(tmp_path / name), count=2) == 0
    made = {name: pixels(tmp_path / name) for name in variants}
    for name in variants.keys() - {"base"}:
        assert abs(made[name] - made["base"]).max() > 0, name
    assert read_record(tmp_path / "trained" / "00000.png")["weights"] == "as trained"


def test_the_same_command_again_gets_a_folder_of_its_own(run):
    assert draw(run, count=1) == draw(run, count=1) == 0
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["step_00000002_seven_seed0", "step_00000002_seven_seed0-2"]


def test_one_checkpoint_can_be_chosen(run):
    assert draw(run / "checkpoints" / "step_00000001", count=1, prompt="") == 0
    assert (run / "samples" / "step_00000001_unconditional_seed0" / "00000.png").exists()


def test_what_was_drawn_before_ctrl_c_stays(run, capsys, monkeypatch):
    calls = []

    def interrupt_second(latents):
        calls.append(latents)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return command_to_pictures(latents)

    command_to_pictures = command.to_pictures
    monkeypatch.setattr(command, "to_pictures", interrupt_second)
    assert draw(run, "--batch-size", "2") == 130
    folder = run / "samples" / "step_00000002_seven_seed0"
    assert capsys.readouterr().out == f"2 of 5 pictures are in {folder}\n"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [read_record(folder / line["file_name"])["index"] for line in lines] == [0, 1]


# Refusals


def test_an_unknown_word_is_named_and_nothing_is_made(run, capsys):
    assert draw(run, prompt="sevn") == 2
    assert "unknown word 'sevn' in 'sevn'; did you mean seven?" in error_line(capsys)
    assert not (run / "samples").exists()


def test_a_run_that_does_not_exist_names_its_neighbours(run, capsys):
    assert draw(run.parent / "digit") == 2
    assert f"no run at {run.parent / 'digit'}; did you mean {run}?" in error_line(capsys)


def test_where_there_are_no_runs_it_says_how_to_make_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw(Path("nothing")) == 2
    assert error_line(capsys) == "mvsplit: no run at nothing; train one first: mvsplit train tiny\n"


def test_a_truncated_checkpoint_is_named(run, capsys):
    for path in run.glob("checkpoints/*/ema.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    assert draw(run) == 2
    assert "step_00000002: ema.safetensors is truncated (1000 of" in error_line(capsys)


def test_an_older_whole_checkpoint_stands_in_with_a_warning(run, capsys):
    path = run / "checkpoints" / "step_00000002" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert draw(run, count=1) == 0
    assert "; using step 1\n" in error_line(capsys)
    assert (run / "samples" / "step_00000001_seven_seed0").exists()


def test_a_foreign_checkpoint_is_named(run, capsys):
    for path in run.glob("checkpoints/*/manifest.json"):
        path.write_text(json.dumps({"format": "another program"}))
    assert draw(run) == 2
    assert "step_00000002 is not a checkpoint of mvsplit" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "0"], "num-images=0: must be at least 1"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--shift", "-1"], "shift=-1.0: must be greater than 0"),
        (["--seed", "-1"], "seed=-1: must not be negative"),
        (["--batch-size", "0"], "batch_size=0: must be at least 1"),
        (["--device", "abacus"], "device='abacus' cannot be used here"),
    ],
)
def test_options_out_of_range_are_one_line(run, capsys, options, message):
    assert draw(run, *options) == 2
    assert message in error_line(capsys)
    assert not (run / "samples").exists()


def test_a_folder_with_pictures_is_not_written_into(run, tmp_path, capsys):
    assert draw(run, "--out", str(tmp_path / "out"), count=1) == 0
    capsys.readouterr()
    assert draw(run, "--out", str(tmp_path / "out"), count=1) == 2
    assert f"out: {tmp_path / 'out'} is taken already" in error_line(capsys)
