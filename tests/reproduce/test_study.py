"""A claim from end to end in seconds: runs, resume, result, page, command."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mvsplit.cli import main
from mvsplit.errors import UserError
from mvsplit.reproduce import CLAIMS, Study, get_claim
from mvsplit.reproduce.page import (
    keep_result,
    page_text,
    spelled,
    stored_results,
    summary,
    write_index,
    write_page,
)
from mvsplit.reproduce.rule import FAILS, HOLDS, Figure, fingerprint, judge
from mvsplit.reproduce.study import RULES
from mvsplit.reproduce.trial import RECORD, Jump, Looks, Trial, run_trial
from mvsplit.training import Experiment, Observer, TrainState
from tests.reproduce.tiny import TINY

PAGES = Path(__file__).parents[2] / "docs" / "experiments"
ALONE = dataclasses.replace(TINY, seeds=(0,), few=(0,))
CLAIM = get_claim("timestep")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A study of one claim, finished."""
    out = tmp_path_factory.mktemp("study")
    Study(out, ALONE, workers=1).run([CLAIM], minutes=10)
    return out


def logged(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines]


def test_its_result_is_that_of_its_runs(done):
    result = json.loads((done / "tiny" / "timestep.json").read_text())
    (trial,) = CLAIM.trials(ALONE)
    record = json.loads((done / "tiny" / "runs" / trial.name / RECORD).read_text())
    assert record["ended"] == "finished"
    assert len(record["times"]["layers"]) == 4
    assert result["figures"]["worst layer"]["values"] == {"0": min(record["times"]["layers"])}
    last = [loss for step, loss, _ in logged(done / "tiny" / "runs" / trial.name) if step > 6.4]
    share = sum(last) / len(last) / record["floor"]
    assert result["figures"]["MV-Split: end loss"]["values"]["0"] == pytest.approx(share, rel=1e-3)
    assert result["verdict"] == again(result)
    assert result["rule_unchanged"]
    assert result["environment"]["versions"]["torch"]


def again(result: dict[str, Any]) -> str:
    """The verdict of today's rule on the figures of a stored result."""
    figures = [Figure.from_dict(name, f) for name, f in result["figures"].items()]
    return judge(get_claim(result["claim"]).rule, figures).verdict


def test_a_finished_run_is_not_run_again(done, tmp_path):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    (run,) = (tmp_path / "tiny" / "runs").iterdir()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    said: list[str] = []
    Study(tmp_path, ALONE, workers=1, say=said.append).run([CLAIM])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert said == ["1 of 1 runs are there already"]


def test_other_settings_in_the_same_folder_are_refused(done):
    regimes = {**ALONE.regimes, "calm": dataclasses.replace(ALONE.regimes["calm"], lr=2e-2)}
    with pytest.raises(UserError, match=r"train\.lr"):
        Study(done, dataclasses.replace(ALONE, regimes=regimes), workers=1).run([CLAIM])


def test_a_rule_that_was_changed_after_the_runs_is_told(done, tmp_path):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    easier = dataclasses.replace(CLAIM, rule=CLAIM.rule[:1])
    study = Study(tmp_path, ALONE, workers=1)
    result = study.run([easier])[0]
    assert not result["rule_unchanged"]
    assert "**and changed since**" in page_text(easier, [result])
    noted = json.loads((tmp_path / "tiny" / RULES).read_text())
    assert noted.keys() == CLAIMS.keys()  # all were written down before the first run
    assert noted["timestep"]["sha256"] == fingerprint(CLAIM.rule)
    # So is one of the same bounds whose figures are measured otherwise; of a rule that an older
    # version wrote down, the bounds alone are known.
    assert study.judge(CLAIM)["rule_unchanged"]
    other = dataclasses.replace(CLAIM, measure=lambda runs: CLAIM.measure(runs))
    assert not study.judge(other)["rule_unchanged"]
    for rule in noted.values():
        del rule["measure"]
    (tmp_path / "tiny" / RULES).write_text(json.dumps(noted))
    older = study.judge(other)
    assert older["rule_unchanged"]
    assert "before the first of the runs (compared by its bounds only)." in page_text(
        CLAIM, [older]
    )


