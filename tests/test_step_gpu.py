"""benchmarks/step_gpu.py: nothing is timed of kernels whose tests did not pass."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def step_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    return importlib.import_module("step_gpu")


def begun(step_gpu, monkeypatch, out, *arguments, failing=()):
    """The names of what is run, each named in `failing` with status 1, and the exit."""
    names = []

    def run(command, limit):
        script = "tests" if "pytest" in command else Path(command[1]).stem
        names.append(script)
        return int(script in failing)

    monkeypatch.setattr(step_gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["step_gpu.py", "--json", str(out), *arguments])
    try:
        step_gpu.main()
    except SystemExit as end:
        return names, end.code
    return names, 0


def test_all_are_run_where_the_tests_pass(step_gpu, monkeypatch, tmp_path):
    names, end = begun(step_gpu, monkeypatch, tmp_path / "said.json")
    scripts = [Path(work.command[0]).stem for work in step_gpu.WORK.values()]
    assert (names, end) == (["tests", *scripts], 0)


def test_where_they_fail_only_what_has_a_gate_is_run_and_the_status_says_so(
    step_gpu, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "said.json"
    names, end = begun(step_gpu, monkeypatch, out, failing=("tests",))
    assert names == ["tests", "ffn_products", "train_step", "fused_ops", "masked_attention"]
    assert end == "not as they should be: tests"  # with which Python's status is 1
    assert "recipe: not begun, for the kernels' tests did not pass" in capsys.readouterr().out
    assert json.loads(out.read_text())["tests"]["status"] == 1


def test_scripts_named_without_the_tests_are_run(step_gpu, monkeypatch, tmp_path):
    out, only = tmp_path / "said.json", ("--only", "recipe", "step_classes")
    names, end = begun(step_gpu, monkeypatch, out, *only, failing=("recipe",))
    assert names == ["step_classes", "recipe"]
    assert end == "not as they should be: recipe"


def test_what_is_said_to_have_a_gate_ends_where_it_fails(step_gpu):
    for work in step_gpu.WORK.values():
        source = (BENCHMARKS / work.command[0]).read_text(encoding="utf-8")
        assert not work.gated or "gate failed" in source
