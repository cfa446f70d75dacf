"""From a folder of photographs to a resumed run and pictures, by the commands alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from mvsplit.cli import main
from mvsplit.data import manifest
from mvsplit.data.manifest import Settings
from tests.data.photographs import fill
from tests.training import ranks
from tests.training.runs import assert_same_run, lines, log_of

ENCODE = ["--vae", "pixels", "--text-encoder", "words:32", "--resolution", "16", "--multiple", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photographs")
    fill(place / "pictures")
    command = ["encode", str(place / "pictures"), str(place / "cache"), *ENCODE, "--flips"]
    assert main([*command, "--shard-size", "8", "--device", "cpu"]) == 0
    return place


def command(place: Path, run: str, *options: str) -> list[str]:
    cache = ["--data.dataset", "cache", "--data.path", str(place / "cache")]
    model = ["--model.channels", "3", "--model.patch", "4", "--model.depth", "2"]
    size = ["--batch-size", "4", "--device", "cpu", "--probe-every", "0"]
    return ["train", "tiny", "--run-dir", str(place / run), *cache, *model, *size, *options]


def train(place: Path, run: str, *options: str) -> int:
    return main(command(place, run, *options))


def test_encode_train_resume_sample(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "straight", "--steps", "6") == 0
    assert train(place, "resumed", "--steps", "3") == 0
    (place / "cache").rename(place / "moved")
    assert train(place, "resumed", "--steps", "6", "--data.path", str(place / "moved")) == 0
    (place / "moved").rename(place / "cache")
    (place / "straight" / "layers.jsonl").touch()
    (place / "resumed" / "layers.jsonl").touch()
    assert_same_run(place / "straight", place / "resumed")
    assert len({line["loss"] for line in lines(place / "straight" / "metrics.jsonl")}) == 6
    for prompt in ("a red dahlia", "something that no caption says"):
        command = ["sample", str(place / "straight"), "--prompt", prompt, "-n", "2"]
        assert main([*command, "--steps", "2", "--device", "cpu"]) == 0
    assert len(list((place / "straight" / "samples").glob("*/0000[01].png"))) == 4


def test_a_cache_that_does_not_fit_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "--model.channels=4": "model.channels=4: the data have 3; use --model.channels 3\n",
        "--model.patch=3": "does not divide the image size 12×20; use --model.patch 2\n",
        "--model.text-width=16": "the cache's text states have 32; use --model.text-width 32\n",
        f"--data.path={place}": f"data.path: {place} holds no finished cache; make it with",
    }
    for option, message in wrong.items():
        assert train(place, "wrong", *option.split("=")) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1


def test_all_that_a_cache_asks_for_is_said_at_once_and_then_serves(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ("--model.channels", "4", "--model.text-width", "16", "--model.patch", "3")
    assert train(place, "at-once", *wrong) == 2
    use = capsys.readouterr().err.strip().rpartition("; use ")[2].split()
    assert use[::2] == ["--model.channels", "--model.text-width", "--model.patch"]
    assert train(place, "at-once", "--steps", "1", *use) == 0


def test_a_cache_of_other_weights_stops_the_run_before_a_step(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "vae", "--steps", "2") == 0
    path = place / "cache" / "manifest.json"
    before = path.read_text()
    tree = json.loads(before)
    settings = dataclasses.replace(Settings(**tree["settings"]), vae="flux2:0123abcd")
    path.write_text(json.dumps({**tree, "settings": dataclasses.asdict(settings)}))
    capsys.readouterr()
    try:
        assert train(place, "vae", "--steps", "4") == 2
        assert "vae: the loader has flux2:0123abcd, the saved run has pixels" in (
            capsys.readouterr().err
        )
        assert len(lines(place / "vae" / "metrics.jsonl")) == 2
        assert main(["sample", str(place / "vae"), "--prompt", "", "--device", "cpu"]) == 2
        assert "vae: pixels is pixels, the cache was made with flux2:0123abcd" in (
            capsys.readouterr().err
        )
    finally:
        path.write_text(before)


def only_the_first_computes(rank: int) -> None:
    """Has the checksum of a shard end the process, on all ranks but the first."""
    if rank:
        manifest.sha256 = lambda path: sys.exit(f"rank {rank} has read {path}")


def test_two_processes_compute_checksums_once_and_see_the_same_pictures(place: Path) -> None:
    assert train(place, "one", "--steps", "3") == 0
    arguments = command(place, "two", "--steps", "3")
    log = place / "log"
    assert ranks.finish(ranks.start(arguments, 2, only_the_first_computes, log)) == [0, 0]
    for ours, alone in zip(*(log_of(place / run) for run in ("two", "one")), strict=True):
        assert ours == pytest.approx(alone, rel=1e-5, abs=1e-7)
    shard = next((place / "cache" / "shards").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    try:
        started = ranks.start(arguments, 2, only_the_first_computes, log)
        assert ranks.finish(started) == [2, 2]
    finally:
        shard.write_bytes(whole)
    assert log.read_text().count(f"{shard} is damaged (checksum)") == 1


def test_the_preset_for_ones_own_pictures_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "pictures", "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "mvsplit: data.path: name the folder that mvsplit encode has filled\n"
    )


def test_encode_errors_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["encode", str(place / "pictures"), str(place / "cache"), *ENCODE, "--device", "cpu"]
    wrong = {
        ("--shard", "2/2"): "shard='2/2': write i/n",
        ("--resolution", "18"): "resolution=18 is not a multiple of 4",
        (): "flips=False: ",
    }
    for options, message in wrong.items():
        assert main([*command, *options]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
