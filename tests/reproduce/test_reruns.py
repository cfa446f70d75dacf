"""The same runs again: what stays beside a result, and what a page says of it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvsplit.cli import main
from mvsplit.errors import UserError
from mvsplit.reproduce import Study, get_claim
from mvsplit.reproduce.page import keep_result, page_text, stored_results, write_index
from mvsplit.reproduce.reruns import AGAIN, CHANGED, OTHERS, RUNS
from mvsplit.reproduce.rule import Figure, judge

PAGES = Path(__file__).parents[2] / "docs" / "experiments"
FRONT = get_claim("front")
CROSSED = "standard writers: share of the depth that the front crosses"
LATER = "2030-01-02"


@pytest.fixture
def result() -> dict[str, Any]:
    """A stored one without reruns."""
    (found,) = [r for r in stored_results(FRONT, PAGES) if r["size"] == "small"]
    for key in (AGAIN, CHANGED, OTHERS):
        found.pop(key, None)
    found["figures"][CROSSED]["values"] = {"0": 0.4, "1": 0.3}
    return found


def changed(result: dict[str, Any], **values: float) -> dict[str, Any]:
    """Another run of it, with another end of the front: `seed1=0.1`."""
    other = copy.deepcopy(result)
    other["date"] = LATER
    other["rule_written"] = "2030-01-01T00:00:00+00:00"
    other["environment"]["revision"] = "f" * 40
    for seed, value in values.items():
        other["figures"][CROSSED]["values"][seed.removeprefix("seed")] = value
    return other


def longer(result: dict[str, Any], **values: float) -> dict[str, Any]:
    """A later result, of runs of ten steps more."""
    other = changed(result, **values)
    for row in other["runs"]:
        row["steps"] += 10
    return other


def kept(folder: Path) -> dict[str, Any]:
    (found,) = stored_results(FRONT, folder)
    return found


def test_an_earlier_version_stays_beside_the_one_that_takes_its_place(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(changed(result, seed1=0.1), tmp_path)
    now = kept(tmp_path)
    assert now["date"] == LATER
    assert now["rule_written"] == result["rule_written"]  # the same rule, so its first date
    (before,) = now[AGAIN]
    assert before["values"][CROSSED] == {"0": 0.4, "1": 0.3}
    assert before["environment"] == result["environment"]
    keep_result(changed(result, seed1=0.1), tmp_path)  # the same once more is no other rerun
    assert kept(tmp_path) == now
    third = changed(result, seed1=0.2)
    keep_result(third, tmp_path)
    ends = [each["values"][CROSSED]["1"] for each in kept(tmp_path)[AGAIN]]
    assert ends == [0.1, 0.3]


def test_a_rule_that_was_changed_has_its_own_date(result, tmp_path):
    keep_result(result, tmp_path)
    other = changed(result)
    other["rule"][0]["why"] = "because"
    keep_result(other, tmp_path)
    now = kept(tmp_path)
    assert now["rule_written"] == other["rule_written"]
    # A fresh folder of runs knows of no other rule; the record that it judged does.
    (before,) = now[CHANGED]
    assert (before["verdict"], before["rule"]) == (result["verdict"], result["rule"])
    words = f"**The rule has changed since the record of {result['date']}**, of which it said: *"
    row = f"Rows with other bounds or another reason: {result['rule'][0]['figure']}."
    assert words in page_text(FRONT, [now])
    assert row in page_text(FRONT, [now])
    assert "by the rule before" not in write_index(tmp_path).read_text(encoding="utf-8")
    now["verdict"] = "does not hold"
    path = tmp_path / "results" / "front-small.json"
    path.write_text(json.dumps(now), encoding="utf-8")
    assert f"; by the rule before: {result['verdict']})" in write_index(tmp_path).read_text(
        encoding="utf-8"
    )
    keep_result(other | {"date": "2030-01-03"}, tmp_path)  # the same rule once more
    assert kept(tmp_path)[CHANGED] == [before]


def test_a_rule_whose_figures_are_measured_otherwise_has_changed(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(changed(result) | {"measure_sha256": "a"}, tmp_path)
    assert CHANGED not in kept(tmp_path)  # of the first the bounds alone are known
    keep_result(changed(result) | {"measure_sha256": "b"}, tmp_path)
    text = page_text(FRONT, [kept(tmp_path)])
    assert "Rows as they were, but of figures that were measured otherwise." in text


def test_a_rerun_takes_the_place_of_none_but_its_own_name(result, tmp_path):
    with pytest.raises(UserError, match="nothing could be run again"):
        keep_result(result, tmp_path, "elsewhere")
    keep_result(result, tmp_path)
    keep_result(changed(result, seed1=0.2), tmp_path, "elsewhere")
    keep_result(changed(result, seed0=0.35), tmp_path, "other kernels")
    keep_result(changed(result, seed1=0.1), tmp_path, "elsewhere")
    now = kept(tmp_path)
    assert [each["words"] for each in now[AGAIN]] == ["other kernels", "elsewhere"]
    now.pop(AGAIN)
    assert now == result


def test_of_runs_with_other_looks_nothing_is_said_about_noise(result, tmp_path):
    keep_result(result, tmp_path)
    other = changed(result, seed1=0.1)
    for row in other["runs"]:
        row["look_every"] = 2
    keep_result(other, tmp_path)
    text = page_text(FRONT, [kept(tmp_path)])
    assert "- an earlier record, with other looks, " in text
    assert "understates the noise" not in text
    keep_result(changed(other, seed1=0.5), tmp_path, "elsewhere")
    text = page_text(FRONT, [kept(tmp_path)])
    assert f"move by more than they spread over seeds: {CROSSED}" in text


def test_runs_that_were_trained_as_one_are_told(result, tmp_path):
    keep_result(result, tmp_path)
    other = changed(result, seed1=0.2)
    for row in other["runs"]:
        row["together"] = 4
    keep_result(other, tmp_path, "elsewhere")
    assert ", 4 runs trained as one: " in page_text(FRONT, [kept(tmp_path)])
    keep_result(other, tmp_path)
    assert page_text(FRONT, [kept(tmp_path)]).count("| 4 | finished |") == len(other["runs"])


def test_other_runs_are_no_rerun(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(changed(result, seed1=0.2), tmp_path, "elsewhere")
    other = changed(result, seed1=0.1)
    other["runs"][0]["steps"] += 1
    with pytest.raises(UserError, match="again='far away': the runs of front are other ones"):
        keep_result(other, tmp_path, "far away")
    keep_result(other, tmp_path)
    assert AGAIN not in kept(tmp_path)
    assert kept(tmp_path)["runs"] == other["runs"]
    slower = copy.deepcopy(other)
    slower["date"] = "2030-01-03"
    slower["runs"][0] |= {"seconds": 1e4, "together": 1}  # how it went, not what it was
    keep_result(slower, tmp_path)
    assert [each["date"] for each in kept(tmp_path)[AGAIN]] == [LATER]


def test_a_record_of_other_runs_is_kept_with_all_that_it_said(result, tmp_path):
    keep_result(result | {"verdict": "does not hold"}, tmp_path)
    again = changed(result, seed1=0.2) | {"verdict": "holds"}
    for row in again["runs"]:
        row["look_every"] = 2
    keep_result(again, tmp_path)
    now = longer(again, seed1=0.1) | {"verdict": "cannot tell at this scale", "date": "2030-02-02"}
    keep_result(now, tmp_path)
    steps = result["runs"][0]["steps"]
    first, second = kept(tmp_path)[OTHERS]  # the oldest first
    for each, other in ((first, result), (second, again)):
        assert each[RUNS] == f"runs of {steps} steps"
        assert each["values"][CROSSED] == other["figures"][CROSSED]["values"]
        assert (each["date"], each["environment"]) == (other["date"], other["environment"])
    assert first["verdict"] == "does not hold"
    assert second["verdict"] == "holds"
    assert (first["reasons"], second["reasons"]) == (None, result["reasons"])  # of a rerun, figures
    text = page_text(FRONT, [kept(tmp_path)])
    names = [
        f"runs of {steps} steps, an earlier record, with other looks",
        f"runs of {steps} steps",
    ]
    assert f"- {names[0]}, {result['date']}, revision " in text
    assert f"- {names[1]}, {LATER}, revision fffffff, torch" in text
    assert f"| figure (by seed) | above | {names[0]} | {names[1]} |" in text
    assert f"| {CROSSED} | 0.4, 0.1 | 0.4, 0.3 | 0.4, 0.2 |" in text
    assert "The same runs again" not in text
    index = write_index(tmp_path).read_text(encoding="utf-8")
    then = f"runs of {steps} steps"
    assert f"(2 seeds; {then}: does not hold; {then}: holds)" in index
    keep_result(now, tmp_path)  # once more is nothing new
    assert kept(tmp_path)[OTHERS] == [first, second]
    keep_result(longer(now, seed1=0.15) | {"date": "2030-03-03"}, tmp_path)
    *older, newest = kept(tmp_path)[OTHERS]
    assert older == [first, second]
    assert (newest[RUNS], newest["values"][CROSSED]["1"]) == (f"runs of {steps + 10} steps", 0.1)


def test_a_verdict_of_other_runs_that_is_the_same_stands_on_the_page_alone(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(longer(result), tmp_path)
    assert "runs of" not in write_index(tmp_path).read_text(encoding="utf-8")
    assert "### Earlier, of other runs" in page_text(FRONT, [kept(tmp_path)])


def test_where_runs_and_rule_are_other_ones_the_record_is_kept_once(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(changed(result, seed1=0.2), tmp_path, "elsewhere")
    other = longer(result) | {"verdict": "does not hold"}
    other["rule"][0]["why"] = "because"
    keep_result(other, tmp_path)
    now = kept(tmp_path)
    (before,) = now[CHANGED]
    assert before[RUNS] == f"runs of {result['runs'][0]['steps']} steps"
    assert [each["words"] for each in now[OTHERS]] == ["elsewhere"]
    text = page_text(FRONT, [now])
    assert f" It was of {before[RUNS]}." in text
    assert f": {result['verdict']}, by the rule before\n" in text
    index = write_index(tmp_path).read_text(encoding="utf-8")
    words = f"{before[RUNS]}, by the rule before: {result['verdict']}"
    assert f"; by the rule before: {result['verdict']}; {words})" in index


def test_a_rule_that_changed_before_says_of_what_runs_its_record_was(result, tmp_path):
    keep_result(result, tmp_path)
    other = changed(result) | {"date": result["date"], "environment": result["environment"]}
    other["rule"][0]["why"] = "because"
    keep_result(other, tmp_path)
    assert "The runs are those of that record." in page_text(FRONT, [kept(tmp_path)])
    keep_result(longer(other) | {"date": result["date"]}, tmp_path)
    text = page_text(FRONT, [kept(tmp_path)])
    assert "The runs are those of that record." not in text
    assert f"It was of runs of {result['runs'][0]['steps']} steps." in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [row | {"lr": 1e-3} for row in rows], "runs of a rate of 0.004"),
        (lambda rows: [row | {"depth": 9, "width": 8} for row in rows], "runs of 64 layers, width"),
        (lambda rows: rows[:-1], "runs of seeds 0 and 1"),
        (
            lambda rows: [row for row in rows if row["label"] != "zero writers"],
            "runs of the networks standard writers and zero writers, seeds 0 and 1",
        ),
        (lambda rows: [row | {"batch": 3} for row in rows], "runs of batch None"),
    ],
)
def test_in_what_runs_were_other_ones_is_said(result, tmp_path, change, words):
    for row in result["runs"]:
        row |= {"lr": 4e-3, "depth": 64}
    keep_result(result, tmp_path)
    other = changed(result)
    other["runs"] = change(other["runs"])
    keep_result(other, tmp_path)
    (then,) = kept(tmp_path)[OTHERS]
    assert then[RUNS].startswith(words)


def test_the_page_says_by_how_much_a_figure_moves(result, tmp_path):
    keep_result(result, tmp_path)
    assert "The same runs again" not in page_text(FRONT, [kept(tmp_path)])
    keep_result(changed(result, seed0=0.35), tmp_path, "other kernels")
    keep_result(changed(result, seed1=0.1), tmp_path, "elsewhere")
    text = page_text(FRONT, [kept(tmp_path)])
    count = len(result["figures"])
    assert f"- elsewhere, {LATER}, revision fffffff, torch" in text
    assert text.count(f"{count - 1} of {count} figures are the same to four digits") == 2
    assert f"| {CROSSED} | 0.4, 0.3 | 0.35, 0.3 | 0.4, 0.1 | 0.2 | 0.071 |" in text


def test_where_figures_have_their_spread_the_page_says_which_move_by_more(result, tmp_path):
    def text(now: float, again: float) -> str:
        keep_result(changed(result, seed0=now), tmp_path)
        keep_result(changed(result, seed0=again), tmp_path, "elsewhere")
        found = page_text(FRONT, [kept(tmp_path)])
        (tmp_path / "results" / "front-small.json").unlink()
        return found

    words = "**The ± understates the noise.** With the same seeds, run again (below), these figures"
    more = f"{words} move by more than they spread over seeds: {CROSSED}"
    # Over seeds 0.5 and 0.3 spread by 0.141, 0.3 and 0.3 by nothing.
    assert f"{more} (2.83 times the spread)." in text(0.5, 0.1)
    assert f"{more} (the spread is 0)." in text(0.3, 0.29)
    none = "With the same seeds no figure moves by more (below) than its spread over seeds."
    within, still = text(0.5, 0.4), text(0.5, 0.5)
    assert none in within
    assert words not in within
    assert none not in still
    assert words not in still
    assert text(0.5, 0.1).index(words) < text(0.5, 0.1).index("### The same runs again")


def test_of_one_seed_the_page_says_that_figures_move_and_have_no_spread(result, tmp_path):
    for values in (result, again := changed(result, seed0=0.1)):
        for figure in values["figures"].values():
            figure["values"] = {"0": figure["values"]["0"]}
    keep_result(result, tmp_path)
    keep_result(again, tmp_path, "elsewhere")
    words = "Figures move with the same seed as well (below), and there is no spread over seeds."
    assert words in page_text(FRONT, [kept(tmp_path)])


@pytest.mark.parametrize("path", sorted(PAGES.glob("results/*.json")), ids=lambda p: p.stem)
def test_pages_of_the_repository_say_which_figures_move_by_more_than_their_spread(path):
    """Counted here by another way than the page's."""
    result = json.loads(path.read_text(encoding="utf-8"))
    page = (PAGES / f"{result['claim']}.md").read_text(encoding="utf-8")
    (found,) = [*re.findall(r"^\*\*The ± understates the noise.*$", page, re.M), ""][:1]
    for name, figure in result["figures"].items():
        values = np.array([[*figure["values"].values()]], float)
        again = [
            [*each["values"].get(name, {}).values()]
            for each in result.get(AGAIN, [])
            if "with other looks" not in each["words"]
        ]
        others = np.array([each for each in again if each], float)
        if values.size < 2 or not others.size:
            continue
        more = np.nanmax(abs(others - values), initial=0.0) > np.nanstd(values, ddof=1)
        assert (f" {name} (" in found) == more, name


