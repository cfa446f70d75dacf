"""`mvsplit bench`: finds the scripts, says what is missing, passes options on, keeps results."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mvsplit import cli
from mvsplit.cli import bench
from tests.slow import slow

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = '''"""Claim: it is
quick.

Gate: none.

Cost: nothing at
all.
"""

import json, sys

if __name__ == "__main__":
    place = sys.argv.index("--json") + 1
    with open(sys.argv[place], "w") as file:
        json.dump(sys.argv[1:place - 1], file)
    sys.exit(7 if "--fail" in sys.argv else 0)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one script, in the place of that of the repository."""
    found = tmp_path / "benchmarks"
    (found / "results").mkdir(parents=True)
    (found / "quick.py").write_text(SCRIPT)
    (found / "helper.py").write_text('"""Not a script: --json."""')
    monkeypatch.setattr(bench, "find_folder", lambda: found)
    return found


def test_every_script_with_a_claim_is_listed_with_what_it_needs():
    known = bench.find_benchmarks(FOLDER)
    claims = {p.stem for p in FOLDER.glob("*.py") if p.read_text().startswith('"""Claim:')}
    assert claims - known.keys() <= {"detector_quality"}
    assert {n for n, b in known.items() if b.needs != "CPU"} == set(bench._NEEDS)
    assert set(bench._ARGUMENTS) <= set(known)
    assert known["train_step"].claim.startswith("Question: how near to an H200's peak")
    assert re.fullmatch(r"about \w+ minutes on one H200\.", known["train_step"].cost)
    assert all(b.claim and b.cost for b in known.values())
    assert [name for name in known if name.endswith("_page")] == []


def test_each_cost_says_how_long_it_takes_and_on_what():
    """To somebody who knows neither the machines here nor who else used them."""
    for name, benchmark in bench.find_benchmarks(FOLDER).items():
        cost = benchmark.cost
        assert re.search(r"\b(seconds?|minutes?|hours?)\b", cost), f"{name}: {cost}"
        assert re.search(r"\b(CPU cores?|H200)\b", cost), f"{name}: {cost}"
        assert not re.search(r"\bbusy\b|\bbeside\b|others? .*\buse\b", cost), f"{name}: {cost}"


def test_without_json_the_checkout_is_left_alone_and_the_result_is_told(folder, tmp_path, capfd):
    given = ["--depth", "3"]
    before = sorted(folder.rglob("*"))
    for words in (given, []):
        assert cli.main(["bench", "quick", *words]) == 0
        out, where = (
            capfd.readouterr().out.removeprefix("result ").split(", in a temporary folder;")
        )
        assert where == " --json FILE keeps it where you say\n"
        assert Path(out).name == f"quick_cpu_{datetime.date.today().isoformat()}.json"
        assert json.loads(Path(out).read_text()) == words
        shutil.rmtree(Path(out).parent)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("written", ["--json {}", "--json={}"])
def test_a_given_file_is_used_and_a_failure_is_passed_on(folder, tmp_path, written):
    out = tmp_path / "mine.json"
    assert cli.main(["bench", "quick", *written.format(out).split(), "--fail"]) == 7
    assert json.loads(out.read_text()) == ["--fail"]
    assert not list((folder / "results").iterdir())


def test_a_signal_ends_the_script_and_the_command_says_so(folder, tmp_path, monkeypatch):
    """Sent by the script, for it is known then that it runs."""
    stops = SCRIPT.partition("if __name__")[0] + (
        "import os, signal, time, pathlib  # takes --json\n"
        'if __name__ == "__main__":\n'
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "    time.sleep(20)\n"
        f"    pathlib.Path({str(tmp_path / 'went on')!r}).touch()\n"
    )
    (folder / "quick.py").write_text(stops)
    monkeypatch.setattr(bench, "_SHOWN", ("quick",))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # where it were not heard
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", "quick", "--json", str(tmp_path / "x.json")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not (tmp_path / "went on").exists()


