"""docs/sampling.md: its figures are those of the results, what it links to exists."""

import importlib.util
import json
import re
import statistics
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


# Every candidate; those of eight pictures after a change; pictures and the gate after the last, and
# without it.
NOW, EIGHT, LAST, WITHOUT = (
    f"2026-11-29{name}" for name in ("_second", "_third", "T2124", "T2056")
)


def engine_now():
    """The report of today's engine, later stages in place of earlier ones."""
    reports = [result(f"engine_h200_{name}") for name in (NOW, EIGHT, LAST)]
    return {stage: found for report in reports for stage, found in report.items()}


def test_the_tables_are_those_of_the_results(monkeypatch):
    products = benchmark("engine_products", monkeypatch)
    assert products.table(result(f"engine_products_h200_{NOW}")["rows"]) in PAGE
    pictures = benchmark("engine", monkeypatch)
    found = result("engine_h200_2026-11-24_first") | engine_now()
    assert pictures.table(found) in PAGE
    memory = [f"{found[f'pictures_{n}']['memory_gb']:.1f} GB" for n in (1, 8)]
    assert f"{memory[0]} for one picture, {memory[1]} for eight" in PAGE
    trace = benchmark("engine_trace", monkeypatch)
    clock = result("engine_trace_h200_2026-11-29")
    assert trace.table(clock["pictures_8"]["rows"]) in PAGE


def test_what_is_quoted_of_the_engine_is_in_the_results():
    page = " ".join(PAGE.split())
    found, starts = engine_now(), result("engine_h200_2026-11-29_starts")
    gate = found["gate"]
    alone, together = gate["1_at_a_time"], gate["8_at_a_time"]
    assert (
        f"{alone['engine']:.6f} drawn one by one, {together['engine']:.6f} drawn together" in page
    )
    assert f"bf16 ops with a library's attention {alone['plain_bf16']:.6f}" in page
    for each in (alone, together):
        assert each["passes"]
        assert abs(each["difference"]) < each["difference_stderr"]
    errors = [f"{1e6 * each['difference_stderr']:.0f}·10⁻⁶" for each in (alone, together)]
    assert f"within their standard errors ({', '.join(errors)})" in page
    assert together["plain_bf16"] == alone["plain_bf16"]
    before = result(f"engine_h200_{WITHOUT}")
    failed = before["gate"]["8_at_a_time"]
    assert not failed["passes"]
    assert f"in CUDA C++, off by {failed['plain_bf16']:.6f}; the engine, at the same" in page
    assert f"{together['engine']:.6f}, was further off" in page
    off = failed["difference"], failed["difference"] / failed["difference_stderr"]
    assert f"further off by {1e6 * off[0]:.0f}·10⁻⁶, {off[1]:.1f} standard errors" in page
    seconds = [before[f"pictures_{n}"]["seconds"] for n in (1, 8)]
    assert "another card took {:.2f} and {:.2f} s".format(*seconds) in page
    deep = starts["deep_gate"]["1_at_a_time"]
    assert f"1000 layers, one noise: {deep['engine']:.5f} ({deep['plain_bf16']:.5f})" in page
    assert deep["passes"]
    cold, warm = (starts[f"{name}_first_step_seconds"] for name in ("cold", "warm"))
    assert f"{cold:.0f} s without any cache" in page
    assert f"{warm:.1f} s in a new process" in page
    one, eight = (
        [found[name][key] for key in ("block_us", "ordinary_block_us")]
        for name in ("parts", "parts8")
    )
    assert f"one picture {one[0]:.1f} µs instead of the ordinary ops' {one[1]:.1f}" in page
    assert f"eight {eight[0]:.0f} µs instead of {eight[1]:.0f}" in page
    for name in ("parts", "parts8"):
        assert found[name]["plan"]["attention"]["pdl"]
    assert found["parts"]["plan"]["ahead"]
    then, now = (
        report["pictures_8"]["seconds"] / 35e3 * 1e6
        for report in (result(f"engine_h200_{EIGHT}"), found)
    )
    assert f"a block takes {then:.0f} µs then" in page
    assert f"A block and step of eight takes {now:.0f} µs" in page
    _, of_eight = "\n".join(found["log"]).split("[16, 288", 1)
    blocks = [
        re.findall(r"a block in (\d{3}\.\d) µs", "\n".join(report["log"]))
        for report in (found, before)
    ]
    now, then = (min(times) for times in blocks)
    assert f"{now} µs by the tuner's graph where it took {then} half an hour before" in page
    assert "attention by Heads(groups=3" in of_eight
    drawing = found["drawing"] | result("engine_trace_h200_2026-11-29")["drawing"]
    for name, words in (
        ("pictures_8", "takes {:.0f} W of its 700 and runs at {:.0f} MHz instead of 1980"),
        ("pictures_1", "takes {:.0f} W, at {:.0f} MHz"),
    ):
        row = drawing[name]
        assert (
            words.format(statistics.median(row["power_w"]), statistics.median(row["clock_mhz"]))
            in page
        )


