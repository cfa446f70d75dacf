"""Words whose figures are read from the rows."""

import json
from pathlib import Path

import pytest

from mvsplit.reproduce.depth import understood as module
from mvsplit.reproduce.depth.page import RESULTS
from mvsplit.reproduce.depth.plan import ENTRIES
from mvsplit.reproduce.depth.understood import understood

ROOT = Path(__file__).parents[3]
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
        assert "does in the one that was run" in words
    assert seeds("standard-1000x64-lr3.2e-03") == [False] * 3
    assert seeds("alpha-1000x64-lr3.2e-03") == [True]
    text = " ".join(module.UNDERSTOOD.split())
    assert "fixed before they ran" not in text  # nothing that is kept says so
    assert "The seeds of the rivals are still three" in text
    counts = {entry.name: len(seeds(f"{entry.name}-400x64-lr3.2e-03")) for entry in ENTRIES}
    rivals = {entry.name for entry in ENTRIES if entry.kind == "rival"}
    assert max(counts[name] for name in rivals) == 3
    assert "added at 3.2e-3 alone, which moved its rate there" in text
    lives = [len(seeds(f"alpha-standard-400x64-lr{rate}")) for rate in ("3.2e-03", "1.0e-02")]
    assert lives == [5, 3]


def test_without_rows_words_without_figures_stay(tmp_path, folder):
    (folder / "gpu.json").unlink()
    assert understood(folder) == ["## Three", "", "No figure.", ""]
