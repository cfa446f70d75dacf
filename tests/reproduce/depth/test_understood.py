"""Words whose figures are read from the rows."""

import json
import re
from pathlib import Path

import pytest
import torch

from mvsplit.reproduce.depth import understood as module
from mvsplit.reproduce.depth.conclusion import SERVED, TODAY, by_depth
from mvsplit.reproduce.depth.page import RESULTS
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES, SIZES
from mvsplit.reproduce.depth.table import cells
from mvsplit.reproduce.depth.understood import understood
from mvsplit.reproduce.depth.verdict import best, compare
from mvsplit.residuals import RuleConfig, build_rule

ROOT = Path(__file__).parents[3]
ALPHA = "MV-Split α=β=1/√L"
TEXT = """## One

- It reached [[gpu plain-2 loss .2f]] in one run
  and [[gpu plain-* loss .2f]] in all.

- Of another: [[gpu keel loss .2f]].

## Two

- Of another file: [[small plain loss .2f]].

## Three

No figure.
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = [{"run": f"plain-{n}", "loss": n / 4} for n in (1, 2, 3)]
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": [*rows, {"run": "plain-4"}]}))
    (tmp_path / "timing-gpu.json").write_text(json.dumps({"alone": {}}))
    monkeypatch.setattr(module, "UNDERSTOOD", TEXT)
    return tmp_path


def test_figures_are_those_of_the_rows_and_what_has_none_is_left_out(folder):
    found = "\n".join(understood(folder))
    assert found == (
        "## One\n\n- It reached 0.50 in one run and 0.25–0.75 in all.\n\n## Three\n\nNo figure.\n"
    )


def test_means_of_runs_are_compared(folder, monkeypatch):
    monkeypatch.setattr(module, "UNDERSTOOD", "By [[gpu plain-3\n  over plain-* loss .1%]].")
    assert understood(folder) == ["By 50.0%.", ""]
    monkeypatch.setattr(module, "UNDERSTOOD", "By [[gpu plain-3 over keel loss .1%]].")
    assert understood(folder) == []


def test_words_that_count_seeds_by_hand_hold_of_the_rows():
    """Sentences without figures of their own, which the next rows may make untrue."""
    rows = json.loads((ROOT / "docs/experiments" / RESULTS / "gpu.json").read_text("utf-8"))["rows"]

    def seeds(run: str) -> list[bool]:
        return [row["lives"] for row in rows if row["run"].startswith(f"{run}-seed")]

    for name in ("README.md", "CHANGELOG.md"):
        words = " ".join((ROOT / name).read_text("utf-8").split())
        assert "does not learn in any of three seeds" in words
        assert "α = β does in all of three" in words
    assert seeds("standard-1000x64-lr3.2e-03") == [False] * 3
    assert seeds("standard-1000x64-lr1.0e-03") == [False]
    for name in ("alpha", "alpha-standard"):
        assert seeds(f"{name}-1000x64-lr3.2e-03") == [True] * 3
        assert seeds(f"{name}-1000x64-lr1.0e-03") == [True]
    text = " ".join(module.UNDERSTOOD.split())
    assert "fixed before they ran" not in text  # nothing that is kept says so
    assert "ReZero and LayerScale γ = 1/√L have three seeds still" in text
    rivals = ("rezero", "layerscale-root", "layerscale-0.01")
    assert [len(seeds(f"{name}-400x64-lr3.2e-03")) for name in rivals] == [3, 3, 5]
    assert "added at 3.2e-3 alone, which moved its rate there" in text
    lives = [len(seeds(f"alpha-standard-400x64-lr{rate}")) for rate in ("3.2e-03", "1.0e-02")]
    assert lives == [5, 3]


def test_words_about_standings_hold_of_the_rows():
    """Against the best rival of each depth, in both sizes; what is ahead of all at 400."""
    found = []
    for name in ("small", "gpu"):
        path = ROOT / "docs/experiments" / RESULTS / f"{name}.json"
        rows = json.loads(path.read_text("utf-8"))["rows"]
        found.append((SIZES[name], cells(SIZES[name], [*ENTRIES, *CANDIDATES], rows)))
    depths = by_depth(found)
    text = " ".join(module.UNDERSTOOD.split())
    assert "at 4, 16 and 100 layers and ties with it at 64, 400 and 1000, which no other" in text

    def against(name: str) -> dict[int, str]:
        pairs = ((at.layers, at.all.get(name), at.rivals[best(at.rivals)]) for at in depths)
        return {layers: compare(mine, rival) for layers, mine, rival in pairs}

    ours = {entry.name: against(entry.name) for entry in [*ENTRIES, *CANDIDATES]}
    ties = dict.fromkeys((64, 400, 1000), "tie")
    assert ours["alpha-standard"] == dict.fromkeys((4, 16, 100), "ahead") | ties
    settings = {e.name for e in [*ENTRIES, *CANDIDATES] if e.kind in ("mvsplit", "candidate")}
    good = [n for n in settings if set(ours[n].values()) <= {"ahead", "tie"}]
    assert good == ["alpha-standard"]
    assert ours["alpha"][1000] == "behind"
    (deep,) = (at for at in depths if at.layers == 400)
    assert (deep.top, deep.level) == ("standard", [])
    assert all(len(at.all["alpha-standard"]) >= 3 for at in depths)

    def between(name: str, other: str) -> dict[int, str]:
        pairs = ((at.layers, at.all.get(name), at.all.get(other)) for at in depths)
        return {layers: compare(mine, theirs) for layers, mine, theirs in pairs}

    zeros = between("alpha-standard", "alpha")
    assert zeros == {4: "cannot tell", 16: "ahead", 64: "tie", 100: "cannot tell", 400: "tie",
                     1000: "cannot tell"}  # fmt: skip
    ahead = {
        (at.layers, name)
        for at in depths
        for name, losses in at.all.items()
        if compare(losses, at.all["alpha-standard"]) == "ahead"
    }
    assert ahead == {(400, "standard")}
    assert between("standard", "alpha-standard")[4] == "behind"
    assert between("standard", "alpha-standard")[16] == "behind"
    assert between("standard", "alpha")[400] == "ahead"


def test_the_default_of_the_pages_is_the_librarys():
    (today,) = (entry for entry in CANDIDATES if entry.name == TODAY)
    assert SERVED[:-1] == ("mvsplit-1", "mvsplit-root", "alpha")  # the rule speaks of these too
    for depth in (16, 400):
        built = [
            build_rule(rule, width=8, depth=depth, branch="ffn")
            for rule in (RuleConfig(), today.rule(depth))
        ]
        for name in ("alpha", "beta"):
            first, second = (getattr(rule, name) for rule in built)
            torch.testing.assert_close(first, second, rtol=1e-3, atol=0)
        assert today.writers == "standard"
        assert not built[0].zero_writers


def test_the_decision_and_what_speaks_against_it_are_on_the_page():
    rows = json.loads((ROOT / "docs/experiments" / RESULTS / "gpu.json").read_text("utf-8"))["rows"]
    page = " ".join((ROOT / "docs/experiments/depth-bench.md").read_text("utf-8").split())
    text = " ".join(module.UNDERSTOOD.split())
    assert "The rule did not set today's default: a decision of 2026-11-30 did" in page
    assert "by a decision after the rows**, of 2026-11-30" in text
    assert "it has not been run in the wider shapes, and the watch has seen it at" in text
    mine = [row for row in rows if row["run"].startswith(f"{TODAY}-")]
    assert {row["width"] for row in mine} == {64}
    assert not any(row["looks"] for row in mine)
    assert all(row["lives"] and row["rate"] <= 1e-2 for row in mine)
    small = json.loads((ROOT / "docs/experiments" / RESULTS / "small.json").read_text("utf-8"))
    seen = [row for row in small["rows"] if row["run"].startswith(f"{TODAY}-")]
    assert all(row["looks"] and row["lives"] and row["rate"] <= 1e-2 for row in seen)
    words = "the highest rate at which it was run, at these widths"
    assert words in text
    sizes = re.findall(r"\*\*By this size alone (.*?)\*\*", page)
    place = f"takes the place of {ALPHA}"
    (small_words, gpu_words) = sizes
    assert f"{ALPHA}, writers standard {place}," in small_words
    assert f"nothing {place}," in gpu_words


def test_words_about_shapes_hold_of_the_rows():
    path = ROOT / "docs/experiments" / RESULTS / "gpu.json"
    rows = {row["run"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}
    shapes = ("400x64", "100x128", "25x256")
    for name in ("alpha", "layerscale-0.01"):
        losses = [
            [r["validation_loss"] for r in rows.values() if r["run"].startswith(f"{name}-{s}-lr3")]
            for s in shapes
        ]
        assert [len(each) for each in losses] == [5, 1, 1]
        deep, middle, wide = losses
        assert min(deep) > middle[0] > wide[0]  # the shallower is ahead at each step
        for shape in shapes[1:]:
            best_of = {r["validation_loss"]: r["rate"] for r in rows.values()
                       if r["run"].startswith(f"{name}-{shape}-")}  # fmt: skip
            assert best_of[min(best_of)] == 3.2e-3
    lives = {shape: rows[f"alpha-{shape}-lr1.0e-02-seed0"]["lives"] for shape in (
        "400x64", "100x64", "100x128", "25x256")}  # fmt: skip
    assert lives == {"400x64": True, "100x64": True, "100x128": False, "25x256": False}
    assert rows["alpha-100x128-lr1.0e-02-seed0"]["collapse_step"] == 80
    assert rows["alpha-25x256-lr1.0e-02-seed0"]["collapse_step"] is None
    text = " ".join(module.UNDERSTOOD.split())
    assert "it learns for 80 steps and then loses all of it" in text
    wide = rows["alpha-25x256-lr1.0e-02-seed0"]
    assert 0.8 < min(wide["curve"]) / wide["floor"] < 0.9
    rates = {row["rate"] for row in rows.values() if row["run"].startswith("alpha-")
             and row["width"] > 64 and row["lives"]}  # fmt: skip
    assert rates == {1e-3, 3.2e-3}


def test_without_rows_words_without_figures_stay(tmp_path, folder):
    (folder / "gpu.json").unlink()
    assert understood(folder) == ["## Three", "", "No figure.", ""]