def test_what_was_mended_is_in_the_results():
    page = " ".join(PAGE.split())
    reports = [result(f"engine_h200_{name}") for name in (NOW, EIGHT)]
    for stage, words in (
        ("qkv", "µs: qkv {:.1f} and {:.1f}"), ("proj", "W_O {:.1f} and {:.1f}"),
        ("w2", "W_2 {:.1f} and {:.1f};"),
    ):  # fmt: skip
        times = []
        for report in reports:
            rows = report["parts8"]["table"][stage]
            cut = "Cut(tokens=288, parts=2, groups=2, stages=4, split=1, held=False"
            times.append(
                next(
                    us for name, us, _ in rows if name.startswith(cut) and "apart=True" not in name
                )
            )
        assert words.format(*times) in page
    seconds = [report["pictures_8"]["seconds"] for report in reports]
    assert "eight pictures {:.2f} and {:.2f} s".format(*seconds) in page


def test_what_did_not_help_is_in_the_results():
    page = " ".join(PAGE.split())
    found = engine_now()
    for stage, words in (("parts", "{:.1f} → {:.1f} µs a block"), ("parts8", "{:.0f} → {:.0f}")):
        blocks = {row[0]: row[1] for row in found[stage]["table"]["block"]}
        later, early = (blocks[f"pdl={pdl} ahead=False"] for pdl in (False, True))
        assert words.format(later, early) in page
    w13 = found["parts8"]["table"]["w13"]
    apart, best = (
        min(us for name, us, _ in w13 if f"apart={apart}" in name) for apart in (True, False)
    )
    assert f"{apart:.0f} µs instead of {best:.1f}" in page
    rows = result(f"engine_products_h200_{NOW}")["rows"]
    held = {
        (r["kind"], r["depth"], r["cut"][5:] == [1, True] or r["cut"][5:] == [True]): r["us_early"]
        for r in rows
        if r["rows"] == 4608 and r["cut"][:4] == [288, 2, 2, 4]
    }
    for kind, depth, words in (
        ("swiglu", 1024, "w13 {:.1f} instead of {:.1f} µs"),
        ("write", 3072, "W_2 {:.1f} instead of {:.1f}"),
        ("write", 1024, "W_O {:.1f} instead of {:.1f}"),
    ):
        assert words.format(held[kind, depth, True], held[kind, depth, False]) in page
    proj = found["parts"]["table"]["proj"]
    cut, tile = (
        min(us for name, us, _ in proj if kind in name) for kind in ("tile=Cut", "tile=Tile")
    )
    assert f"{cut:.1f} µs with its merge, {tile:.1f} by Triton" in page
    pairs = {
        (r["kind"], r["depth"], r["cut"][3]): r["us_early"]
        for r in result("engine_products_h200_2026-11-29")["rows"]
        if r["rows"] == 4608 and r["cut"][:3] == [288, 2, 2]
    }
    qkv, w2 = (
        [pairs[kind, depth, n] for n in (2, 1)] for kind, depth in (("qkv", 1024), ("write", 3072))
    )
    assert (
        "{:.1f} and {:.1f} µs for qkv, ".format(*qkv) + "{:.1f} and {:.1f} for W_2".format(*w2)
        in page
    )
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
