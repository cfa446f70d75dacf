"""The command line of benchmarks/depth_bench.py: a mistake is one line, before anything is run."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvsplit import cli
from mvsplit.reproduce.depth.order import in_order
from mvsplit.reproduce.depth.plan import SMALL, get_entries
from mvsplit.reproduce.depth.run import FINISHED, head, write_row

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
NO_ROW = {"size": "small", "rule": {}, "rows": [{"run": "x"}]}
OF_GPU = {"size": "gpu", "rule": {}, "rows": []}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the script in `tmp_path` without a GPU; gives its status. It fails where a gate begins,
    unless a test puts another in its place."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("depth_bench")

    def no_gate(*given):
        raise AssertionError("a gate began")

    monkeypatch.setattr(script, "check", no_gate)
    monkeypatch.setattr(script, "check_together", no_gate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)

    def bench(*given: str) -> int:
        monkeypatch.setattr(sys, "argv", ["depth_bench.py", *given])
        return cli.status_of(script.main)

    bench.script = script
    return bench


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--runs nope", "run='nope': must be ENTRY-LAYERSxWIDTH-lrRATE-seedSEED, rates as 1.0e-03"),
        ("--runs plain-5x7-lr9e-01-seed0", "rate='9e-01' must be of the form 1.0e-03, as in mvspl"),
        ("--runs plain-0x48-lr1.0e-03-seed0", "layers='0' must be a whole number from 1, as in"),
        ("--runs plain-4xw-lr1.0e-03-seed0", "width='w' must be a whole number from 1, as in"),
        ("--runs plain-4x48-lr1.0e-03-seed-1", "seed='-1' must be a whole number from 0, as in"),
        ("--runs plian-4x48-lr1.0e-03-seed0", "entry='plian' is unknown: did you mean plain?"),
        ("--runs plain-4x7-lr1.0e-03-seed0", "run='plain-4x7-lr1.0e-03-seed0': model.width / mod"),
        ("--entries nope", "entry='nope' is unknown: choose one of: all, alpha, "),
        ("--size gpu", "size=gpu: no GPU is there; use --size small, which needs none"),
        ("--size gpu --time", "size=gpu: no GPU is there; use --size small, which needs none"),
        ("--workers 0", "workers=0: must be at least 1; without --workers it is as many as the"),
        ("--together 0", "together=0: must be at least 1; without --together it is each run alone"),
        ("--part 3/2", "part=3/2: K of K/N must be from 0 to 1"),
        ("--part x", "part='x': must be K/N, process K of N, K from 0, as in 0/2 and 1/2"),
        ("--part 0/0", "part='0/0': must be K/N, process K of N, K from 0, as in 0/2 and 1/2"),
        ("--depths 4 0", "depths=0: a network has at least 1 layer; give more than 0"),
        ("--depths -4", "depths=-4: a network has at least 1 layer; give more than 0"),
        ("--minutes 0", "minutes=0: nothing can be run in them; give more than 0, or leave"),
        ("--minutes nan", "minutes=nan: nothing can be run in them; give more than 0, or leave"),
        ("--draw", "--draw needs --pages FOLDER, whose results the page is written from"),
        ("--draw --pages e", "holds no rows of the bench; run it: mvsplit bench depth_bench --pag"),
        ("--draw --pages e --readme no.md", "readme=no.md: is no file; give the README to write"),
        (
            "--have missing.json",
            "have=missing.json: cannot be read (No such file or directory); gi",
        ),
        (
            "--have e",
            "have=e: cannot be read (Is a directory); give a file that --json has written",
        ),
        (
            "--have words.txt",
            "have=words.txt: is no JSON (Expecting value: line 1 column 1 (char 0",
        ),
        (
            "--have bytes",
            "have=bytes: is no JSON ('utf-8' codec can't decode byte 0xff in position",
        ),
        (
            "--have list.json",
            'have=list.json: has no "rule" and "rows"; give a file that --json ha',
        ),
        (
            "--have rows.json",
            'have=rows.json: has no "rule" and "rows"; give a file that --json ha',
        ),
        (
            "--have no_row.json",
            'have=no_row.json: "rows" holds what is no row of the bench; give a',
        ),
        ("--have of_gpu.json", "have=of_gpu.json: is of size gpu; give --size with that"),
        ("--draw --pages e --have of_gpu.json", "have=of_gpu.json: is of size gpu; give --size wi"),
        ("--out words.txt", "out=words.txt: words.txt is a file and no folder; give another place"),
        ("--out words.txt/x/y", "out=words.txt/x/y: words.txt is a file and no folder; give anoth"),
        ("--scratch words.txt", "scratch=words.txt: words.txt is a file and no folder; give anoth"),
        ("--pages words.txt", "pages=words.txt: words.txt is a file and no folder; give another"),
        ("--json e", "json=e: is a folder; give the name of a file in it"),
        ("--json words.txt/x", "json=words.txt/x: words.txt is a file and no folder; give another"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_gate(bench, tmp_path, capsys, given, said):
    (tmp_path / "e").mkdir()
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "bytes").write_bytes(b"\xff")
    results = {"list": [], "rows": {"rows": 3, "rule": {}}, "no_row": NO_ROW, "of_gpu": OF_GPU}
    for name, tree in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    there = sorted(tmp_path.rglob("*"))
    assert bench(*given.split()) == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mvsplit: ")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def row(run, size) -> dict:
    kept = {"curve": [1.0], "seconds": 1.0, "lives": True, "ended": FINISHED}
    return head(run, size) | kept | {"validation_loss": abs(run.rate - 3.2e-3), "tasks": None}


NAMED = "plain-4x48-lr1.0e-03-seed0"


@pytest.mark.parametrize("together", [(), ("--together", "2")])
def test_where_nothing_is_left_no_gate_runs_and_the_rows_are_given(bench, capsys, together):
    run = bench.script.read_runs([NAMED], SMALL)[0]
    write_row(row(run, SMALL), Path("out"))
    given = ["--runs", NAMED, "--out", "out", "--json", "all.json", *together]
    assert bench(*given) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(" s  nothing is left to run")
    assert out[1:] == ["1 runs, 0 failed: out"]
    assert [r["run"] for r in json.loads(Path("all.json").read_text())["rows"]] == [NAMED]


def test_where_the_sweep_is_whole_no_gate_runs_either(bench, capsys):
    rows: list[dict] = []
    while left := in_order(SMALL, get_entries(["plain"]), rows):
        rows += [row(run, SMALL) for run in left]
    result = {"size": "small", "rule": {"sha256": "", "written": ""}, "rows": rows}
    Path("have.json").write_text(json.dumps(result))
    assert bench("--entries", "plain", "--have", "have.json") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(" s  nothing is left to run")


@pytest.mark.parametrize("together", [(), ("--together", "2")])
def test_where_a_run_is_left_the_gate_is_first(bench, together):
    with pytest.raises(AssertionError, match="a gate began"):
        bench("--runs", NAMED, "--out", "out", *together)
    assert not Path("out/rows").exists()


def test_runs_of_another_part_are_left_to_it(bench, capsys):
    """Of two processes that are asked for one run, one trains it."""
    began = []
    for part in ("0/2", "1/2"):
        try:
            assert bench("--entries", "--runs", NAMED, "--part", part, "--out", "out") == 0
        except AssertionError as gate:
            began.append(str(gate))
    assert began == ["a gate began"]
    assert "nothing is left to run\n0 runs, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("way", [("-m", "mvsplit", "bench", "depth_bench"), ("depth_bench.py",)])
def test_as_a_command_and_as_a_script(way):
    command = [sys.executable, *way, "--workers", "0"]
    found = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (cli.USER_ERROR, "")
    assert found.stderr.startswith("mvsplit: workers=0: must be at least 1")
    assert found.stderr.count("\n") == 1
