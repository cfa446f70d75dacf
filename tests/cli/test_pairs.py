"""`mvsplit pairs`, and `mvsplit train … --objective dpo` on what it writes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest

from mvsplit.cli import main
from mvsplit.data.digits import NAMES
from mvsplit.data.pairs import Pairs
from mvsplit.evaluation.digits import read_digits
from tests.training import runs as small

TRAIN = ["--device", "cpu", "--batch-size", "32", "--save-every", "10"]
DRAW = ["--steps", "4", "--guidance", "1", "--captions", "60", "--batch-size", "120"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits that draws a few right, its pairs, and a run aligned to them."""
    folder = tmp_path_factory.mktemp("aligned")
    run, pairs = folder / "tiny", folder / "pairs.parquet"
    assert main(["train", "tiny", "--run-dir", str(run), "--steps", "30", *TRAIN]) == 0
    assert main(["pairs", str(run), "--out", str(pairs), *DRAW]) == 0
    assert align(folder, "aligned", "--steps", "12") == 0
    return folder


def align(folder: Path, name: str, *options: str) -> int:
    source = ["--from", str(folder / "tiny"), "--run-dir", str(folder / name)]
    given = [] if "--data.pairs" in options else ["--data.pairs", str(folder / "pairs.parquet")]
    dpo = ["--objective", "dpo", "--dpo.beta", "100", "--lr", "1e-3", "--caption-dropout", "0"]
    return main(["train", "tiny", *source, *given, *dpo, *TRAIN, *options])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("mvsplit: ")
    assert err.count("\n") == 1
    return err


def test_the_chosen_are_right_and_the_rejected_wrong(place: Path) -> None:
    pairs = Pairs(place / "pairs.parquet", 1)
    assert pairs.size is not None
    assert pairs.size > 3
    read = pairs.fetch(range(pairs.size))
    assert read.rejected is not None
    asked = [NAMES.index(caption) for caption in read.captions]
    chosen, rejected = read_digits(read.latents), read_digits(read.rejected)
    assert chosen == asked
    assert all(one != other for one, other in zip(rejected, asked, strict=True))


def test_a_run_learns_from_them_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = small.log_of(place / "aligned")
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert sum(line["margin"] for line in log[-3:]) > 0
    first, last = log[0]["accuracy"], sum(line["accuracy"] for line in log[-3:]) / 3
    assert (first, last > 0.5) == (0.5, True)
    events = {event["event"] for event in small.lines(place / "aligned" / "events.jsonl")}
    assert {"origin", "watching", "finished"} <= events
    assert (place / "aligned" / "layers.jsonl").read_text()
    assert align(place, "aligned", "--steps", "14") == 0
    assert "resumed" in capsys.readouterr().err
    whole = place / "whole"
    assert align(place, "whole", "--steps", "14") == 0
    small.assert_same_run(place / "aligned", whole)
    assert main(["explain", str(whole), "--step", "13"]) == 0


def test_what_is_refused(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    run, out = str(place / "tiny"), str(tmp_path / "new.parquet")
    assert main(["pairs", run, "--out", str(place / "pairs.parquet")]) == 2
    assert "pairs.parquet: exists; choose another file" in error_line(capsys)
    assert main(["pairs", run, "--out", out, "--captions", "0"]) == 2
    assert "captions=0: must be at least 1" in error_line(capsys)
    assert main(["pairs", str(tmp_path), "--out", out]) == 2
    assert "only of shapes and digits the truth is known" in error_line(capsys)
    assert main(["pairs", "nothing", "--out", out]) == 2
    assert "no run at nothing" in error_line(capsys)
    assert main(["pairs", run, "--out", out, "--captions", "1", "--steps", "1"]) == 2
    assert "captions=1: of none was one picture better than the other" in error_line(capsys)
    assert not Path(out).exists()
    table = pyarrow.parquet.read_table(place / "pairs.parquet")
    strange = tmp_path / "strange.parquet"
    words = pyarrow.array(["seven", "sevn"] + ["one"] * (len(table) - 2))
    pyarrow.parquet.write_table(table.set_column(0, "caption", words), strange)
    assert align(place, "other", "--data.pairs", str(strange)) == 2
    assert f"data.pairs: row 1 of {strange}: prompt: unknown word 'sevn'" in error_line(capsys)
    assert not (place / "other" / "config.json").exists()


def test_a_lora_goes_on_from_where_it_was_and_is_refused_for_other_weights(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lora = ["--tune.what", "lora", "--steps", "1"]
    assert align(place, "lora", *lora) == 0
    adapter = str(tmp_path / "adapter")
    assert main(["convert", str(place / "lora"), adapter, "--to", "adapter"]) == 0
    capsys.readouterr()
    assert align(place, "again", *lora, "--adapter", adapter) == 0
    assert small.log_of(place / "again")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    capsys.readouterr()
    other = ["--from", str(place / "aligned"), "--adapter", adapter]
    assert align(place, "wrong", *lora, *other) == 2
    assert "was trained for weights with sha256" in error_line(capsys)
