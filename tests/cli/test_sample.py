"""`mvsplit sample` on a run of two steps: what it writes, and every way in which it refuses."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvsplit.cli.sample as command
from mvsplit.cli import main
from mvsplit.hub import write_weights
from mvsplit.kernels.hopper import driver
from mvsplit.sampling import Engine, read_record
from tests.hub.tiny import tiny_dit


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


def test_kernels_that_wait_in_vain_end_it_in_one_line_after_what_is_drawn(run, capsys, monkeypatch):
    """The word that kernels write is set behind the second batch."""
    monkeypatch.setattr(driver, "_faults", [torch.zeros(1, dtype=torch.int32)])
    sampling = sys.modules["mvsplit.sampling.generate"]  # the package's `generate` is the function
    batches, one_batch = [], sampling._one_batch

    def failing(*args):
        batches.append(one_batch(*args))
        driver._faults[0].fill_(len(batches) == 2)
        return batches[-1]

    monkeypatch.setattr(sampling, "_one_batch", failing)
    assert draw(run, "--batch-size", "2", "--out", str(run / "out")) == 2
    out, err = capsys.readouterr()
    assert f"2 of 5 pictures are in {run / 'out'}" in out
    (line,) = [line for line in err.splitlines() if line.startswith("mvsplit: ")]
    assert "did not end within seconds" in line
    assert "CUDA_VISIBLE_DEVICES= before the command) none of these kernels run" in line
    assert "Traceback" not in err


def test_pictures_records_and_grid(run, capsys):
    assert draw(run, "--seed", "3") == 0
    folder = run / "samples" / "step_00000002_seven_seed3"
    assert capsys.readouterr().out.splitlines() == [
        "euler, 2 steps, guidance 2, shift 1 (of the run's training): 4 passes of the network a "
        "picture",
        f"5 of 5 pictures are in {folder}",
    ]
    expected = {
        "prompt": "seven", "seed": 3, "steps": 2, "sampler": "euler", "guidance": 2.0,
        "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0, "shift": 1.0,
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
        "sampler": ["--sampler", "heun"],
        "interval": ["--guidance", "6", "--guidance-interval", "0", "0.6"],
        "rescale": ["--guidance", "6", "--guidance-rescale", "1"],
    }
    for name, options in variants.items():
        assert draw(run, *options, "--out", str(tmp_path / name), count=2) == 0
    made = {name: pixels(tmp_path / name) for name in variants}
    for name in variants.keys() - {"base"}:
        assert abs(made[name] - made["base"]).max() > 0, name
    for name in ("interval", "rescale"):
        assert abs(made[name] - made["guidance"]).max() > 0, name
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
    assert capsys.readouterr().out.endswith(f"picture\n2 of 5 pictures are in {folder}\n")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [read_record(folder / line["file_name"])["index"] for line in lines] == [0, 1]
    assert Image.open(folder / "grid.png").width == 2 * 64 + 2


def test_the_help_names_samplers_and_words(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["sample", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Samplers: euler, heun, ab2, dpmpp-2m." in text
    assert "Words of a run on digits: zero, one, two" in text
    assert "triangle, triangles, two, white, yellow." in text


def test_a_run_may_have_a_shift_of_its_own_for_drawing(run, tmp_path, capsys):
    config = run / "config.json"
    tree = json.loads(config.read_text())
    tree["train"]["sample_shift"] = 5.0
    config.write_text(json.dumps(tree))
    assert draw(run, "--out", str(tmp_path / "own"), count=1) == 0
    assert "shift 5 (of the run's sample_shift): 4 passes" in capsys.readouterr().out
    assert draw(run, "--shift", "5", "--out", str(tmp_path / "asked"), count=1) == 0
    assert "shift 5: 4 passes" in capsys.readouterr().out
    assert (pixels(tmp_path / "own") == pixels(tmp_path / "asked")).all()


def test_blocks_are_left_out_on_demand_only(run, tmp_path):
    for count in ("0", "1", "3"):
        assert draw(run, "--skip-blocks", count, "--out", str(tmp_path / count), count=2) == 0
    assert draw(run, "--out", str(tmp_path / "plain"), count=2) == 0
    assert (pixels(tmp_path / "0") == pixels(tmp_path / "plain")).all()
    assert abs(pixels(tmp_path / "1") - pixels(tmp_path / "3")).max() > 0
    assert "skipped_blocks" not in read_record(tmp_path / "0" / "00000.png")
    assert len(read_record(tmp_path / "3" / "00000.png")["skipped_blocks"]) == 3


# A given picture


@pytest.fixture
def given(tmp_path) -> Path:
    """Real digits' grey levels at 8×8, and a mask whose right half is to be drawn."""
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(levels).save(tmp_path / "given.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "given.png"


def enlarged(path: Path) -> np.ndarray:
    return np.kron(np.asarray(Image.open(path)), np.ones((8, 8))).astype(int)


def test_a_weak_strength_gives_the_picture_and_a_full_one_forgets_it(run, given, tmp_path):
    for strength in ("0.001", "0.6", "1"):
        options = ["--image", str(given), "--strength", strength]
        assert draw(run, *options, "--out", str(tmp_path / strength), count=2) == 0
    assert draw(run, "--out", str(tmp_path / "plain"), count=2) == 0
    assert abs(pixels(tmp_path / "0.001") - enlarged(given)).max() <= 1
    assert abs(pixels(tmp_path / "0.6") - enlarged(given)).max() > 5
    assert (pixels(tmp_path / "1") == pixels(tmp_path / "plain")).all()
    record = read_record(tmp_path / "0.6" / "00000.png")
    assert (record["image"], record["strength"]) == (str(given), 0.6)


def test_the_black_part_of_a_mask_stays_to_the_grey_level(run, given, tmp_path):
    mask = str(given.with_name("mask.png"))
    options = ["--image", str(given), "--mask", mask, "--out", str(tmp_path / "out")]
    assert draw(run, *options, count=2) == 0
    drawn = pixels(tmp_path / "out")
    assert (drawn[:, :, :32] == enlarged(given)[:, :32]).all()
    assert abs(drawn[0] - drawn[1])[:, 32:].max() > 20
    record = read_record(tmp_path / "out" / "00000.png")
    assert (record["strength"], record["mask"]) == (1.0, mask)


def test_a_larger_picture_is_cut_around_its_centre_and_resized(run, given, tmp_path):
    """Eight times as large, with margins left and right, and in colours."""
    wide = np.full((64, 96, 3), 200, dtype=np.uint8)
    wide[:, 16:80] = enlarged(given)[:, :, None]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    options = ["--image", str(tmp_path / "wide.png"), "--strength", "0.001"]
    assert draw(run, *options, "--out", str(tmp_path / "out"), count=1) == 0
    assert abs(pixels(tmp_path / "out")[0] - enlarged(given)).max() <= 1


def test_masks_that_do_not_fit_are_one_line(run, given, tmp_path, capsys):
    Image.new("L", (8, 7), 255).save(tmp_path / "small.png")
    Image.new("L", (8, 8), 127).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    for mask, message in (
        ("small", "small.png: has 8×7 pixels, the picture 8×8; give one of the picture's size"),
        ("black", "black.png: is black; paint white what is to be drawn anew"),
        ("text", "text.png: cannot be read as a picture"),
    ):
        assert draw(run, "--image", str(given), "--mask", str(tmp_path / f"{mask}.png")) == 2
        assert message in error_line(capsys)
    assert not (run / "samples").exists()


# Refusals


def test_an_unknown_word_is_named_and_nothing_is_made(run, capsys):
    assert draw(run, prompt="sevn") == 2
    assert "unknown word 'sevn' in 'sevn'; did you mean seven?" in error_line(capsys)
    assert not (run / "samples").exists()


def test_a_run_that_does_not_exist_names_its_neighbours(run, capsys):
    assert draw(run.parent / "digit") == 2
    assert f"no run at {run.parent / 'digit'}; did you mean {run}?" in error_line(capsys)


def test_what_is_neither_run_nor_weights_is_not_asked_for_a_text_encoder(run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# text\n")
    assert draw(tmp_path / "README.md") == 2
    assert "README.md is truncated or no checkpoint (not a" in error_line(capsys)
    assert draw(run.parent) == 2
    assert f"{run.parent} is no run, no checkpoint and no diffusers" in error_line(capsys)


@pytest.mark.parametrize("part", ["config.json", "metrics.jsonl", "checkpoints"])
def test_a_part_of_a_run_says_to_name_the_run(run, capsys, part):
    assert draw(run / part) == 2
    assert f"{part} is a part of {run}; name the folder {run}\n" in error_line(capsys)


@pytest.mark.parametrize("command", ["sample", "evaluate", "train"])
def test_a_file_of_a_checkpoint_says_to_name_the_run_or_the_checkpoint(run, capsys, command):
    step = run / "checkpoints" / "step_00000002"
    own = step / "model.safetensors"
    options = {
        "sample": [str(own), "--prompt", "three"],
        "evaluate": [str(own)],
        "train": ["tiny", "--from", str(own), "--run-dir", str(run.parent / "no")],
    }
    assert main([command, *options[command], "--device", "cpu"]) == 2
    assert f"name the folder {run}, or {step} for that step\n" in error_line(capsys)


def test_where_there_are_no_runs_it_says_how_to_make_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert draw(Path("nothing")) == 2
    assert error_line(capsys) == "mvsplit: no run at nothing; train one first: mvsplit train tiny\n"


def test_a_truncated_checkpoint_is_named(run, capsys):
    for path in run.glob("checkpoints/*/ema.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    assert draw(run) == 2
    assert "step_00000002: ema.safetensors is truncated (1000 of" in error_line(capsys)


def test_what_is_cut_off_beside_the_weights_that_are_drawn_with_is_said(run, capsys):
    path = run / "checkpoints" / "step_00000002" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert draw(run) == 0
    said = capsys.readouterr().err
    assert f"warning: {path.parent} is damaged: model.safetensors is truncated (1000 of" in said
    assert "ema.safetensors, of which the network is taken, is whole" in said


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
        (["--sampler", "oiler"], "sampler='oiler' is unknown; did you mean euler"),
        (["--guidance", "-5"], "guidance=-5.0: must be a number of at least 0"),
        (["--guidance-interval", "0.9", "0.1"], "guidance_interval=0.9 0.1: give two times"),
        (["--guidance-rescale", "2"], "guidance_rescale=2.0: must be in [0, 1]"),
        (["--strength", "0.5"], "strength=0.5: needs a picture; give it with --image"),
        (["--mask", "a.png"], "mask=a.png: needs a picture; give it with --image"),
        (["--skip-blocks", "4"], "skip_blocks=4: must be at least 0 and less than the 4 blocks"),
        (["--image", "none.png"], "image=none.png: cannot be read as a picture"),
        (["--device", "abacus"], "--device='abacus' cannot be used here"),
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


def test_what_an_engine_chose_is_said(run, capsys, monkeypatch):
    """On CUDA the network is drawn by an engine; here one that can only leave it to the model."""
    monkeypatch.setattr(command, "accelerated", lambda model, say: Engine(model, say=say))
    assert draw(run, count=1) == 0
    assert "network: the model itself, because it runs on a cpu\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deeper", "deeper.safetensors"])
def test_grown_weights_have_no_settings_and_it_is_said_how_to_go_on(run, capsys, name):
    deeper, on = run.parent / name, run.parent / "on"
    assert main(["grow", str(run), "--depth", "6", "--out", str(deeper)]) == 0
    assert draw(deeper) == 2
    line = error_line(capsys)
    assert "has no run's settings" in line
    assert f"go on with mvsplit train PRESET --from {deeper}" in line
    assert "sample and evaluate take its settings with --settings RUN" in line
    assert "Qwen" not in line
    options = ["--model.depth", "6", "--run-dir", str(on), "--steps", "1", "--device", "cpu"]
    assert main(["train", "tiny", "--from", str(deeper), *options]) == 0
    assert draw(on, count=1) == 0


@pytest.mark.parametrize("name", ["same", "same.safetensors"])
def test_weights_are_drawn_with_the_settings_of_their_run(run, tmp_path, name):
    """Pictures and shift are those of the run itself, bit for bit, also where it grew."""
    same, deeper = tmp_path / name, tmp_path / f"deeper_{name}"
    to = [] if same.suffix else ["--to", "checkpoint"]
    assert main(["convert", str(run), str(same), *to]) == 0
    assert main(["grow", str(run), "--depth", "6", "--out", str(deeper)]) == 0
    assert draw(run, "--out", str(tmp_path / "run"), count=2) == 0
    expected = np.asarray(Image.open(tmp_path / "run" / "00001.png")).astype(int)
    for weights, off in ((same, 0), (deeper, 1)):  # more layers round otherwise
        out = tmp_path / f"of_{weights.name}"
        assert draw(weights, "--settings", str(run), "--out", str(out), count=2) == 0
        drawn = np.asarray(Image.open(out / "00001.png")).astype(int)
        assert abs(drawn - expected).max() <= off
        record = json.loads((out / "metadata.jsonl").read_text().splitlines()[1])
        assert (record["weights"], record["settings"]) == (str(weights), str(run))


def test_settings_are_read_without_any_file_of_weights(run, tmp_path, capsys):
    """Which may be many gigabytes; here there are none any more."""
    weights = tmp_path / "weights.safetensors"
    assert main(["convert", str(run), str(weights)]) == 0
    assert draw(weights, "--settings", str(run), "--out", str(tmp_path / "a"), count=1) == 0
    files = list(run.glob("checkpoints/*/*.safetensors"))
    assert {path.stem for path in files} >= {"model", "ema", "optimizer"}
    for path in files:
        path.unlink()
    one = run / "checkpoints" / "step_00000002"
    for settings, name in ((run, "b"), (one, "c")):
        out = tmp_path / name
        assert draw(weights, "--settings", str(settings), "--out", str(out), count=1) == 0
        drawn, before = (Image.open(f / "00000.png") for f in (out, tmp_path / "a"))
        assert np.array_equal(np.asarray(drawn), np.asarray(before))
    capsys.readouterr()
    assert draw(weights, "--settings", str(run), "--dtype", "bf16") == 2
    assert "dtype=bf16: a run is drawn with as it was trained" in error_line(capsys)


def test_settings_that_do_not_belong_to_the_weights_are_one_line(run, tmp_path, capsys):
    assert draw(run, "--settings", str(run)) == 2
    assert "is a run and has its own" in error_line(capsys)
    write_weights(tiny_dit(), tmp_path / "other.safetensors")
    assert draw(tmp_path / "other.safetensors", "--settings", str(run)) == 2
    assert "the run's model.channels is 1, that of" in error_line(capsys)
    assert draw(tmp_path / "other.safetensors", "--settings", str(tmp_path / "none")) == 2
    assert "no run at" in error_line(capsys)


def test_weights_of_the_released_sizes_are_told_of_qwen_only(tmp_path, capsys):
    write_weights(tiny_dit(text_width=1024), tmp_path / "released.safetensors")
    assert draw(tmp_path / "released.safetensors") == 2
    line = error_line(capsys)
    assert "holds none; give --text-encoder Qwen/Qwen3-0.6B" in line
    assert "run" not in line.split("holds none")[1]
