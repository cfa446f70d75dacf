"""A run on clips through every command: trained, resumed, watched, sampled, scored, and refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvsplit.cli import main
from mvsplit.diagnostics.report_run import find_pictures
from mvsplit.evaluation.passport import read_evaluation
from mvsplit.sampling import read_record
from tests.training import runs

TINY = [
    *("train", "clips-tiny", "--batch-size", "4", "--save-every", "2", "--probe-every", "2"),
    *("--model.depth", "2", "--model.width", "32", "--model.heads", "2", "--device", "cpu"),
    *("--data.frames", "4", "--model.ffn-width", "48", "--warmup", "2", "--model.mean", "frame"),
]
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "clips"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*TINY, "--steps", "4", "--run-dir", str(path)]) == 0
    torch.set_num_threads(threads)
    return path


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "clips"))


def draw(run: Path, *options: str, prompt: str = PROMPT) -> int:
    fixed = ["--prompt", prompt, "-n", "3", "--steps", "2", "--device", "cpu"]
    return main(["sample", str(run), *fixed, *options])


def error_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("mvsplit: ")
    assert err.count("\n") == 1
    return err


def test_half_and_half_is_the_whole(trained, tmp_path):
    """Weights, average, moments and random states bit for bit; the watch looked into each layer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for steps in ("2", "4"):
        assert main([*TINY, "--steps", steps, "--run-dir", str(tmp_path / "run")]) == 0
    torch.set_num_threads(threads)
    runs.assert_same_run(tmp_path / "run", trained)
    looks = runs.lines(trained / "layers.jsonl")
    assert looks[-1]["layer"] == [0, 1]
    assert all(value > 0 for value in looks[-1]["g_ctr_attn"])


def test_clips_records_and_contact_sheet(run, capsys):
    options = ["--frames", "4", "--seed", "3"]
    with_mp4 = importlib.util.find_spec("av") is not None
    assert draw(run, *options, *(["--mp4"] if with_mp4 else [])) == 0
    folder = run / "samples" / "step_00000004_a-red-circle-moving-left_seed3"
    assert capsys.readouterr().out.splitlines() == [
        "euler, 2 steps, guidance 2, shift 2 (of the run's sample_shift): 4 passes of the network "
        "a clip",
        f"3 of 3 clips are in {folder}",
    ]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["00000.gif", "00001.gif", "00002.gif"]
    for line in lines:
        with Image.open(folder / line["file_name"]) as gif:
            assert gif.n_frames == 4
            assert {"file_name": line["file_name"], **json.loads(gif.info["comment"])} == line
        assert (folder / line["file_name"]).with_suffix(".mp4").exists() == with_mp4
    sheet = np.asarray(Image.open(folder / "contact.png")).astype(int)
    assert sheet.shape == (3 * 66 - 2, 4 * 66 - 2, 3)
    assert np.ptp([sheet[66 * k :][:64] for k in range(3)], axis=0).max() > 50  # three clips
    assert read_record(folder / "contact.png")["prompt"] == PROMPT
    assert find_pictures(run) == [folder / "contact.png"]  # of the report


def test_a_clip_is_the_same_in_any_batch_size(run, tmp_path):
    for size in ("1", "3"):
        assert draw(run, "--batch-size", size, "--out", str(tmp_path / size)) == 0
    one, three = (
        np.asarray(Image.open(tmp_path / size / "contact.png")).astype(int) for size in ("1", "3")
    )
    # A latent may lie on the edge of two grey levels, and matrix products round by their size.
    assert abs(one - three).max() <= 1


def test_scores_of_clips(run):
    options = ["-n", "4", "--steps", "2", "--device", "cpu", "--validation-samples", "3"]
    assert main(["evaluate", str(run), *options]) == 0
    found = read_evaluation(run)
    assert {"validation_loss", "clip_objects", "clip_move", "clip_exact"} < set(found.scores)
    assert found.scores["clip_exact"] == 0
    assert set(found.samples["clip_exact"]) == {0}
    assert found.passport["validation"]["data"] == "clips series 1000003"


def test_a_plan_counts_the_tokens_of_all_frames(capsys):
    assert main(["plan", "clips-12l", "--gpu", "h200"]) == 0
    assert "512 image + 16 text tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frames", "8"], ("frames=8", "clips of 4 frames", "--data.frames 8")),
        (["--frames", "2"], ("frames=2", "clips of 4 frames", "--data.frames 2")),
        (["--fps", "0"], ("fps=0",)),
        (["--image", "x.png"], ("image=x.png", "clip cannot begin with a picture")),
    ],
)
def test_what_sampling_refuses(run, capsys, options, words):
    assert draw(run, *options) == 2
    line = error_line(capsys)
    assert all(word in line for word in words)
    assert not (run / "samples").exists()


def test_an_unknown_word_is_named(run, capsys):
    assert draw(run, prompt="a red circle moving upwards") == 2
    assert "'upwards'" in error_line(capsys)


def test_clips_shorter_than_a_patch_and_pictures_for_clips_are_refused(tmp_path, capsys):
    short = [*TINY, "--steps", "1", "--run-dir", str(tmp_path / "short"), "--data.frames", "1"]
    assert main(short) == 2
    line = error_line(capsys)
    assert "model.patch_frames=2" in line
    assert "1 frame, fewer than a patch" in line
    odd = [*TINY, "--steps", "1", "--run-dir", str(tmp_path / "odd"), "--data.frames", "5"]
    assert main(odd) == 2
    assert "does not divide the 5 frames" in error_line(capsys)
    digits = ["train", "tiny", "--steps", "1", "--device", "cpu"]
    assert main([*digits, "--run-dir", str(tmp_path / "digits")]) == 0
    capsys.readouterr()
    for option in (["--frames", "8"], ["--mp4"], ["--fps", "8"]):
        assert draw(tmp_path / "digits", *option, prompt="seven") == 2
        assert "draws pictures" in error_line(capsys)
    assert main([*digits, "--run-dir", str(tmp_path / "x"), "--data.frames", "4"]) == 2
    assert "unknown option 'frames'" in error_line(capsys)


def test_too_few_frames_to_score_are_refused_before_drawing(tmp_path, capsys):
    path = tmp_path / "short"
    assert main([*TINY, "--steps", "1", "--run-dir", str(path), "--data.frames", "2"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(path), "-n", "2", "--device", "cpu"]) == 2
    assert "too short to see a motion" in error_line(capsys)
    assert not (path / "evaluations").exists()


def test_weights_of_clips_are_not_written_as_what_cannot_hold_them(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "released.safetensors")]) == 2
    assert "model.patch_frames=2: the released layout can only hold 1" in error_line(capsys)
