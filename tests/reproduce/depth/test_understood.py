"""Words whose figures are read from the rows."""

import json

import pytest

from mvsplit.reproduce.depth import understood as module
from mvsplit.reproduce.depth.understood import understood

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


def test_without_rows_words_without_figures_stay(tmp_path, folder):
    (folder / "gpu.json").unlink()
    assert understood(folder) == ["## Three", "", "No figure.", ""]