FAILS = '''"""Takes --json, and what lies beside it."""

import sys
from multiprocessing import get_context

import helper
from mvsplit.errors import UserError

def here():
    return 1

def fail(error):
    raise error("depth=0: must be at least 1")

if __name__ == "__main__":
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(here) == 1
        pool.apply(fail, [{"mistake": UserError, "fault": ValueError}[sys.argv[1]]])
'''


@pytest.mark.parametrize("option", [["quick"], ["page"]])
def test_a_mistake_of_the_user_is_one_line_in_every_script(folder, capfd, option):
    """Also where one of its processes finds it."""
    for name in ("quick", "performance_page", "what_you_get_page"):
        (folder / f"{name}.py").write_text(FAILS)
    assert cli.main(["bench", *option, "mistake"]) == cli.USER_ERROR
    out, err = capfd.readouterr()
    scripts = 2 if option == ["page"] else 1
    assert (out, err) == ("", scripts * "mvsplit: depth=0: must be at least 1\n")


def test_a_fault_of_a_script_keeps_its_traceback(folder, capfd):
    (folder / "quick.py").write_text(FAILS)
    assert cli.main(["bench", "quick", "fault"]) == 1
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == "ValueError: depth=0: must be at least 1"
    assert f'File "{folder / "quick.py"}", line 18, in <module>' in err


@slow
def test_a_mistake_under_torchrun_is_said_once(folder, capfd, monkeypatch):
    monkeypatch.setitem(bench._NEEDS, "quick", "GPUs")
    monkeypatch.setattr(bench, "_missing", lambda needs: None)
    (folder / "quick.py").write_text(FAILS)
    given = ["mistake", "--json", str(folder / "x.json")]
    assert cli.main(["bench", "quick", *given]) == 1  # torchrun's own
    assert capfd.readouterr().err.count("mvsplit: depth=0: must be at least 1\n") == 1


def test_arguments_without_which_a_script_does_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(bench._ARGUMENTS, "quick", ("--run", "there"))
    out = tmp_path / "mine.json"
    for given, expected in ((), ["--run", "there"]), (("--run", "x"), ["--run", "x"]):
        assert cli.main(["bench", "quick", "--json", str(out), *given]) == 0
        assert json.loads(out.read_text()) == expected


@pytest.mark.parametrize("fails", [None, "performance_page.py", "what_you_get_page.py"])
def test_every_page_of_all_results_is_written_and_a_failure_of_one_is_told(monkeypatch, fails):
    done = []

    def run(script, arguments, folder):
        done.append((script.name, *arguments))
        assert script.is_file()
        return int(done[-1][0] == fails)

    monkeypatch.setattr(bench, "_run", run)
    assert cli.main(["bench", "page", "--check"]) == (fails is not None)
    assert done == [("performance_page.py", "--check"), ("what_you_get_page.py", "--check")]


def test_the_list(folder, capsys):
    for arguments in (["bench"], ["bench", "--list"]):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert "it is quick." in out
        assert "nothing at all." in out
        assert "helper" not in out


def test_errors_say_what_to_do(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(bench._NEEDS, "quick", "GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "quick"]) == cli.USER_ERROR
    assert "bench quick: needs a GPU" in capsys.readouterr().err
    assert cli.main(["bench", "qiuck"]) == cli.USER_ERROR
    assert "did you mean quick" in capsys.readouterr().err
    assert cli.main(["bench", "--lsit"]) == cli.USER_ERROR
    assert "did you mean --list?" in capsys.readouterr().err
    assert cli.main(["bench", "nonsense"]) == cli.USER_ERROR
    assert (
        "bench nonsense: unknown; mvsplit bench --list shows what there is\n"
        in capsys.readouterr().err
    )
    monkeypatch.setitem(bench._NEEDS, "quick", "CPU")
    assert cli.main(["bench", "quick", "--json"]) == cli.USER_ERROR
    assert "--json wants the name of a file" in capsys.readouterr().err


def test_without_the_repository_it_says_where_the_scripts_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.mvsplit, "__file__", str(tmp_path / "site" / "mvsplit" / "x.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "train_step"]) == cli.USER_ERROR
    assert "not part of the installed package; clone" in capsys.readouterr().err
    monkeypatch.chdir(FOLDER.parent)
    assert bench.find_folder() == FOLDER
