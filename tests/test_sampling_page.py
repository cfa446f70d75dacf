"""docs/sampling.md: its figures are those of the results, what it links to exists."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def benchmark(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results(monkeypatch):
    products = benchmark("engine_products", monkeypatch)
    assert products.table(result("engine_products_h200_2026-11-28")["rows"]) in PAGE
    pictures = benchmark("engine", monkeypatch)
    found = result("engine_h200_2026-11-24_first") | result("engine_h200_2026-11-24")
    assert pictures.table(found) in PAGE


def test_what_is_quoted_is_in_the_results():
    block = result("engine_h200_2026-11-28")
    assert f"**{block['parts8']['block_us']:.0f} µs**" in PAGE
    assert f"the ordinary ops' {block['parts8']['ordinary_block_us']:.0f}" in PAGE
    gate = block["gate"]
    assert f"{gate['engine']:.5f}, the model's own bf16 ops {gate['plain_bf16']:.5f}" in PAGE
    stages = {
        choice: micro for choice, micro, _ in block["parts8"]["table"]["w2"] if "Cut" in choice
    }
    three, four = (
        min(us for name, us in stages.items() if f"cluster=1, stages={n}" in name) for n in (3, 4)
    )
    assert f"{three:.1f} instead of {four:.1f} µs" in PAGE
    first = result("engine_products_h200_2026-11-28_first")["rows"]
    (eight,) = [
        r for r in first if r["kind"] == "write" and r["rows"] == 4608 and r["depth"] == 3072
    ]
    assert f"{eight['us_early']:.0f} µs (`engine_products_h200_2026-11-28_first.json`)" in PAGE
    assert eight["clusters_at_once"] == 15
    rows = [*first, *result("engine_products_h200_2026-11-28")["rows"]]
    assert all(r["error"] < 1.01 * r["rounding_alone"] for r in rows)


@pytest.mark.parametrize(
    ("differences", "passes"),
    [
        ([1e-5, -1e-5, 2e-5, -3e-5, 1e-5, 0, -1e-5, 2e-5], True),  # within the scatter
        ([-4e-5] * 8, True),  # better each time
        ([1e-5] * 8, False),  # worse each time, however little
        ([2e-4, 3e-4, -1e-4, 4e-4, 1e-4, 5e-4, 0, 3e-4], False),  # by more than one percent
    ],
)
def test_the_gates_rule_is_that_of_a_paired_comparison(monkeypatch, differences, passes):
    plain = [0.0118, 0.0121, 0.0117, 0.0119, 0.0120, 0.0118, 0.0116, 0.0122]
    ours = [base + d for base, d in zip(plain, differences, strict=True)]
    found = benchmark("engine", monkeypatch).verdict(ours, plain)
    assert found["passes"] == passes
    assert found["difference"] == pytest.approx(sum(differences) / 8)


def test_every_file_and_command_exists():
    for path in re.findall(r"(?<!/)\b(?:benchmarks|mvsplit)/[\w/.-]+", PAGE):
        assert (ROOT / path.rstrip(".")).exists(), path
