"""Each evaluation has a name of its own, and one that is there is never overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mvsplit.cli.evaluate as command
from mvsplit.cli import evaluate_settings, main
from mvsplit.cli.evaluate_settings import Arguments, Names, names_of, options_of_weights
from mvsplit.cli.subject import Subject, open_subject, sampling_config
from mvsplit.evaluation.drawn import DrawnPictures
from mvsplit.evaluation.passport import read_evaluation

TRAIN = ["--steps", "2", "--batch-size", "8", "--device", "cpu", "--data.split", "train"]
USUAL = "step_00000002_euler35_g2_shift1_seed0_n600"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "digits"
    assert main(["train", "tiny", "--run-dir", str(run), *TRAIN]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "digits"))


@pytest.fixture(scope="module")
def subject(trained) -> Subject:
    return open_subject(Arguments(source=trained, device="cpu"))


def evaluate(run: Path, *options: str) -> int:
    return main(["evaluate", str(run), "--steps", "2", "--device", "cpu", *options])


def evaluations(run: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (run / "evaluations").glob("*.json")}


def named(subject: Subject, samples: int | None = None, **settings: object) -> Names:
    args = Arguments(source=Path("run"), **settings)
    return names_of(args, subject, sampling_config(args, subject), samples)


def test_default_settings_have_the_name_they_always_had(subject):
    assert named(subject) == Names(pictures=USUAL, scores=USUAL)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"guidance_interval": (0.2, 0.8)}, "_interval0.2-0.8"),
        ({"guidance_rescale": 0.5}, "_rescale0.5"),
        ({"prompts": Path("some/mine.txt")}, "_prompts-mine"),
        ({"validation_data": Path("caches/other one/")}, "_val-other-one"),
        ({"settings": Path("runs/first")}, "_settings-first"),
        ({"vae": "a/FLUX.2-vae", "num_heads": 4}, "_vae-FLUX.2-vae_num-heads-4"),
        ({"padding": "attend", "resolution": "64x32"}, "_padding-attend_resolution-64x32"),
        ({"dtype": "bf16"}, "_bf16"),
    ],
)
def test_a_setting_of_the_pictures_is_in_both_names(subject, settings, part):
    assert named(subject, **settings) == Names(pictures=USUAL + part, scores=USUAL + part)


def test_the_order_is_fixed_and_the_names_of_equal_settings_are_equal(subject):
    several = {"prompts": Path("p.txt"), "guidance_rescale": 0.5, "guidance_interval": (0.0, 0.5)}
    backwards = dict(reversed(several.items()))
    wanted = USUAL + "_interval0-0.5_rescale0.5_prompts-p"
    assert named(subject, **several) == named(subject, **backwards)
    assert named(subject, **several).scores == wanted
    usual = {"padding": "mask", "resolution": "256", "batch_size": 3, "json": Path("x")}
    assert named(subject, **usual).scores == USUAL
    assert options_of_weights(Arguments(source=Path("w"), padding="mask", resolution="256")) == {}


def test_a_device_is_in_the_name_where_it_is_not_the_default(subject, monkeypatch):
    def on_a_gpu(name: str, option: str) -> torch.device:
        return torch.device("cuda" if name == "auto" else name)

    assert named(subject, device="auto").scores == USUAL
    monkeypatch.setattr(evaluate_settings, "resolve_device", on_a_gpu)
    assert named(subject, device="cpu").scores == f"{USUAL}_cpu"
    assert named(subject, device="cuda:0").scores == named(subject).scores == USUAL


def test_what_judges_is_in_the_name_of_the_scores_alone(subject):
    real = {"reference": Path("data/real.npz"), "inception": Path("i.pth")}
    assert named(subject, 64, **real) == Names(pictures=USUAL, scores=f"{USUAL}_v64_ref-real")


def test_each_number_of_samples_is_another_evaluation(run, capsys):
    on_cpu = "_cpu" if torch.cuda.is_available() else ""  # which is not the default there
    start = f"step_00000002_euler2_g2_shift1_seed0_n0{on_cpu}"
    for options in (["--validation-samples", "1000000"], ["--validation-samples", "4"], []):
        assert evaluate(run, "-n", "0", *options) == 0
        said = "validation_samples=1000000: there are 435 in digits held-out, and all of them are"
        assert (said in capsys.readouterr().out) is (options[1:] == ["1000000"])
    assert set(evaluations(run)) == {start, f"{start}_v4", f"{start}_v435"}
    counts = {
        name: json.loads(text)["passport"]["validation"]["samples"]
        for name, text in evaluations(run).items()
    }
    assert counts == {start: 256, f"{start}_v4": 4, f"{start}_v435": 435}
    assert evaluate(run, "-n", "0", "--validation-samples", "256") == 0
    assert "are shown again" in capsys.readouterr().out


def test_evaluations_that_draw_the_same_share_the_pictures(run, monkeypatch):
    assert evaluate(run, "-n", "4", "--validation-samples", "3") == 0
    monkeypatch.setattr(DrawnPictures, "add", None)  # nothing is drawn again
    assert evaluate(run, "-n", "4", "--validation-samples", "2") == 0
    assert len(evaluations(run)) == 2
    assert sum(path.is_dir() for path in (run / "evaluations").iterdir()) == 1


def test_drawn_scores_are_not_overwritten_by_those_of_no_pictures(run, capsys):
    few = ["--validation-samples", "3", "--name", "coarse"]
    assert evaluate(run, "-n", "4", *few) == 0
    before = evaluations(run)
    for options, differs in (
        (["-n", "0"], "sampling: given there, absent now"),
        (["-n", "4", "--seed", "1"], "sampling.seed: 0 there, 1 now"),
        (["-n", "4", "--validation-samples", "2"], "validation.samples: 3 there, 2 now"),
    ):
        capsys.readouterr()
        assert evaluate(run, *few, *options) == 2
        refusal = capsys.readouterr().err
        assert refusal.count("\n") == 1
        assert "coarse.json is there, with other settings, and is not overwritten" in refusal
        assert differs in refusal
        assert refusal.endswith("choose another --name, or remove it\n")
    assert evaluations(run) == before


def test_the_same_is_shown_again_without_being_computed(run, tmp_path, monkeypatch, capsys):
    few = ["-n", "4", "--validation-samples", "3"]
    assert evaluate(run, *few) == 0
    first, before = capsys.readouterr().out, evaluations(run)
    monkeypatch.setattr(command, "validation_loss", None)
    monkeypatch.setattr(command.Evaluating, "_draw", None)
    assert evaluate(run, *few, "--batch-size", "2", "--json", str(tmp_path / "copy.json")) == 0
    again = capsys.readouterr().out
    notice, _, shown = again.partition("\n")
    assert "the same settings, network and data were scored on" in notice
    assert shown == first + f"the same in: {tmp_path / 'copy.json'}\n"
    assert evaluations(run) == before
    assert read_evaluation(tmp_path / "copy.json").samples == read_evaluation(run).samples


def test_another_version_that_made_them_is_said(run, monkeypatch, capsys):
    few = ["-n", "0", "--validation-samples", "3"]
    assert evaluate(run, *few) == 0
    head = command.passport_head
    other = {"code_sha256": 64 * "e"}
    monkeypatch.setattr(command, "passport_head", lambda *given: {**head(*given), **other})
    assert evaluate(run, *few) == 0
    out = capsys.readouterr().out
    assert "made with other versions (code_sha256: " in out
    assert f" there, {12 * 'e'} now); to score anew, choose another --name" in out


def test_another_network_and_other_data_are_said_and_refused(run, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("two\n")
    few = ["-n", "2", "--validation-samples", "3", "--prompts", str(prompts)]
    assert evaluate(run, *few) == 0
    before = evaluations(run)
    prompts.write_text("three\n")
    capsys.readouterr()
    assert evaluate(run, *few) == 2
    refusal = capsys.readouterr().err
    assert "mine_v3.json is there, of other data, and is not overwritten" in refusal
    prompts.write_text("two\n")
    options = ["--run-dir", str(tmp_path / "other"), "--seed", "7"]
    assert main(["train", "tiny", *options, *TRAIN]) == 0
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    capsys.readouterr()
    assert evaluate(run, *few) == 2
    refusal = capsys.readouterr().err
    assert "is there, of another network, and is not overwritten (weights.sha256: " in refusal
    assert evaluations(run) == before


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", "", "a\\b", "a\nb"])
def test_a_name_is_that_of_one_folder(trained, name, capsys):
    assert evaluate(trained, "-n", "0", "--name", name) == 2
    refusal = capsys.readouterr().err
    assert "must be the name of one folder in evaluations/" in refusal
    assert not (trained / "evaluations").exists()
    assert not (trained / "x.json").exists()
