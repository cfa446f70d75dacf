"""docs/video.md: every command runs as written, but for its length; the tables are those of the
results."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from mvsplit.cli import main
from mvsplit.data.motions import MOTIONS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "video.md"
TEXT = PAGE.read_text(encoding="utf-8")
SHORT = {
    "train": "--steps 2 --batch-size 4 --device cpu --model.depth 1 --model.width 32 "
    "--model.heads 2 --precision fp32",
    "sample": "--steps 2 --num-images 1 --device cpu",
    "evaluate": "--steps 2 --num-images 2 --validation-samples 2 --device cpu",
}


def test_the_commands_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With options behind them that make them short."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    mvsplit ([a-z].*)$", TEXT, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command)
        assert main([*words, *shlex.split(SHORT[words[0]])]) == 0, command


def test_the_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = runpy.run_path(str(ROOT / "benchmarks" / "video_page.py"))
    results = page["load"]()
    assert page["page"](TEXT, results) == TEXT
    changed = TEXT.replace("<!-- means -->\n", "<!-- means -->\n.", 1)
    assert page["page"](changed, results) == TEXT
    for part in (part for result in results for part in result.values()):
        assert all(value <= 2e-5 for value in part["gates"].values())
        assert part["gates"].get("a clip of one frame against a picture", 0.0) == 0


def test_links_lead_somewhere_and_motions_are_all_there() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", TEXT)
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
    assert set(re.findall(r"^\| `(\w+)` \| (?:one|two) object", TEXT, re.MULTILINE)) == set(MOTIONS)


def test_results_are_put_together_run_by_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is collected again replaces itself, and leaves the others."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = runpy.run_path(str(ROOT / "benchmarks" / "video_page.py"))
    place = tmp_path / "result.json"

    def part(name: str, *runs: int) -> Path:
        about = {"part": name, "date": "d", "torch": "t", "gpu": "g", "gates": {}}
        path = tmp_path / f"{name}{runs}.json"
        path.write_text(json.dumps({**about, "runs": [{"seed": run} for run in runs]}))
        return path

    page["collect"]([part("means", 2), part("frames", 5), part("means", 0, 1)], place)
    page["collect"]([part("frames", 7)], place)
    seeds = {n: [r["seed"] for r in p["runs"]] for n, p in json.loads(place.read_text()).items()}
    assert seeds == {"means": [0, 1, 2], "frames": [7]}
    beside = tmp_path / "beside.json"
    beside.write_text(json.dumps(json.loads(part("means", 3).read_text()) | {"note": "shared"}))
    with pytest.raises(SystemExit, match="means: on other GPUs, or beside other processes"):
        page["collect"]([part("means", 4), beside], place)


def test_the_exponent_of_a_power_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    exponent = runpy.run_path(str(ROOT / "benchmarks" / "video_frames.py"))["exponent"]
    assert exponent([1, 2, 4, 32], [3 * f**0.7 for f in (1, 2, 4, 32)]) == pytest.approx(0.7)
