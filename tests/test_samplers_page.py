"""docs/samplers.md and docs/app.md: the figures are those of the results, what is named exists."""

import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mvsplit.cli import COMMANDS
from mvsplit.cli.app import Arguments as AppArguments
from mvsplit.cli.sample import Arguments
from mvsplit.presets import PRESETS
from mvsplit.sampling import SAMPLERS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
APP = (ROOT / "docs" / "app.md").read_text(encoding="utf-8")


def result(name: str) -> dict:
    (path,) = re.findall(rf"\((\.\./benchmarks/results/{name}_(?:h200_)?\d[\w.-]+\.json)\)", PAGE)
    return json.loads((ROOT / "docs" / path).read_text(encoding="utf-8"))


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_pictures_is_that_of_the_results():
    module, found = benchmark("samplers_quality"), result("samplers_quality")
    assert module.table(found) in PAGE
    at = {(r["sampler"], r["budget"]): r["scores"] for r in found["rows"]}
    distance = {key: scores["shapes_frechet"] for key, scores in at.items()}
    end = distance["ab2", 35]
    first = {
        name: min(
            (b for b in module.complete(found) if distance[name, b] < 1.1 * end), default=None
        )
        for name in SAMPLERS
    }
    assert first == {"euler": None, "heun": 25, "ab2": 9, "dpmpp-2m": 17}
    again = {
        (r["sampler"], r["seed"]): r["shapes_frechet"]
        for r in found["on_a_cpu"]["rows"]
        if r["budget"] == 5
    }
    for name in ("ab2", "euler"):
        assert again[name, 0] == pytest.approx(distance[name, 5], rel=0.01)
        assert f"{again[name, 1]:.3f}" in PAGE
    assert not module.draws_right(found)  # and so the page does not show the shares
    assert found["gate"]["other_captions"] == pytest.approx(0.06, abs=0.005)
    assert max(s["geneval_mean"] for (_, b), s in at.items() if b >= 9) < 0.04


def test_the_table_is_that_of_the_results():
    module = benchmark("samplers")
    rows = result("samplers")["rows"]
    assert module.table(rows) in PAGE
    for shift in module.SHIFTS:
        for budget in module.BUDGETS:
            assert module.winners(rows, shift, budget) == ["ab2"]
    by = {(r["shift"], r["sampler"], r["evaluations"]): r["distance"] for r in rows}
    assert by[2.0, "ab2", 9] == pytest.approx(by[2.0, "euler", 19], rel=0.05)


def test_depth_on_demand_quotes_its_results():
    found = result("depth_on_demand")
    full, *rows = found["rows"]
    table = ["| left out | time | distance | digits recognised |", "|---|---|---|---|"]
    for r in rows:
        what = f"{12 - r['steps']} of 12 steps" if r["way"] == "fewer steps" else None
        how = "at random" if r["way"] == "random" else f"by {r['way']}"
        what = what or f"{r['blocks_left_out']} blocks, {how}"
        time = f"{100 * r['cpu_seconds'] / full['cpu_seconds']:.0f} %"
        table.append(
            f"| {what} | {time} | {r['distance']:.3f} | {100 * r['digit_accuracy']:.0f} % |"
        )
    shown = re.findall(r"^\| (?:left out|\d+ (?:of 12|blocks)).*\|$", PAGE, re.MULTILINE)
    assert set(shown) <= set(table)
    assert len(shown) >= 8
    assert f"{100 * full['digit_accuracy']:.0f} % of the full network" in PAGE


def test_all_samplers_presets_and_options_are_there():
    assert re.findall(r"^\| `(\w\S+)` \| \D", PAGE, re.MULTILINE) == list(SAMPLERS)
    for page, arguments in ((PAGE, Arguments), (APP, AppArguments)):
        known = {field.name.replace("_", "-") for field in fields(arguments)} | {"run"}
        assert set(re.findall(r"--([a-z][a-z-]+)", page)) <= known
        for command in re.findall(r"^    mvsplit (\w+)", page, re.MULTILINE):
            assert command in COMMANDS
    for name, shift in (("mvsplit-400l", 4), ("mvsplit-1000l", 4), ("shapes-12l", 2)):
        assert PRESETS[name].train.sample_shift == shift
        assert f"`{name}`" in PAGE


@pytest.mark.parametrize("page", [PAGE, APP])
def test_every_file_they_link_to_exists(page):
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", page)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
