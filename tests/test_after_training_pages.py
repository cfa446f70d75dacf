"""The pages of what comes after training: every command runs as written, the tables are those of
the results."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mvsplit.cli import main

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for name, page in (("finetune", "fine-tuning"), ("growth", "growth"), ("surgery", "surgery"))
}


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_run_as_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    mvsplit ([a-z].*)$", PAGES[name], re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert main(shlex.split(command)) == 0, command


def test_what_is_forgotten_is_that_of_three_seeds() -> None:
    path = ROOT / "benchmarks" / "results" / "finetune_h200_2026-11-29.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    for words in (benchmark("finetune").forgotten, benchmark("finetune").drawn):
        assert words(result) in PAGES["finetune"]


@pytest.mark.parametrize("name", PAGES)
def test_the_table_is_that_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # they import one another
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", PAGES[name])
    known = (ROOT / "benchmarks" / "results").glob(f"{name}_*.json")
    paths = [path for path in known if "thousand" not in path.name]  # has a table of its own
    assert paths
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert benchmark(name).table(result) in PAGES[name]
        assert f"../benchmarks/results/{path.name}" in links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_the_surgery_at_400_layers_is_that_of_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss before the rate jumps, and that the surgery itself moved nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "results" / "surgery_h200_2026-11-29.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert benchmark("surgery").before_jump(result, "shapes-400-jump") in PAGES["surgery"]
    ((before, after),) = (row["gate"] for row in result["rows"] if "gate" in row)
    assert before == after
    assert next(row for row in result["rows"] if row["way"] == "no surgery")["alarms"]
    assert not next(row for row in result["rows"] if "gate" in row)["alarms"]


def test_growth_alone_and_beside_others_is_not_put_together() -> None:
    path = ROOT / "benchmarks" / "results" / "growth_gpu_h200_2026-11-29.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    together = benchmark("growth").together
    result["command"] = "one"
    assert len(together([result, result])["runs"]) == 2 * len(result["runs"])
    with pytest.raises(SystemExit, match="other users"):
        together([result, result | {"note": None}])


def test_what_the_pages_say_of_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parameters that learn, as the commands print them."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--steps", "1"]) == 0
    rows = re.findall(
        r"^\| `(--tune[^|]+)` \| [^|]+ \| ([\d,]+) \|$", PAGES["finetune"], re.MULTILINE
    )
    assert len(rows) == 3
    for number, (options, parameters) in enumerate(rows):
        run = ["train", "tiny", "--from", "runs/tiny", "--run-dir", str(number), "--steps", "1"]
        assert main([*run, *shlex.split(options)]) == 0
        assert f"{parameters} of " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["growth_thousand_cpu", "growth_gpu_h200_2026-11-29"])
def test_the_way_to_a_thousand_layers_is_that_of_its_result(name: str) -> None:
    """The losses at each depth and at equal compute; no growth moved the loss."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    run = next(run for run in result["runs"] if run["way"] == "grown")
    assert len(run["jumps"]) == 4
    assert max(run["jumps"]) < 2e-7
    assert benchmark("growth").table(result) in PAGES["growth"]
    assert benchmark("growth").stage_table(result) in PAGES["growth"]
