"""Words whose figures are read from the rows."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch

from mvsplit.reproduce.depth import understood as module
from mvsplit.reproduce.depth.conclusion import SERVED, TODAY, Depth, by_depth
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


def test_words_without_figures_can_ask_for_a_row(folder, monkeypatch):
    monkeypatch.setattr(module, "UNDERSTOOD", "- [[gpu plain-3]] Said.\n\n- [[gpu keel]] Not said.")
    assert understood(folder) == ["- Said.", ""]


def test_no_words_of_the_bench_are_without_a_row():
    """Or they would stand on the page of somebody who has run something else."""
    paragraphs = [p for p in module.UNDERSTOOD.strip().split("\n\n") if p[0] != "#"]
    assert len(paragraphs) > 10
    assert all("[[" in paragraph for paragraph in paragraphs)


def test_means_of_runs_are_compared(folder, monkeypatch):
    monkeypatch.setattr(module, "UNDERSTOOD", "By [[gpu plain-3\n  over plain-* loss .1%]].")
    assert understood(folder) == ["By 50.0%.", ""]
    monkeypatch.setattr(module, "UNDERSTOOD", "By [[gpu plain-3 over keel loss .1%]].")
    assert understood(folder) == []


def rows_of(name: str) -> list[dict]:
    path = ROOT / "docs/experiments" / RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"]


@pytest.fixture(scope="module")
def depths() -> list[Depth]:
    every = [*ENTRIES, *CANDIDATES]
    return by_depth([(size, cells(size, every, rows_of(name))) for name, size in SIZES.items()])


@pytest.fixture(scope="module")
def gpu() -> dict[str, dict]:
    return {row["run"]: row for row in rows_of("gpu")}


def words() -> str:
    return " ".join(module.UNDERSTOOD.split())


def lives(rows: dict[str, dict], run: str) -> list[bool]:
    """Of each seed."""
    return [row["lives"] for name, row in rows.items() if re.fullmatch(rf"{run}-seed\d", name)]


def against_rivals(depths: list[Depth], name: str) -> dict[str, str]:
    pairs = ((at.name, at.all.get(name), at.rivals[best(at.rivals)]) for at in depths)
    return {depth: compare(mine, rival) for depth, mine, rival in pairs}


def test_what_it_says_to_use_holds_of_the_rows(depths):
    """Sentences without figures of their own, which the next rows may make untrue."""
    assert (
        "ahead at 4, 16 and 100 layers and, after 1,000 steps, at 100 and 400; a tie at 64, and "
        "after 200 steps at 400 and 1000, where its mean is"
    ) in words()
    ahead = ("4", "16", "100", "100 after 1000 steps", "400 after 1000 steps")
    ties = dict.fromkeys(("64", "400", "1000"), "tie")
    assert against_rivals(depths, TODAY) == dict.fromkeys(ahead, "ahead") | ties
    settings = [e.name for e in (*ENTRIES, *CANDIDATES) if e.kind in ("mvsplit", "candidate")]
    good = [n for n in settings if {*against_rivals(depths, n).values()} <= {"ahead", "tie"}]
    assert good == [TODAY]
    assert all(len(at.all[TODAY]) >= 3 for at in depths)
    better = {
        (at.name, name)
        for at in depths
        for name, losses in at.all.items()
        if compare(losses, at.all[TODAY]) == "ahead"
    }
    assert better == {("400", "standard")}
    (short,) = (at for at in depths if at.name == "400")
    (rival,) = {best(at.rivals) for at in depths if at.name in ("400", "1000")}
    assert rival == "layerscale-0.01"
    assert [len(short.all[name]) for name in (TODAY, "standard", rival, "rezero")] == [10] * 4
    assert against_rivals(depths, "alpha") | {"400": "behind", "1000": "behind"} == (
        against_rivals(depths, "alpha")
    )


def test_what_it_says_of_longer_runs_holds_of_the_rows(depths):
    (short, long) = (at for at in depths if at.layers == 400)
    (run,) = (at for at in depths if at.name == "100 after 1000 steps")
    assert (short.top, long.top, long.level) == ("standard", TODAY, [])
    means = {name: fmean(losses) for name, losses in long.all.items() if losses}
    assert sorted(means, key=means.__getitem__) == [TODAY, "layerscale-0.01", "rezero", "standard"]
    rows = rows_of("gpu-long")
    rates = {
        depth: {(row["entry"], row["rate"]) for row in rows if row["depth"] == depth}
        for depth in (100, 400)
    }
    assert len(rates[400]) == len(means)
    assert len(rates[100]) == 3 * len(means)
    late = {row["entry"]: row["collapse_step"] for row in rows if row["rate"] == 1e-2}
    assert late.pop("rezero") is None
    assert len(late) == 3
    assert min(late.values()) > 800
    assert all(len(losses) == 3 for losses in run.all.values() if losses)


def test_what_it_says_of_rates_holds_of_the_rows(gpu, depths):
    deep = {"mvsplit-root": {"1.0e-04", "3.2e-04"}, "beta-quarter": set()}
    rates = ("1.0e-04", "3.2e-04", "1.0e-03", "3.2e-03", "1.0e-02")
    for name, living in deep.items():
        found = {rate: lives(gpu, f"{name}-400x64-lr{rate}") for rate in rates}
        assert all(found.values())
        assert {rate for rate, each in found.items() if all(each)} == living
    assert lives(gpu, "mvsplit-1-400x64-lr1.0e-03") == [True] * 3
    assert not any(lives(gpu, "mvsplit-1-400x64-lr3.2e-03"))
    behind = {
        at.name: compare(at.all["mvsplit-1"], at.all["mvsplit-root"])
        for at in depths
        if at.layers < 400 and at.size in ("small", "gpu")
    }
    assert behind == dict.fromkeys(("4", "16", "64", "100"), "behind")
    assert "β = 1 is behind 1/√L at 4, 16, 64 and 100" in words()
    at_3e3 = {row["entry"] for row in gpu.values() if (row["depth"], row["rate"]) == (1000, 3.2e-3)}
    learn = {name for name in at_3e3 if all(lives(gpu, f"{name}-1000x64-lr3.2e-03"))}
    assert learn == {"layerscale-0.01", TODAY, "alpha", "keel"}
    assert {"plain", "mvsplit-1", "layerscale-root", "rezero", "standard"} < at_3e3
    for name in ("layerscale-root", "rezero"):
        assert lives(gpu, f"{name}-1000x64-lr1.0e-03") == [True] * 3
    assert all(lives(gpu, "keel-1000x64-lr1.0e-02"))
    assert lives(gpu, "standard-1000x64-lr3.2e-04") == [True]
    assert not any(lives(gpu, "standard-1000x64-lr1.0e-03"))
    assert lives(gpu, "mvsplit-1-1000x64-lr3.2e-04") == [True]
    assert sorted(lives(gpu, "mvsplit-1-1000x64-lr1.0e-03")) == [False, True, True]
    for name in ("mvsplit-root", "plain", "deepnorm"):
        found = [lives(gpu, f"{name}-1000x64-lr{rate}") for rate in rates[:3]]
        assert all(found)
        assert not any(map(any, found))


def test_what_it_says_of_the_default_at_1e_2_holds_of_the_rows(gpu, depths):
    rates = ("1.0e-03", "3.2e-03", "1.0e-02")
    small = {row["run"]: row for row in rows_of("small")}
    for rows, shapes in ((small, ("4x48", "16x48", "64x48")), (gpu, ("100x64", "400x64"))):
        for shape in shapes:
            each = [lives(rows, f"{TODAY}-{shape}-lr{rate}") for rate in rates]
            assert all(each)
            assert all(map(all, each))
    shapes = ("1000x64", "100x128", "25x256")
    for name, living in ((TODAY, [False] * 3), ("alpha", [False] * 3)):
        assert [all(lives(gpu, f"{name}-{s}-lr1.0e-02")) for s in shapes] == living
    for name in ("layerscale-0.01", "standard"):
        assert all(all(lives(gpu, f"{name}-{s}-lr1.0e-02")) for s in shapes[1:])
    assert lives(gpu, "layerscale-0.01-1000x64-lr1.0e-02") == [False]  # "but for the latter"
    for name in (TODAY, "alpha"):
        wide = gpu[f"{name}-100x128-lr1.0e-02-seed0"]
        assert wide["similarity"] > 0.99
        assert wide["collapse_step"] >= 70


def test_the_default_learned_in_every_run_at_the_rate_that_the_readme_recommends():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "rate of 0.0032, at which it learned in every run, of 4 to 1000 layers" in readme
    every = [row for name in SIZES for row in rows_of(name) if row["entry"] == TODAY]
    there = [row for row in every if row["rate"] == 3.2e-3]
    assert {row["depth"] for row in there} == {4, 16, 64, 100, 400, 1000, 25}
    assert all(row["lives"] for row in there)
    assert not all(row["lives"] for row in every)


def test_what_it_says_of_shapes_holds_of_the_rows(gpu):
    shapes = ("400x64", "100x128", "25x256")

    def losses(name: str, shape: str) -> list[float]:
        prefix = f"{name}-{shape}-lr3.2e-03-"
        return [r["validation_loss"] for run, r in gpu.items() if run.startswith(prefix)]

    for name in (TODAY, "standard", "layerscale-0.01"):
        found = [losses(name, shape) for shape in shapes]
        assert [len(each) for each in found[1:]] == [3, 3]
        assert compare(found[2], found[0]) == "ahead"
    for shape in shapes[1:]:
        for other in ("layerscale-0.01", TODAY):
            assert compare(losses("standard", shape), losses(other, shape)) == "ahead"
    ours = [compare(losses(TODAY, s), losses("layerscale-0.01", s)) for s in shapes[1:]]
    assert ours == ["cannot tell", "ahead"]


def test_what_it_says_of_controls_holds_of_the_rows(depths, gpu):
    (at,) = (at for at in depths if at.name == "400")
    hard = fmean(
        gpu[f"hard-center-400x64-lr3.2e-04-seed{seed}"]["validation_loss"] for seed in range(3)
    )
    learn_less = {n for n, losses in at.all.items() if losses and fmean(losses) > hard}
    assert learn_less == {"prenorm"}


def test_seeds_beyond_three_are_as_many_as_it_says(depths):
    counts = {at.name: {n: len(v or ()) for n, v in at.all.items()} for at in depths}
    assert sorted(n for n, count in counts["400"].items() if count > 5) == sorted(
        [TODAY, "standard", "layerscale-0.01", "rezero"]
    )
    assert sum(count == 10 for count in counts["100"].values()) == 8
    assert [n for n, count in counts["1000"].items() if count > 3] == ["layerscale-0.01", TODAY]
    (at,) = (at for at in depths if at.name == "400")
    assert compare(at.all["standard"], at.all["layerscale-0.01"]) == "cannot tell"


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
    page = " ".join((ROOT / "docs/experiments/depth-bench.md").read_text("utf-8").split())
    text = words()
    assert "The rule did not set today's default: a decision of 2026-11-30 did" in page
    assert "by a decision after the rows**, of 2026-11-30" in text
    assert "the watch has seen it at the small size alone" in text
    assert not any(r["looks"] for n in ("gpu", "gpu-long") for r in rows_of(n) if _is_default(r))
    assert any(row["looks"] for row in rows_of("small") if _is_default(row))
    small, gpu, _ = re.findall(r"\*\*By this size alone (.*?)\*\*", page)
    place = f"takes the place of {ALPHA}"
    assert f"{ALPHA}, writers standard {place}," in small
    assert f"nothing {place}," in gpu


def _is_default(row: dict) -> bool:
    return row["entry"] == TODAY


def test_without_rows_words_without_figures_stay(tmp_path, folder):
    (folder / "gpu.json").unlink()
    assert understood(folder) == ["## Three", "", "No figure.", ""]
