"""docs/alignment.md: every command runs as written, the tables are those of the results."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from mvsplit.cli import main

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("dpo_*.json"))


def page_script() -> ModuleType:
    file = ROOT / "benchmarks" / "dpo_page.py"
    spec = importlib.util.spec_from_file_location("dpo_page", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    mvsplit ([a-z]+ .*)$", PAGE, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "pairs", "train"]
    for command in commands:
        assert main(shlex.split(command)) == 0, command


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_results(path: Path) -> None:
    script, result = page_script(), json.loads(path.read_text(encoding="utf-8"))
    assert f"../benchmarks/results/{path.name}" in PAGE
    for part in (script.table, script.layer_table, script.pair_line, script.cost_line):
        assert part(result) in PAGE
    if "h200" in path.stem:
        assert script.gain_line(result, script.reported(result)) in PAGE


def test_what_the_page_links_to_is_there() -> None:
    assert RESULTS
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
