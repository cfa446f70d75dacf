"""docs/performance.md is what the results give, and says what was not run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def writer():
    sys.path.insert(0, str(FOLDER))
    try:
        path = FOLDER / "performance_page.py"
        spec = importlib.util.spec_from_file_location("performance_page", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def result(name: str) -> dict:
    return json.loads((FOLDER / "results" / name).read_text(encoding="utf-8"))


def test_the_page_is_what_the_command_writes(writer):
    assert writer.page() == TEXT, "mvsplit bench page writes it"


def test_check_fails_on_a_page_that_was_changed(writer, tmp_path, monkeypatch):
    changed = tmp_path / "performance.md"
    changed.write_text(re.sub(r"\d\d\.\d%", "99.9%", TEXT, count=1), encoding="utf-8")
    monkeypatch.setattr(writer, "PAGE", changed)
    monkeypatch.setattr(sys, "argv", ["performance_page.py", "--check"])
    with pytest.raises(SystemExit, match="mvsplit bench page"):
        writer.main()
    monkeypatch.setattr(sys, "argv", ["performance_page.py"])
    writer.main()
    assert changed.read_text(encoding="utf-8") == TEXT


def test_later_results_replace_earlier_ones_but_not_by_what_was_not_run(writer):
    first = {"gate": {"passed": True}, "curves": {"passed": True}}
    later = {"gate": {"passed": False}, "curves": "not run: beyond the budget"}
    assert writer.merged([first, later]) == {"gate": {"passed": False}, "curves": {"passed": True}}


def test_a_stage_says_of_which_run_it_is(writer):
    first = {"date": "2026-01-02", "step bf16": {"seconds": 2.0}, "gaps": {"bf16, seed 0": 0.1}}
    later = {"date": "2026-01-03T10:00", "step fp32": {"seconds": 3.0}}
    found = writer.merged([first, later])
    runs = [found[f"step {name}"]["run"] for name in ("bf16", "fp32")]
    assert runs == ["2026-01-02", "2026-01-03T10:00"]
    assert found["gaps"] == {"bf16, seed 0": 0.1}


def test_a_change_is_measured_against_the_block_of_its_own_run(writer):
    def run(date: str, base: float, *ways: float) -> dict:
        rows = {BLOCK: {"us": base}} | {f"{BLOCK}, way {n}": {"us": w} for n, w in enumerate(ways)}
        return {"date": date, "rows": rows}

    found = writer.together([run("2026-01-02", 100.0, 110.0, 120.0), run("2026-01-03", 50.0, 60.0)])
    from performance_load import _changes

    said = _changes(found)
    assert "| 2026-01-03 | way 0 | 50 | 60 | +20.0% |" in said
    assert "| 2026-01-02 | way 1 | 100 | 120 | +20.0% |" in said
    assert said.count("way") == 2
    cudnn = {"us": 51.0, "attention_backend": ["cudnn"]}
    rows = {BLOCK: cudnn, f"{BLOCK}, attention by libraries": cudnn | {"us": 52.0}}
    repeat = writer.together([{"date": "2026-01-04", "rows": rows}, run("2026-01-05", 50.0)])
    assert "(as it is anyway: a repeat) | 51 | 52 |" in _changes(repeat)


BLOCK = "26 × (256+64), nothing"


def test_the_ratio_to_the_rival_is_that_of_all_runs():
    """Counted from the files, runs with writers of zeros left out."""
    ratios = []
    for path in (FOLDER / "results").glob("train_step*_h200_*.json"):
        ours, rival = (result(path.name).get(stage) for stage in ("step bf16", "compiled"))
        if all(isinstance(each, dict) and "load" in each for each in (ours, rival)):
            ratios.append(ours["tokens_per_second"] / rival["tokens_per_second"])
    assert len(ratios) >= 3
    assert f"| {min(ratios):.2f}–{max(ratios):.2f}× |" in TEXT
    for ratio in ratios:
        assert f": {ratio:.2f}× (" in TEXT


def test_1000_layers_are_those_of_the_later_of_two_runs_as_long(writer):
    def run(date: str, steps: int) -> dict:
        return {"date": date, "thousand": {"steps": steps}}

    days = [run("2026-01-01T09:00", 40), run("2026-01-02T09:00", 30), run("2026-01-02T10:00", 30)]
    assert writer.learning([*days, run("2026-01-02T11:00", 7)])["date"] == "2026-01-02T10:00"


def test_what_another_kernel_does_is_no_limit_of_none(writer):
    """Neither zero µs in a table, nor a negative distance."""
    sections = TEXT.partition("## What the card's power allows")[2].partition("## Sampling")[0]
    assert "| SwiGLU | 112 | – | – | – |" in sections
    assert not re.search(r"\| 0 \||\| -\d+ \|", sections)


def test_what_is_said_of_the_warm_up_is_in_the_script(writer):
    from performance_step import WARMUP

    assert f"warmup={WARMUP}," in (FOLDER / "thousand_layers.py").read_text(encoding="utf-8")


def test_groups_of_the_profile_hold_all_of_its_time(writer):
    from performance_parts import grouped

    profile = result("train_step_eager_h200_2026-11-24.json")["profile"]
    groups = grouped(profile)
    assert sum(groups.values()) == pytest.approx(profile["kernels_us"])
    by_hand = [us for name, us in profile["by_kernel_us"].items() if "nvjet" in name]
    assert groups["matrix products"] == pytest.approx(sum(by_hand))


def test_causes_add_up_to_the_measured_step():
    (table,) = re.findall(r"model FLOPs at the peak.*?\| measured \| ([\d.]+) \|", TEXT, re.DOTALL)
    rows = re.findall(r"^\| [a-zA-Z][^|]* \| ([+-]?\d+\.\d\d) \|$", TEXT, re.MULTILINE)
    *causes, total = map(float, rows)
    assert total == float(table)
    assert sum(causes) == pytest.approx(total, abs=0.005 * len(causes) + 0.005)


def test_what_is_foretold_of_eight_gpus_is_what_the_plan_says(writer):
    """Until it has been run: from then on it stays what was said before."""
    import eight_gpus

    if list((FOLDER / "results").glob("eight_gpus_h200x*.json")):
        pytest.skip("it was run")
    rows = result("eight_gpus_predicted.json")["rows"]
    for found, said in zip(eight_gpus.predict()["rows"], rows, strict=True):
        assert found["seconds"] == pytest.approx(said["seconds"], rel=1e-6)
        assert found["gib"] == pytest.approx(said["gib"], rel=1e-6)


def test_a_merge_of_another_form_than_serves_says_so(writer):
    from performance_parts import CLUSTERS_FROM

    pytest.importorskip("triton")
    from mvsplit.kernels.hopper.merge_choice import FEWEST_TOKENS

    assert CLUSTERS_FROM == FEWEST_TOKENS
    (row,) = re.findall(r"^\| (merge with means.*?) \| 16, 256\+32 \|", TEXT, re.MULTILINE)
    assert row == "merge with means, in clusters"
    assert "| merge with means | 26, 256+64 |" in TEXT


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("fused_ops_merge_h200_2026-11-22.json", "merge with means"),
        ("train_step_h200_2026-11-24.json", "| 14,488 | 50.2% | 125.9 | 2.33× |"),
        ("engine_h200_2026-11-24.json", "| the engine | 2.09 | 10.07 |"),
        ("masked_attention_h200_2026-11-28.json", "| 164 | – | 178 (+8%) |"),
        ("thousand_layers_h200_2026-11-28.json", "| MFU | 36.7%;"),
        ("thousand_layers_h200_2026-11-29_late.json", "2.177 → 1.720, first and last of 7 steps"),
        ("step_classes_h200_2026-11-29.json", "a block took 12% longer"),
        (
            "step_classes_h200_2026-11-29_late.json",
            "| merge without clusters | 1507 | 1546 | +2.6% |",
        ),
        ("recipe_h200_2026-11-28.json", "bf16, seed 0 +0.13%"),
        ("ffn_products_h200_2026-11-30T0937.json", "| w13, SwiGLU | 4,608 | 122 | 97 | 108 |"),
        (
            "ffn_products_h200_2026-11-30T1341.json",
            "| W_QKV, rotation and QK-norm | 8,320 | 105 | 84 | 92 |",
        ),
    ],
)
def test_a_result_alone_as_a_table(writer, file, words):
    assert words in writer.table([FOLDER / "results" / file])


def test_a_recipe_that_was_stopped_stands_beside_the_whole_one_as_a_part(writer):
    first, whole, part = (
        result(f"recipe_h200_{date}.json")
        for date in ("2026-11-28", "2026-11-30T0855", "2026-11-30T1425")
    )
    assert (whole["passed"], part["passed"], part["steps"]) == (True, False, 800)
    found = writer.recipes([first, whole, part])
    assert found == whole | {"parts": [part]}
    words = " ".join(writer.low_precision(found, {}).split())
    assert "1,000 of 1,000 steps of 32 samples" in words
    assert "bf16, seed 0 +0.31% (1 seed, no spread). At most 2 % was allowed." in words
    again = "Run again in part, stopped by its time at 800 of 1,000 steps: bf16, seed 1 +0.21%"
    assert again in words
    assert again in " ".join(TEXT.split())
    last = part["losses"]
    means = [sum(last[f"{name}, seed 1"][700:800]) / 100 for name in ("bf16", "fp32")]
    assert means[0] / means[1] - 1 == pytest.approx(part["gaps"]["bf16, seed 1"], abs=1e-5)
    assert writer.recipes([first]) == first | {"parts": []}


def test_what_was_run_with_products_is_not_said_to_be_missing(writer):
    """Each line goes by a result of its own, of the forms that serve."""
    from performance_not_run import UNMEASURED, not_run
    from performance_products import since

    def block(*kernels: str, kind: str = "products with what follows") -> dict:
        return {"by_kind_us": {kind: 1.0}, "by_kernel_us": dict.fromkeys(kernels, 1.0)}

    before = result("ffn_products_h200_2026-11-30T0937.json")
    apart, turned = block("qk_norm_rope_bwd_kernel"), block("attention_backward")
    deep = {"thousand": {"date": "2026-11-30T08:41", "steps": 30, "cold_start_seconds": 49.0}}
    own = {"rows": {"16 masked": block(kind="SwiGLU")}}
    lines = {key: UNMEASURED[key] for key in since({}, {}, {})}
    assert all(line in not_run(since(own, before, deep)) for line in lines.values())

    later = {"thousand": deep["thousand"] | {"date": "2026-12-01T10:00"}}
    for found, gone in (
        (since(own, before | {"date": "2026-12-01T09:00"}, deep), {"products"}),
        (
            since({"rows": {"16 masked": apart, "26": turned}}, before, deep),
            {"products in a block"},
        ),
        (
            since({"rows": {"16 masked": turned}}, before, deep),
            {"products in a block", "turned and masked"},
        ),
        (
            since(own, before, later),
            {"products at 1000 layers", "cold start with products"},
        ),
    ):
        said = not_run(found)
        assert {key for key, line in lines.items() if f"- {line}\n" not in f"{said}\n"} == gone


def test_products_below_the_peak_are_counted_from_their_flops():
    """With their FLOPs at the peak they take what products take under load, alone or in a block."""
    from mvsplit.training.gpus import GPUS

    (ideal,) = re.findall(r"model FLOPs at the peak \| ([\d.]+)", TEXT)
    (below,) = re.findall(r"products below the peak \| \+([\d.]+)", TEXT)
    flops = 6 * 1024 * (4 * 1024 + 3 * 3072) * 260 * 320 * 400
    assert flops / 989e12 < float(ideal)
    reached = flops / (flops / 989e12 + float(below))
    assert GPUS["h200"].alone < reached < GPUS["h200"].under_load


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", TEXT)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
