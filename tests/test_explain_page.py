"""The example of docs/explain.md is what its commands gave, in the words of today."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from mvsplit.cli import explain as command

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def writer():
    path = ROOT / "benchmarks" / "explain_page.py"
    spec = importlib.util.spec_from_file_location("explain_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown() -> str:
    return TEXT.partition("<!-- example -->\n```\n")[2].partition("```\n<!-- end -->")[0]


def test_the_example_is_what_the_code_says_of_its_numbers_today(writer, tmp_path, monkeypatch):
    assert writer.page() == TEXT, "python benchmarks/explain_page.py writes it"
    changed = tmp_path / "explain.md"
    changed.write_text(TEXT.replace("So it does with", "So does"), encoding="utf-8")
    monkeypatch.setattr(writer, "PAGE", changed)
    monkeypatch.setattr(sys, "argv", ["explain_page.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: python benchmarks/explain_page\.py"):
        writer.main()
    monkeypatch.setattr(sys, "argv", ["explain_page.py"])
    writer.main()
    assert changed.read_text(encoding="utf-8") == TEXT


def test_other_words_of_the_code_are_another_page(writer, monkeypatch):
    monkeypatch.setattr(command, "_reproduction", lambda found: "run once more")
    assert writer.page() != TEXT


def test_the_commands_are_those_that_were_given(writer):
    listed = re.findall(r"^    (mvsplit .*)$", TEXT.partition("<!-- example -->")[0], re.MULTILINE)
    assert tuple(listed) == writer.COMMANDS


def test_what_is_said_below_of_the_example_is_in_it():
    below = TEXT.partition("How to read it")[2].partition("\n## ")[0]
    layer, times, alike = re.search(
        r"W_O of layer (\d+) the mean-coherent part\s+is (\d+) times .* alike to (\d\.\d+)", below
    ).groups()
    row = next(line for line in shown().splitlines() if re.search(rf"W_O │ +{layer} │", line))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[4] == times
    assert f"{float(cells[5]):.2f}" == alike
    assert "before step 20" in below
    assert shown().startswith("step 20 of ")


def test_the_numbers_kept_are_those_of_a_step_that_came_back_to_the_bit(writer):
    found = json.loads(writer.RESULT.read_text(encoding="utf-8"))
    assert found["reproduction"]["exact"] is True
    assert found["step"] == 20