def test_where_nothing_moves_the_page_says_so_without_a_table(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(changed(result), tmp_path, "elsewhere")
    text = page_text(FRONT, [kept(tmp_path)])
    count = len(result["figures"])
    assert f"{count} of {count} figures are the same to four digits" in text
    assert "moves by at most" not in text


def test_another_verdict_of_a_rerun_stands_in_the_index(result, tmp_path):
    keep_result(result, tmp_path)
    keep_result(changed(result, seed1=0.1), tmp_path, "elsewhere")
    assert "run again" not in write_index(tmp_path).read_text(encoding="utf-8")
    other = changed(result, seed1=0.1)
    other["verdict"] = "cannot tell at this scale"
    keep_result(other, tmp_path, "elsewhere")
    words = f"{result['verdict']} (2 seeds; run again: cannot tell at this scale)"
    assert words in write_index(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(PAGES.glob("results/*.json")), ids=lambda p: p.stem)
def test_the_verdicts_of_kept_reruns_are_those_of_the_rule(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    others = [each for each in result.get(OTHERS, []) if each["rule"] == result["rule"]]
    for each in [*result.get(AGAIN, []), *others]:
        figures = [Figure(name=n, words="", values=v) for n, v in each["values"].items()]
        assert each["verdict"] == judge(get_claim(result["claim"]).rule, figures).verdict


def test_the_command_refuses_a_rerun_that_is_kept_nowhere(capsys):
    assert main(["reproduce", "front", "--again", "elsewhere"]) == 2
    assert "--pages FOLDER" in capsys.readouterr().err


def test_a_rerun_of_nothing_is_refused_before_anything_is_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Study, "run", lambda *given, **how: pytest.fail("it began"))
    again = ["--again", "elsewhere", "--pages", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["reproduce", "front", *again]) == 2
    assert "front-small.json is not there" in capsys.readouterr().err
