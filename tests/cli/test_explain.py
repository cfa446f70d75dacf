from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvsplit.cli import main
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
