"""docs/what-you-get.md is what the plan and the results give, and is found from where it is asked
for."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from mvsplit.cli import main
from mvsplit.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "what-you-get.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def writer():
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        path = folder / "what_you_get_page.py"
        spec = importlib.util.spec_from_file_location("what_you_get_page", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))


def section(title: str) -> list[list[str]]:
    """The rows of a section's table, head first."""
    text = TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[each.strip() for each in line] for line in lines if "---" not in line[0]]


def test_the_page_is_what_the_command_writes_and_check_says_so(writer, tmp_path, monkeypatch):
    written = writer.page()
    assert written == TEXT, "mvsplit bench page writes it"
    changed = tmp_path / "page.md"
    changed.write_text(re.sub(r"\d\.\d\d s", "9.99 s", TEXT, count=1), encoding="utf-8")
    monkeypatch.setattr(writer, "PAGE", changed)
    monkeypatch.setattr(writer, "page", lambda: written)
    monkeypatch.setattr(sys, "argv", ["what_you_get_page.py", "--check"])
    with pytest.raises(SystemExit, match=r"out of date: mvsplit bench page"):
        writer.main()
    monkeypatch.setattr(sys, "argv", ["what_you_get_page.py"])
    writer.main()
    assert changed.read_text(encoding="utf-8") == TEXT


def test_a_predicted_cell_is_what_the_command_line_says(capsys):
    head, *rows = section("Training, predicted")
    row = next(row for row in rows if row[0].startswith("2 × H200"))
    cell = row[head.index("`mvsplit-1000l-h200`")]
    options = re.search(r"`(.*)`", cell)[1].split()
    given = ("plan", "mvsplit-1000l-h200", "--gpus", "2", *options, "--json")
    assert main(given) == 0
    plan = json.loads(capsys.readouterr().out)
    days = plan["seconds"] * PRESETS["mvsplit-1000l-h200"].train.steps / 86400
    wanted = f"{plan['memory']['total'] / 2**30:.0f} GiB, {plan['seconds']:.2g} s, {days:.2g} d"
    assert cell.partition(";")[0] == wanted


def test_what_does_not_fit_is_refused_by_the_plan_and_fits_with_what_is_named(capsys):
    head, *rows = section("Training, predicted")
    row = next(row for row in rows if row[0].startswith("H100"))
    cell = row[head.index("`mvsplit-1000l-h200`")]
    assert cell.startswith("no (")
    given = ("plan", "mvsplit-1000l-h200", "--gpu", "h100", "--json")
    assert main(given) == 1
    assert main([*given, *re.search(r"`(.*)`", cell)[1].split()]) == 0
    capsys.readouterr()


def test_the_deepest_of_a_consumer_card_has_a_command_and_its_time(capsys):
    command, seconds, days = re.search(
        r"On the RTX 4090 `mvsplit (plan .*)`\nforetells (\S+) s a step .*?, (\S+) days", TEXT
    ).groups()
    assert main([*command.split(), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert f"{plan['seconds']:.2g}" == seconds
    steps = PRESETS["mvsplit-400l-h200"].train.steps
    assert f"{plan['seconds'] * steps / 86400:.2g}" == days
    assert f"predicted {seconds} s a step, {days} days" in TEXT


def test_the_summary_lists_for_a_card_what_the_table_has_fit_on_it():
    summary = {row[0]: row[1] for row in summary_rows()}
    head, *rows = section("Training, predicted")
    for card in ("H100", "H200"):
        row = next(row for row in rows if row[0].startswith(f"{card},"))
        fits = [n for n, cell in zip(head, row, strict=True) if "GiB, " in cell and n[:1] == "`"]
        assert fits
        assert re.findall(r"`[\w-]+`", summary[f"one {card}"]) == fits
    deep = {name for name in head if name[:1] == "`"}
    listed = " ".join(summary[name] for name in ("one H200", "two GPUs and more"))
    assert deep == set(re.findall(r"`[\w-]+`", listed))
    (smallest,) = (row for row in rows if row[0].startswith("RTX 4090"))
    assert f"; {smallest[-1]} layers" in summary["one consumer GPU of 24 GB"]


def summary_rows() -> list[list[str]]:
    lines = TEXT.partition("\n## ")[0].splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_a_machine_is_what_its_file_says_also_where_it_was_shared(writer):
    from what_you_get_measured import machine

    words = {"note": "the GPU was shared with others"}
    for found in (words, {"preset": words}, {"environment": [{}, words]}):
        assert machine(found, "dpo_h200_2026") == "1 × H200, shared"
    assert machine({"note": "in the morning", "processes": 2}, "x_h200x2_2026") == "2 × H200"
    assert machine({"torch": "2.13.0+cpu"}, "dpo_digits_cpu_2026") == "CPU"


def test_predicted_and_measured_are_told_apart():
    assert section("Training, predicted")
    assert "predicted" in section("Drawing")[0]
    for title in ("Training, measured", "Training further"):
        for row in section(title)[1:]:
            file = re.search(r"\]\((.*)\)$", row[-1])
            assert file, f"{title}: {row} names no file"
            assert (PAGE.parent / file[1]).is_file()


def test_every_preset_is_on_the_page_and_the_page_is_linked():
    assert [name for name in PRESETS if f"`{name}`" not in TEXT] == []
    assert "](docs/what-you-get.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    head = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert "](what-you-get.md#drawing)" in head
    for place in re.findall(r"\]\((\w[\w-]*\.md)(?:#([\w-]+))?\)", TEXT):
        page = (PAGE.parent / place[0]).read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}
        assert not place[1] or place[1] in anchors
