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
    assert products.table(result("engine_products_h200_2026-11-29")["rows"]) in PAGE
    pictures = benchmark("engine", monkeypatch)
    names = ("2026-11-24_first", "2026-11-24", "2026-11-29")
    found = {}
    for name in names:
        found |= result(f"engine_h200_{name}")
    assert pictures.table(found) in PAGE
    before = result("engine_h200_2026-11-24")["pictures_8"]["seconds"]
    assert f"from {before:.2f} s to {found['pictures_8']['seconds']:.2f}" in PAGE
    assert f"{found['pictures_8']['memory_gb']:.1f} GB for eight" in PAGE


def test_what_is_quoted_is_in_the_results():
    block = result("engine_h200_2026-11-29")
    assert f"**{block['parts8']['block_us']:.0f} µs**" in PAGE
    assert f"the ordinary ops' {block['parts8']['ordinary_block_us']:.0f}" in PAGE
    gate = block["gate"]
    alone, together = gate["1_at_a_time"], gate["8_at_a_time"]
    assert f"{alone['engine']:.6f} drawn one by one" in PAGE
    assert f"{together['engine']:.6f} drawn together" in PAGE
    assert f"bf16 ops {alone['plain_bf16']:.6f}" in PAGE
    for found in (alone, together):
        assert found["passes"]
        assert abs(found["difference"]) < found["difference_stderr"]
    evaluations = 35 * 1000
    left = " ".join(PAGE.partition("### What is left")[2].split())
    for name, wanted, words in (
        ("pictures_1", 2.0, "{:.1f} µs a block and step where {:.1f} are needed"),
        ("pictures_8", 8.4, "and {:.0f} where {:.0f} are"),
    ):
        took = block[name]["seconds"]
        assert words.format(took / evaluations * 1e6, wanted / evaluations * 1e6) in left
    blocks = re.findall(r"a block in ([\d.]+) µs by pdl=", "\n".join(block["log"]))
    assert f"the same blocks took {blocks[0]} and {blocks[1]} µs in graphs of 16" in left
    ours = result("engine_attention_h200_2026-11-29")["rows"]
    for rows, words in (
        (4608, "takes {:.1f} µs at eight pictures where cuDNN's takes {:.1f}"),
        (576, "and {:.1f} where the ordinary ops take {:.1f} at one"),
    ):
        best = min((r for r in ours if r["rows"] == rows), key=lambda r: r["us_early"])
        assert words.format(best["us_early"], best["cublas_us"]) in left
    block = result("engine_h200_2026-11-28")
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
