"""Pages in a folder of their own: no link to a page that is not there, no word of runs that are
not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mvsplit.reproduce import CLAIMS, page
from mvsplit.reproduce.page import RESULTS, page_text, stored_results, write_pages

PAGES = Path(__file__).parents[2] / "docs" / "experiments"
SIZES = {"small": "small size", "gpu": "GPU size"}
LINK = re.compile(r"\[[^\]]+\]\(([^)]+)\)")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Plots take seconds; that they are there is what counts here."""
    monkeypatch.setattr(page, "save_plot", lambda panels, path: path.touch())


def copied(folder: Path, *names: str) -> Path:
    """A folder with some of the results that the project has."""
    (folder / RESULTS).mkdir(parents=True)
    for name in names:
        text = (PAGES / RESULTS / f"{name}.json").read_text(encoding="utf-8")
        (folder / RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def links(folder: Path) -> list[str]:
    found = [link for p in folder.glob("*.md") for link in LINK.findall(p.read_text("utf-8"))]
    assert [link for link in found if not (folder / link).exists()] == []
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CLAIMS)
def test_a_page_alone_speaks_of_its_own_runs_and_links_to_nothing_else(tmp_path, name, size):
    folder = copied(tmp_path, f"{name}-{size}")
    path, index = write_pages([CLAIMS[name]], folder)
    assert set(links(folder)) == {f"{name}.md", f"{name}-{size}.png"}
    (other,) = (words for each, words in SIZES.items() if each != size)
    understood = path.read_text("utf-8").partition("**Understood afterwards.**")[2]
    assert other not in understood.partition("## The rule")[0]
    assert "depth bench" not in path.read_text("utf-8") + index.read_text("utf-8")


def test_links_go_to_pages_written_together_in_any_order_or_there_before(tmp_path):
    folder = copied(tmp_path, "extinction-gpu", "modes-gpu", "thousand-gpu")
    (folder / RESULTS / "depth-bench").mkdir()
    (folder / "depth-bench.md").touch()
    write_pages([CLAIMS[name] for name in ("extinction", "modes", "thousand")], folder)
    assert "modes.md" in LINK.findall((folder / "extinction.md").read_text("utf-8"))
    assert "depth-bench.md" in LINK.findall((folder / "thousand.md").read_text("utf-8"))
    assert links(folder).count("depth-bench.md") == 3  # twice in the index
    assert links(folder).count("modes.md") == 3


@pytest.mark.parametrize("name", CLAIMS)
def test_all_that_was_understood_is_on_the_pages_of_the_project(name):
    """Each passage names results that are there, or it would be told nowhere."""
    kept = {path.stem for path in (PAGES / RESULTS).glob("*")}
    assert {result for part in CLAIMS[name].passages for result in part.of} <= kept
    results = stored_results(CLAIMS[name], PAGES)
    text = (PAGES / f"{name}.md").read_text("utf-8")
    assert text == page_text(CLAIMS[name], results, kept) == page_text(CLAIMS[name], results)


def test_no_paragraph_of_modes_is_too_long_to_be_read():
    text = (PAGES / "modes.md").read_text("utf-8")
    assert max(map(len, text.split("\n\n## ")[0].split("\n\n"))) < 900


def test_what_a_result_of_a_size_says_is_told_where_it_is(tmp_path):
    """The other way round: what is kept is not left out."""
    folder = copied(tmp_path, "thousand-small", "thousand-gpu")
    write_pages([CLAIMS["thousand"]], folder)
    text = (folder / "thousand.md").read_text("utf-8")
    assert "At the small size the run is too short to tell" in text
    assert "At the GPU size MV-Split, with the paper's" in text
    result = json.loads((folder / RESULTS / "thousand-gpu.json").read_text("utf-8"))
    assert f"gpu: {result['verdict']}" in text
