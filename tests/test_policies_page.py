"""docs/policies.md: its tables and the figures of its sentences are those of the results."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("policies_*.json"))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("policies", ROOT / "benchmarks" / "policies.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "policies", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_the_tables_are_those_of_the_results(path: Path, bench) -> None:
    assert path.name in PAGE
    assert bench.table(json.loads(path.read_text(encoding="utf-8"))["rows"]) in PAGE


def test_the_sentences_on_400_layers_are_those_of_the_result() -> None:
    (path,) = (p for p in RESULTS if "h200" in p.name)
    rows = {r["trial"]: r for r in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    text = " ".join(re.split("\n### ", PAGE.partition("### 400 layers in bf16")[2])[0].split())
    plain = rows["plain, record"]
    alarms = [e for e in plain["events"] if e[0] == "alarm"]
    assert f"dies at step {alarms[1][1]}" in text
    assert f"first alarm came at step {alarms[0][1]}" in text
    similarity, ratio = re.search(r"similarity ([\d.]+)\).* ([\d.]+) times", alarms[0][2]).groups()
    assert f"cosine similarity of {similarity} and" in text
    assert f"part is {float(ratio):.0f} times the rest" in text
    before, end = plain["losses"][alarms[0][1] - 1], plain["losses"][99]
    assert f"from {before:.2f} to {end:.2f} at step 100" in text
    assert f"ends {rows['rollback']['ratio'] - 1:.0%} above" in text.replace(" %", "%")
    took = sum(r["seconds"] for r in rows.values()) / 2
    assert f"{10 * round(took / 10)} s of one H200" in text