def test_runs_of_several_places_are_named(done, tmp_path):
    out = tmp_path / "out"
    Study(out, TINY, workers=2).run([CLAIM])
    path = out / "tiny" / "runs" / CLAIM.trials(TINY)[1].name / "environment.json"
    there = json.loads(path.read_text()) | {"revision": "e" * 40}
    assert "environments" not in json.loads((out / "tiny" / "timestep.json").read_text())
    path.write_text(json.dumps(there))
    result = Study(out, TINY, workers=1).judge(CLAIM)
    first, second = (t.name for t in CLAIM.trials(TINY))
    assert [each["runs"] for each in result["environments"]] == [[first], [second]]
    text = page_text(CLAIM, [result])
    assert "**The runs are of several places or versions**: revision" in text
    assert f"revision eeeeeee, torch {there['versions']['torch']}" in text


class StopAt(Observer):
    """Sends the process a SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if state.step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_looks_are_taken_around_the_rise_of_the_rate(tmp_path):
    seldom = dataclasses.replace(ALONE.regimes["jump"], probe_every=8, look_every=2, steps=9)
    size = dataclasses.replace(ALONE, regimes={**ALONE.regimes, "jump": seldom})
    trial = next(t for t in get_claim("modes").trials(size) if t.label == "plain")
    assert trial.jump == 4
    assert run_trial(trial, tmp_path)
    lines = (tmp_path / trial.name / "layers.jsonl").read_text().splitlines()
    looks = {json.loads(line)["step"] for line in lines}
    assert looks >= {2, 4, 6, 8}
    around = Looks(dataclasses.replace(trial, jump=100))
    asked = [step for step in range(1, 200) if around.wants_look(step)]
    assert asked == [*range(80, 141, 2)]
    with pytest.raises(UserError, match="the looks around it"):
        dataclasses.replace(trial, look_every=0).finished(tmp_path)


def jumping() -> Trial:
    return next(t for t in get_claim("modes").trials(ALONE) if t.label == "plain")


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    trial = jumping()
    assert run_trial(trial, tmp_path / "whole")
    start = Jump.on_start

    class Stopping(Jump, StopAt):
        def __init__(self, trial: Trial) -> None:
            Jump.__init__(self, trial)
            StopAt.__init__(self, 5)

        def on_start(self, state: TrainState, experiment: Experiment) -> None:
            start(self, state, experiment)

    with monkeypatch.context() as patched:
        patched.setattr("mvsplit.reproduce.trial.Jump", Stopping)
        assert not run_trial(trial, tmp_path / "parts")
    assert not trial.finished(tmp_path / "parts")
    assert run_trial(trial, tmp_path / "parts")
    whole, parts = (logged(tmp_path / name / trial.name) for name in ("whole", "parts"))
    assert whole == parts
    rates = [lr for _, _, lr in whole]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-1, 1e-1, 1e-1, 1e-1])


def test_what_time_did_not_allow_has_no_result_and_goes_on(tmp_path):
    study = Study(tmp_path, ALONE, workers=1)
    assert study.run([CLAIM], minutes=-1) == []
    (trial,) = CLAIM.trials(ALONE)
    runs = tmp_path / "tiny" / "runs"
    assert not run_trial(trial, runs, end=time.time())  # after a step, or none
    assert not (tmp_path / "tiny" / "timestep.json").exists()
    assert run_trial(trial, runs)
    (result,) = study.run([CLAIM], minutes=10)
    assert result["runs"][0]["ended"] == "finished"
    assert [step for step, _, _ in logged(runs / trial.name)] == [*range(1, 9)]


def test_the_index_is_written_from_the_results(tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    text = write_index(folder).read_text(encoding="utf-8")
    assert all(claim.title in text for claim in CLAIMS.values())
    assert text.count("not run | not run") == len(CLAIMS)
    for path in PAGES.glob("results/*.json"):
        keep_result(json.loads(path.read_text(encoding="utf-8")), folder)
    for page in PAGES.glob("*.md"):  # those that the index links to
        (folder / page.name).touch()
    written = write_index(folder).read_text(encoding="utf-8")
    assert written == (PAGES / "README.md").read_text(encoding="utf-8")


def test_the_index_counts_its_verdicts():
    def found(claim, verdict, size="small"):
        path = PAGES / "results" / f"{claim}-small.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        return result | {"verdict": verdict, "size": size}

    text = summary([found("collapse", FAILS), found("order", FAILS), found("front", HOLDS, "gpu")])
    few, most = len(CLAIMS) - 2, len(CLAIMS) - 1
    tail = "cannot tell at this scale: 0; not run"
    assert f"`small`, of {len(CLAIMS)} claims: holds: 0; does not hold: 2; {tail}: {few}." in text
    assert f"`gpu`, of {len(CLAIMS)} claims: holds: 1; does not hold: 0; {tail}: {most}." in text
    assert "does not show at `small`" in text
    for verdicts in ((HOLDS, FAILS), (FAILS, HOLDS)):
        results = map(found, ("collapse", "order"), verdicts)
        assert "does not show" not in summary([*results])


def test_a_page_comes_from_its_results_alone(done, tmp_path, monkeypatch):
    monkeypatch.setattr("mvsplit.reproduce.page.SIZES", ("tiny",))
    result = json.loads((done / "tiny" / "timestep.json").read_text())
    keep_result(result, tmp_path)
    text = write_page(CLAIM, tmp_path).read_text()
    assert "**one seed: no figure here has a spread**" in text
    assert f"## tiny: {result['verdict']}" in text
    for condition in CLAIM.rule:
        assert f"| {condition.holds} | {condition.fails} | {condition.why} |" in text
    picture = (tmp_path / "timestep-tiny.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    write_page(CLAIM, tmp_path)
    assert (tmp_path / "timestep-tiny.png").read_bytes() == picture
    with pytest.raises(UserError, match="no result of front"):
        write_page(get_claim("front"), tmp_path)


def test_a_figure_says_its_spread_or_that_it_has_none():
    assert spelled({"0": 1.0, "1": 3.0}) == "2 ± 1.4 (1, 3)"
    assert spelled({"0": 1.5}) == "1.5 (no spread)"
    assert spelled({"0": 1.5, "1": None}) == "1.5, none (no spread)"


@pytest.mark.parametrize("path", sorted(PAGES.glob("results/*.json")), ids=lambda p: p.stem)
def test_what_is_kept_is_judged_by_todays_rule(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    claim = get_claim(result["claim"])
    assert result["verdict"] == again(result)
    assert result["rule_unchanged"] or result["changed"]
    assert result["rule"] == [condition.as_dict() for condition in claim.rule]
    page = (PAGES / f"{claim.name}.md").read_text(encoding="utf-8")
    assert page == page_text(claim, stored_results(claim, PAGES))
    for picture in re.findall(r"\((\S+\.png)\)", page):
        assert (PAGES / picture).exists()


def test_the_command_lists_and_refuses(capsys):
    for named in ([], ["all"], ["thousand", "front"]):
        assert main(["reproduce", "--list", *named]) == 0
        listed = capsys.readouterr().out
        heads = [line.partition(":")[0] for line in listed.splitlines() if line[0] != " "]
        assert heads == (named if len(named) == 2 else [*CLAIMS])
    for arguments, words in (
        ([], "name at least one"),
        (["--list", "fornt"], "did you mean front"),
        (["all", "fornt"], "did you mean front"),
        (["colapse"], "did you mean collapse"),
        (["collapse", "--draw"], "--pages FOLDER"),
        (["collapse", "--workers", "0"], "workers=0"),
        (["--again", "foo", "--draw", "front", "--pages", "x"], "--again has no effect with --dr"),
        (["--draw", "front", "--pages", "x", "--minutes", "5"], "--minutes has no effect"),
        (["--draw", "front", "--pages", "x", "--size", "gpu"], "--size has no effect"),
        (["--list", "--draw", "--pages", "x"], "with --list, which only lists; leave one of them"),
    ):
        assert main(["reproduce", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["-1", "0", "nan"])
def test_no_time_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: str
) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "front", "--minutes", minutes, "--out", str(out)]) == 2
    assert f"minutes={float(minutes):g}: nothing can be run" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("option", ["--out", "--pages"])
@pytest.mark.parametrize("below", ["", "in/it", "small"])
def test_a_folder_that_is_a_file_is_refused_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, below: str
) -> None:
    file = tmp_path / "a" if below != "small" else tmp_path / "small"
    file.touch()
    given = tmp_path if below == "small" else file / below
    if option == "--pages" and below == "small":
        file.rename(tmp_path / "results")
        file = tmp_path / "results"
    out = [] if option == "--out" else ["--out", str(tmp_path / "out")]
    assert main(["reproduce", "front", option, str(given), *out]) == 2
    said = capsys.readouterr().err
    assert said.splitlines() == [
        f"mvsplit: {option} {given}: {file} is a file; name a folder, there or to be made"
    ]
    assert not (tmp_path / "out").exists()
