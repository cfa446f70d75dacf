"""Lists fit the terminal: no line wider, no word lost."""

from __future__ import annotations

import contextlib
import textwrap

import pytest

from mvsplit import cli
from mvsplit.cli import bench
from mvsplit.cli.listing import listing
from mvsplit.presets import PRESETS
from mvsplit.reproduce import CLAIMS


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize(
    "arguments", [["bench", "--list"], ["reproduce", "--list"]], ids=["bench", "reproduce"]
)
def test_the_lists_are_as_wide_as_the_terminal(arguments, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    widest = max(map(len, out.splitlines()))
    assert 0.8 * min(columns, 100) < widest <= min(columns, 100)
    words = " ".join(out.split())
    known = bench.find_benchmarks(bench.find_folder()).values()
    texts = {"bench": [b.claim for b in known] + [b.cost for b in known]}
    texts["reproduce"] = [claim.title for claim in CLAIMS.values()]
    texts["reproduce"] += [cost for claim in CLAIMS.values() for cost in claim.cost.values()]
    assert [text for text in texts[arguments[0]] if " ".join(text.split()) not in words] == []


@pytest.mark.parametrize("command", ["train", "plan", ""])
def test_the_help_that_lists_commands_or_presets_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):  # with which tyro ends
        cli.main([*filter(None, [command]), "--help"])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    named = [*PRESETS] if command else [*cli.COMMANDS]
    assert [name for name in named if f"\n  {name} " not in out] == []


def test_a_list_is_folded_where_words_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    said = listing([("name: CPU", ["one two three four five six"]), ("other", [])])
    assert said == textwrap.dedent("""\
        name: CPU
          one two three four
          five six
        other""")
