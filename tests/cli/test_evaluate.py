"""`mvsplit evaluate` on tiny runs: scores, passports, interruption, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import mvsplit.cli.evaluate as command
from mvsplit.cli import main
from mvsplit.evaluation.drawn import DrawnPictures
from mvsplit.evaluation.passport import read_evaluation, weights_sha256
from mvsplit.training import load_run

TRAIN = ["--steps", "2", "--save-every", "1", "--batch-size", "8", "--device", "cpu"]
FAST = ["--steps", "2", "--device", "cpu", "--validation-samples", "5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs on digits with other seeds, and one on shapes."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        options = ["--data.split", "train", "--seed", seed, *TRAIN]
        assert main(["train", "tiny", "--run-dir", str(folder / f"digits{seed}"), *options]) == 0
    shapes = ["--data.dataset", "shapes", "--data.size", "32", "--model.channels", "3"]
    patch = ["--model.patch", "8", *TRAIN]
    assert main(["train", "tiny", "--run-dir", str(folder / "shapes"), *shapes, *patch]) == 0
    return folder


@pytest.fixture
def place(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def evaluate(run: Path, *options: str, count: int = 7) -> int:
    return main(["evaluate", str(run), "-n", str(count), *FAST, *options])


def error_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("mvsplit: ")
    assert err.count("\n") == 1
    return err


def test_scores_of_digits_and_all_they_depend_on(place, tmp_path, capsys):
    run = place / "digits0"
    assert evaluate(run, "--seed", "3", "--json", str(tmp_path / "here.json")) == 0
    found = read_evaluation(run)
    shown = capsys.readouterr().out
    explained = [line.partition(": ")[0] for line in shown.splitlines() if " is better" in line]
    assert explained[0] == "validation_loss"
    assert explained[-1] == "digit_frechet"
    assert "± is one standard error" in shown
    on_cpu = "_cpu" if torch.cuda.is_available() else ""  # which is not the default there
    assert f"evaluations/step_00000002_euler2_g2_shift1_seed3_n7{on_cpu}_v5.json" in shown
    assert shown.endswith(f"the same in: {tmp_path / 'here.json'}\n")
    assert found.passport == json.loads((tmp_path / "here.json").read_text())["passport"]
    expected = {"validation_loss", "digit_accuracy", "digit_accuracy_real", "digit_frechet"}
    assert expected < set(found.scores)
    assert all(name.split("_stderr")[0] in shown for name in found.scores)
    passport = found.passport
    assert passport["sampling"] == {
        "steps": 2, "sampler": "euler", "guidance": 2.0, "guidance_interval": [0.0, 1.0],
        "guidance_rescale": 0.0, "shift": 1.0, "seed": 3, "pictures": 7,
        "prompts_sha256": passport["sampling"]["prompts_sha256"],
    }  # fmt: skip
    assert passport["weights"] == {
        "source": str(run), "step": 2, "averaged": True,
        "sha256": weights_sha256(load_run(run).model.state_dict()),
    }  # fmt: skip
    assert passport["validation"]["samples"] == 5
    assert passport["reference"]["pictures"] == 1797
    assert passport["command"].startswith(f"mvsplit evaluate {run} -n 7")


def test_weights_of_a_run_are_scored_as_the_run_with_its_settings(
    place, tmp_path, capsys, monkeypatch
):
    run, weights = place / "digits0", tmp_path / "merged.safetensors"
    assert main(["convert", str(run), str(weights)]) == 0
    assert evaluate(run) == 0
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there.json"
    assert evaluate(weights, "--settings", str(run), "--json", str(there)) == 0
    of_run, of_weights = read_evaluation(run), json.loads(there.read_text())
    assert of_weights["scores"] == pytest.approx(of_run.scores)
    passport = of_weights["passport"]
    assert passport["validation"] == of_run.passport["validation"]
    assert passport["weights"]["settings"] == str(run)
    (kept,) = (tmp_path / "evaluations").glob("merged_*.json")
    capsys.readouterr()
    same = ["evaluate", "compare", str(run), str(kept), "--allow", "weights.averaged"]
    assert main(same) == 0
    assert evaluate(run, "--settings", str(run)) == 2
    assert "is a run and has its own" in capsys.readouterr().err


def test_the_weights_as_trained_are_others(place):
    run = place / "digits0"
    assert evaluate(run) == 0
    averaged = read_evaluation(run).passport["weights"]
    assert evaluate(run, "--no-ema") == 0
    plain = read_evaluation(next((run / "evaluations").glob("*no-ema*.json"))).passport["weights"]
    assert plain["averaged"] is False
    assert plain["sha256"] != averaged["sha256"]


def test_scores_of_shapes(place):
    assert evaluate(place / "shapes", count=12) == 0
    found = read_evaluation(place / "shapes")
    scores, exact = found.scores, found.samples["caption_exact"]
    assert (len(exact), sum(exact) / 12) == (12, scores["caption_exact"])
    tasks = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert {f"geneval_{task}" for task in (*tasks, "mean")} < set(scores)
    assert scores["geneval_mean"] == 0
    assert scores["shapes_frechet"] > 0


def test_the_same_command_goes_on(place, monkeypatch, capsys):
    run, add = place / "digits0", DrawnPictures.add

    def cut_off(folder, indices, pictures):
        add(folder, indices, pictures)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DrawnPictures, "add", cut_off)
        assert evaluate(run, "--batch-size", "3") == 130
    assert "3 of 7 pictures are in" in capsys.readouterr().out
    assert not list((run / "evaluations").glob("*.json"))
    saved = []
    monkeypatch.setattr(DrawnPictures, "add", lambda f, i, p: (saved.extend(i), add(f, i, p))[1])
    assert evaluate(run) == 0
    assert saved == [3, 4, 5, 6]
    whole = place / "digits0-copy"
    shutil.copytree(run, whole)
    shutil.rmtree(whole / "evaluations")
    assert evaluate(whole) == 0
    assert read_evaluation(run).scores == pytest.approx(read_evaluation(whole).scores, rel=1e-5)


def test_runs_of_other_weights_are_compared(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    runs = [str(place / "digits0"), str(place / "digits1")]
    for run in runs:
        assert evaluate(Path(run)) == 0
    capsys.readouterr()
    assert main(["evaluate", "compare", *runs]) == 0
    shown = capsys.readouterr()
    assert "validation_loss" in shown.out
    words = "B − A, paired (5 of validation_loss, 7 of digit_accuracy): both were asked the same"
    assert words in shown.out
    assert "It is of these two networks" in shown.out
    assert "allowed" not in shown.out
    assert shown.err == ""


def test_what_differs_in_more_is_refused_and_said(place, capsys):
    first, second = place / "digits0", place / "digits1"
    assert evaluate(first) == 0
    assert evaluate(second, "--guidance", "3", "--validation-samples", "4") == 0
    capsys.readouterr()
    compare = ["evaluate", "compare", str(first), str(second)]
    assert main(compare) == command.evaluate_compare.REFUSED == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[1:5] == [
        f"  A  {first}",
        f"  B  {second}",
        "  sampling.guidance: 2.0 in A",
        "  sampling.guidance: 3.0 in B",
    ]
    assert lines[5:7] == ["  validation.samples: 5 in A", "  validation.samples: 4 in B"]
    assert re.fullmatch(r"  validation\.sha256: [0-9a-f]{12} in A", lines[7])
    assert main([*compare, "--allow", "sampling.guidance"]) == 1
    assert "sampling.guidance" not in capsys.readouterr().err
    assert main([*compare, "--allow", "sampling.guidance", "validation"]) == 0
    out = capsys.readouterr().out
    assert "differs, and allowed: sampling.guidance 2.0 | 3.0\n" in out
    assert "no difference of what was drawn is one of the networks alone" in out
    assert "both were asked the same" not in out
    reason = "not the same samples and noise (sampling.guidance)"
    assert f"– in B − A: digit_accuracy: {reason}\n" in out


def test_no_validation_without_samples_apart(place, capsys):
    run = place / "all"
    assert main(["train", "tiny", "--run-dir", str(run), *TRAIN]) == 0
    capsys.readouterr()
    assert evaluate(run) == 2
    assert "trained on all digits" in error_line(capsys)
    options = ["-n", "7", "--steps", "2", "--device", "cpu"]
    assert main(["evaluate", str(run), *options]) == 0
    assert "no validation loss: this run was trained on all" in capsys.readouterr().out
    assert "validation_loss" not in read_evaluation(run).scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "-1"], "num_images=-1: must not be negative"),
        (["-n", "1"], "-n 1 (--num-images): a Fréchet distance needs two pictures"),
        (["--validation-samples", "0", "--num-images", "0"], "nothing to score"),
        (["--reference", "photographs"], "FID needs both"),
        (["--prompts", "nowhere.txt"], "prompts=nowhere.txt: No such file"),
        (["--validation-data", "cache"], "has held-out samples of its own"),
        (["--sampler", "eular"], "did you mean euler"),
    ],
)
def test_one_line_for_what_cannot_be(runs, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(runs / "digits0", *options) == 2
    assert message in error_line(capsys)


def test_a_run_that_cannot_be_written_to_is_one_line(place, capsys):
    (place / "digits0" / "evaluations").write_text("")
    assert evaluate(place / "digits0", "--validation-samples", "0") == 2
    assert error_line(capsys).startswith(
        f"mvsplit: cannot write {place / 'digits0' / 'evaluations'}"
    )


def test_other_settings_under_the_same_name_are_refused(place, capsys):
    assert evaluate(place / "digits0", "--name", "mine") == 0
    assert evaluate(place / "digits0", "--name", "mine", "--guidance", "3") == 2
    refusal = error_line(capsys)
    assert "mine.json is there, with other settings, and is not overwritten" in refusal
    assert "(sampling.guidance: 2.0 there, 3.0 now); choose another --name" in refusal


def test_two_runs_are_for_compare(capsys):
    assert main(["evaluate", "A", "B", "--seed", "1"]) == 2
    assert "mvsplit evaluate compare A B" in error_line(capsys)


@pytest.mark.parametrize("given", [[], ["one"]])
def test_comparing_takes_two(given, capsys, tmp_path):
    assert main(["evaluate", "compare", *given]) == 2
    assert "two evaluations or more" in error_line(capsys)
