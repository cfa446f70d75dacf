from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from mvsplit.cli import main
from mvsplit.diagnostics import Monitor
from tests.training import flights


@pytest.fixture
def flight(tmp_path: Path) -> Path:
    experiment = flights.plain()
    return flights.fly(tmp_path, experiment, lambda state: flights.align_tokens(state, "ffn"))


@pytest.mark.parametrize("command", [["explain"], ["monitor", "explain"]])
def test_it_says_what_removes_the_spike(
    flight: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(flight)]) == 0
    found = json.loads((flight / "explain.json").read_text())
    assert found["conclusion"]["verdict"] == "mean-mode"
    assert found["conclusion"]["removed_by"] == ["centered-ffn", "centered-both"]
    assert found["reproduction"]["exact"] is True
    said = capsys.readouterr().out
    for sentence in found["conclusion"]["sentences"]:
        assert sentence in said
    as_it_was, ffn = (
        next(t for t in found["trials"] if t["name"] == name)
        for name in ("as-it-was", "centered-ffn")
    )
    for trial in (as_it_was, ffn):
        assert f"{trial['grad_norm']:.3g}" in said
    for family in ("Embed", "Attn_WO", "FFN_W13", "FFN_W2", "Final"):
        assert family in said
    assert "come back to the bit" in said


def test_numbers_go_where_they_are_asked_for(flight: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    assert main(["explain", str(flight), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["step"] == 5
    assert not (flight / "explain.json").exists()


def test_numbers_that_cannot_be_written_are_shown_all_the_same(
    flight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = flight / "flight.json" / "numbers.json"
    assert main(["explain", str(flight), "--json", str(taken)]) == 2
    out, err = capsys.readouterr()
    assert "what makes the spike vanish" in out
    assert f"json: cannot write {taken}: Not a directory; give --json FILE" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run at nowhere"),
        (["FLIGHT", "--step", "9"], "reaches 1, 2, 3, 4, 5; name the run"),
    ],
)
def test_what_cannot_be_explained(
    flight: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(flight) if a == "FLIGHT" else a for a in arguments]
    assert main(["explain", *given]) == 2
    assert message in capsys.readouterr().err


def test_where_there_is_no_run_those_that_are_there_are_named(
    flight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second", "a model of others"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
        if " " not in name:
            (tmp_path / "runs" / name / "metrics.jsonl").touch()
    for command in ("explain", "report"):
        assert main([command, "nowhere"]) == 2
        assert "choose one of: runs/first, runs/second\n" in capsys.readouterr().err
        assert main([command, "runs/secnd"]) == 2
        assert "did you mean runs/second or" in capsys.readouterr().err


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """The run_dir of a monitor whose 30th step was lost."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4)
    monitor = Monitor(model, run_dir=tmp_path / "mine", policy="skip")
    for step in range(1, 33):
        with monitor.look():
            loss = model(torch.randn(2, 5, 16)).square().mean()
            loss = loss * torch.nan if step == 30 else loss
            loss.backward()
        monitor.step(loss, lr=1e-3)
        model.zero_grad()
    return tmp_path / "mine"


@pytest.mark.parametrize("command", [["explain"], ["monitor", "explain"]])
def test_of_a_training_of_ones_own_it_says_what_was_seen_and_what_is_not_there(
    watched: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (watched / "config.json").write_text('{"architectures": ["Mine"]}')  # some program's own
    assert main([*command, str(watched)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "its first alarm; 32 steps from 1 to 32" in said
    assert "watching 4 layers of TransformerEncoder" in said
    assert "30 alarm non-finite" in said
    assert "The update of step 30 is left out, because of non-finite." in said
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").open()]
    usual = statistics.median(line["grad_norm"] for line in lines[:29])
    assert f"grad_norm │ nan │ {usual:.3g} │ nan │ {lines[-1]['grad_norm']:.3g}" in said
    look = min(
        (json.loads(line) for line in (watched / "layers.jsonl").open()),
        key=lambda line: abs(line["step"] - 30),
    )
    assert f"the look at step {look['step']}" in said
    assert "W_2" in said
    assert "Not in this folder: the batch, its noise and the weights before the step." in said
    assert "the step cannot be run again" in said
    assert json.loads((watched / "explain_00000030.json").read_text())["step"] == 30


def test_of_two_trainings_in_a_folder_it_says_that_it_shows_the_last(
    watched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4
    )
    monitor = Monitor(model, run_dir=watched)
    for _ in range(2):
        with monitor.look():
            loss = model(torch.randn(2, 5, 16)).square().mean()
            loss.backward()
        monitor.step(loss)
        model.zero_grad()
    assert main(["explain", str(watched)]) == 0
    said = capsys.readouterr().out
    assert "2 runs in this folder; showing the last (steps 1 to 2);" in said
    assert f"mvsplit monitor replay {watched} gives the verdicts on all" in said
    assert main(["monitor", "replay", str(watched), "--json"]) == 0
    events = json.loads(capsys.readouterr().out)["events"]
    assert [event["step"] for event in events if event["level"] == "alarm"] == [30]


def test_another_step_of_it_and_what_cannot_be_asked(
    watched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(watched), "--step", "7"]) == 0
    assert "step 7 of" in capsys.readouterr().out
    for arguments, message in (
        (["--step", "99"], "has the steps 1 to 32"),
        (["--device", "cpu"], "nothing is run; leave --device out"),
    ):
        assert main(["explain", str(watched), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_brackets_of_names_are_shown_as_they_are(
    watched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = watched.rename(watched.parent / "mine[red]")
    log = folder / "events.jsonl"
    text = log.read_text().replace("watching 4 layers", "watching [/q] 4 layers")
    log.write_text(text.replace('"message": "', '"message": "[bold]'))
    assert main(["explain", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "mine[red], its first alarm" in said
    assert "[bold]watching [/q] 4 layers" in said
    (row,) = [line for line in said.splitlines() if line.startswith("30 ")]
    assert "[bold]" in row
