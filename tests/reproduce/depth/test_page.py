"""Tables and page of the bench, on rows made by hand."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from mvsplit.errors import UserError
from mvsplit.reproduce.depth import page as module
from mvsplit.reproduce.depth.conclusion import in_short
from mvsplit.reproduce.depth.page import keep_rows, missing, verdict_words, write_page
from mvsplit.reproduce.depth.page_parts import best_table, collapse_table, figure, rate_table
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES, SIZES, BenchRun
from mvsplit.reproduce.depth.run import check_row
from mvsplit.reproduce.depth.table import (
    at_equal_time,
    cells,
    for_verdict,
    key,
    loss_at,
    seconds_alone,
    watch_count,
)
from tests.reproduce.depth.tiny import TINY, entry, row

PAGES = Path(__file__).parents[3] / "docs" / "experiments"
RULE = {"sha256": "x", "written": "2026-01-02T00:00:00+00:00"}


def seeds(name: str, losses, *, rate: float = 3.2e-3, depth: int = 2, **fields):
    """A sweep whose other rates are worse, and the seeds of one rate."""
    other = [r for r in TINY.rates if r != rate]
    worse = [row(r, max(losses) + 0.1, name=name, depth=depth, **fields) for r in other]
    each = [
        row(rate, loss, name=name, depth=depth, seed=s, **fields) for s, loss in enumerate(losses)
    ]
    return worse + each


def test_a_cell_holds_the_seeds_of_the_best_rate():
    rows = [*seeds("plain", [0.5, 0.6, 0.7]), row(1e-2, None, name="plain", seed=1)]
    (cell,) = cells(TINY, [entry("plain")], rows)
    assert (cell.rate, cell.losses, cell.swept) == (3.2e-3, [0.5, 0.6, 0.7], True)
    assert (cell.tried, cell.living) == ([1e-3, 3.2e-3, 1e-2], [1e-3, 3.2e-3])
    assert not cell.at_end


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_a_best_rate_beyond_which_nothing_was_tried_is_marked(rate):
    (cell,) = cells(TINY, [entry("keel")], seeds("keel", [0.4, 0.5, 0.6], rate=rate))
    assert cell.at_end
    (line,) = [x for x in best_table(2, TINY, [cell], {}) if x.startswith("| Keel")]
    assert f"| {rate:.2g} (3 tried, **best at an end**) | 0.5 ± 0.1 |" in line
    (left,) = [x for x in missing(TINY, [cell]) if "at an end of those tried" in x]
    assert left.startswith("- 2 layers, ")
    assert left.endswith(": Keel")
    beyond = row(rate * 3.2 if rate == 1e-2 else 3.2e-4, None, name="keel")
    (cell,) = cells(TINY, [entry("keel")], [*cell.rows, beyond])
    assert not cell.at_end


def test_runs_of_another_width_stand_in_the_table_of_shapes_alone(tmp_path):
    """Also those of a candidate, which lives at other rates there."""
    path = tmp_path / module.RESULTS / "gpu.json"
    path.parent.mkdir(parents=True)
    result = json.loads((PAGES / "results" / "depth-bench" / "gpu.json").read_text("utf-8"))
    wide = [each for each in result["rows"] if each["width"] != SIZES["gpu"].width]
    assert {"alpha", "alpha-standard", "standard"} < {each["entry"] for each in wide}
    texts = []
    for without in ([], wide):
        rows = [each for each in result["rows"] if each not in without]
        path.write_text(json.dumps(result | {"rows": rows}), encoding="utf-8")
        texts.append(write_page(tmp_path).read_text(encoding="utf-8"))
    for title in ("### Learning rates that live", "### 100 layers"):
        parts = [text.split(f"\n{title}\n")[1].partition("\n### ")[0] for text in texts]
        assert parts[0] == parts[1]
    assert "| 400 × 64 | 100 × 128 | 25 × 256 |" in texts[0]
    assert "| 400 × 64 | 100 × 128 | 25 × 256 |" not in texts[1]


def test_what_was_not_swept_whole_is_not_called_dead():
    dead = [row(rate, None, name="plain") for rate in TINY.rates]
    (whole,) = cells(TINY, [entry("plain")], dead)
    (half,) = cells(TINY, [entry("plain")], dead[:2])
    assert whole.losses == []
    assert half.losses is None


def test_a_figure_of_too_few_seeds_is_marked():
    assert figure([0.5], mark=True) == "0.5 (**1 seed**)"
    assert figure([0.4, 0.6], mark=True) == "0.5 ± 0.14 (**2 seeds**)"
    assert figure([0.4, 0.5, 0.6], mark=True) == "0.5 ± 0.1"
    assert figure([0.4, 0.6]) == "0.5 ± 0.14"
    assert figure([]) == "–"


TIMING = {
    "alone": {
        "mvsplit-root-2x16": 0.1,
        "mvsplit-root-3x16": 0.2,
        "keel-3x16": 0.3,  # half as much again as what runs as one node
    }
}


def test_seconds_of_an_entry_are_measured_or_by_its_measured_ratio():
    assert seconds_alone(TIMING, entry("plain"), 3, 16) == 0.2
    assert seconds_alone(TIMING, entry("keel"), 3, 16) == pytest.approx(0.3)
    assert seconds_alone(TIMING, entry("keel"), 2, 16) == pytest.approx(0.15)
    assert seconds_alone(TIMING, entry("plain"), 9, 16) is None
    assert seconds_alone({}, entry("plain"), 3, 16) is None


def test_equal_time_is_that_of_the_fastest():
    """20 steps of 0.2 s are 13 steps of 0.3 s: one whole window of ten."""
    rows = [
        *seeds("plain", [0.5], depth=3, curve=[0.9, 0.6]),
        *seeds("keel", [0.5], depth=3, curve=[0.8, 0.4]),
    ]
    found = cells(TINY, [entry("plain"), entry("keel")], rows)
    assert at_equal_time(found, TIMING) == {"plain-3x16": [0.6], "keel-3x16": [0.8]}
    assert [key(cell) for cell in found] == ["plain-3x16", "keel-3x16"]


def test_the_loss_at_a_step_is_that_of_the_last_whole_window():
    run = {"curve": [0.9, 0.6]}
    assert [loss_at(run, s) for s in (9, 10, 19, 20, 31)] == [None, 0.9, 0.9, 0.6, None]


def test_the_watch_is_counted_over_the_dead_and_the_living():
    alarm = {"level": "alarm", "verdict": "mean-mode", "step": 3, "alarms": 1, "warnings": 0}
    warning = {"level": "warning", "verdict": "x", "step": 3, "alarms": 0, "warnings": 1}
    rows = [
        *[row(1e-3, None, watch=alarm), row(3.2e-3, None, watch=warning)],
        *[row(1e-2, 0.5), row(1e-2, 0.5, watch=alarm), row(1e-2, 0.5, watch=warning)],
    ]
    count = watch_count(rows)
    assert (count.dead, count.dead_with_alarm) == (2, 1)
    assert (count.living, count.living_with_alarm) == (3, 1)
    assert watch_count([*rows, row(1e-2, 0.5, together=1)]) == replace(count, unseen=1)
    text = "\n".join(collapse_table([row(1e-3, None, watch=alarm, collapse_step=40), *rows]))
    assert "Of 3 runs that do not live the watch raised an alarm in 2" in text
    assert "| mvsplit-root-2x16-lr1.0e-03-seed0 | 40 | – | alarm mean-mode at step 3 |" in text


def test_the_verdict_is_the_rules_on_the_cells():
    rows = [
        row_
        for depth in TINY.depths
        for name, losses in (
            ("plain", [0.50, 0.51, 0.52]),
            ("mvsplit-root", [0.40, 0.41, 0.42]),
            ("mvsplit-1", [0.60, 0.61, 0.62]),
            ("hard-center", [0.1, 0.1, 0.1]),
        )
        for row_ in seeds(name, losses, depth=depth)
    ]
    found = cells(TINY, ENTRIES, rows)
    losses = for_verdict(found, TINY, ("rival",))
    assert losses[2] == {"plain": [0.50, 0.51, 0.52]}  # a control is no rival
    text = "\n".join(verdict_words(TINY, found))
    assert "at least as good as its rivals" in text
    words = "MV-Split β=1/√L takes the place of MV-Split β=1, nothing takes the place of"
    tail = "nothing takes the place of MV-Split α=β=1/√L, and nothing takes the place of MV-Split "
    tail += "α=β=1/√L, writers standard"
    assert f"**By this size alone {words} MV-Split β=1/√L, {tail}.**" in text
    default = "default, MV-Split α=β=1/√L, writers standard"
    assert f"{default}: at 2 layers nothing can be told; at 3 layers" in text
    assert "3 layers: the best rival is plain, the best setting MV-Split β=1/√L (ahead" in text
    shallow = cells(TINY, ENTRIES, [r for r in rows if r["depth"] < 4])
    text = "\n".join(verdict_words(TINY, shallow))
    assert "at least as good as its rivals (of 4 layers nothing is known).**" in text
    short = cells(TINY, ENTRIES, [r for r in rows if r["seed"] < 2])
    text = "\n".join(verdict_words(TINY, short))
    assert "**MV-Split against its rivals: cannot tell.**" in text
    assert "alone nothing takes the place of MV-Split β=1, nothing takes" in text


def test_a_depth_with_too_few_seeds_takes_the_verdict_away_and_what_it_was_is_shown():
    names = {"plain": 0.50, "mvsplit-root": 0.40, "mvsplit-1": 0.60}
    every = [
        row_
        for depth in (2, 3)
        for name, loss in names.items()
        for row_ in seeds(name, [loss, loss + 0.01, loss + 0.02], depth=depth)
    ]
    deep = [row(3.2e-3, 0.5 + s / 100, name="plain", depth=4, seed=s) for s in range(3)]
    deep += [row(3.2e-3, None, name="mvsplit-1", depth=4, seed=s) for s in range(3)]
    deep += [row(3.2e-3, 0.3, name="mvsplit-root", depth=4)]
    text = "\n".join(verdict_words(TINY, cells(TINY, ENTRIES, [*every, *deep])))
    assert "**MV-Split against its rivals: cannot tell.**" in text
    few = "no setting of MV-Split has 3 seeds that live"
    dead = "MV-Split β=1 has 3 at 0.0032, none lives"
    assert f"- 4 layers: the best rival is plain; {few}; {dead}; cannot tell\n" in text
    assert "alone nothing takes the place of MV-Split β=1, nothing takes the place" in text
    words = f"where {few} ({dead}), it would be: against its rivals, at"
    assert f"Were it not for 4 layers, {words} least as good as its rivals; by this size" in text
    assert text.count("MV-Split β=1/√L takes the place of MV-Split β=1, nothing") == 1
    assert "Were it not" not in "\n".join(verdict_words(TINY, cells(TINY, ENTRIES, every)))


def test_a_depth_at_which_every_setting_is_dead_is_never_left_out():
    rows = [*seeds("plain", [0.50, 0.51, 0.52]), *seeds("mvsplit-root", [0.40, 0.41, 0.42])]
    rows += seeds("plain", [0.50, 0.51, 0.52], depth=3)
    rows += [row(rate, None, depth=3) for rate in TINY.rates]
    text = "\n".join(verdict_words(TINY, cells(TINY, ENTRIES, rows)))
    assert "**MV-Split against its rivals: not as good as its rivals" in text
    told = "no setting of MV-Split has 3 seeds that live; all that can be told: MV-Split β=1/√L"
    assert f"- 3 layers: the best rival is plain; {told} behind\n" in text
    assert "Were it not" not in text
    open_ = [row(3.2e-3, 0.5, depth=4), *seeds("plain", [0.50, 0.51, 0.52], depth=4)]
    text = "\n".join(verdict_words(TINY, cells(TINY, ENTRIES, [*rows, *open_])))
    assert "Were it not for 4 layers, where" in text
    assert "it would be: against its rivals, not as good as its rivals" in text


def test_seeds_that_did_not_all_live_are_told_from_seeds_that_were_not_run():
    rows = [row(3.2e-3, None if s else 0.5, name="plain", seed=s) for s in range(3)]
    rows += [row(1e-2, 0.5 if s else None, name="mvsplit-1", seed=s) for s in range(3)]
    rows += [row(3.2e-3, 0.5, seed=s) for s in range(2)]
    text = "\n".join(verdict_words(TINY, cells(TINY, ENTRIES, rows)))
    few = "no rival and no setting of MV-Split has 3 seeds that live"
    dead = "plain has 3 at 0.0032, 1 lives; MV-Split β=1 has 3 at 0.01, 2 live"
    assert f"- 2 layers: {few}; {dead}; cannot tell\n" in text


def test_what_is_left_of_sweeps_is_said():
    found = cells(TINY, ENTRIES, [row(3.2e-3, None, name="keel", depth=3)])
    assert "- 3 layers, the sweep is not whole: Keel" in missing(TINY, found)


def test_settings_are_compared_with_todays_default():
    names = {"alpha": 0.50, "alpha-standard": 0.40, "standard": 0.51, "mvsplit-1": 0.70}
    rows = [row_ for name, loss in names.items() for row_ in seeds(name, [loss, loss + 0.01, loss])]
    text = "\n".join(verdict_words(TINY, cells(TINY, [entry(name) for name in names], rows)))
    words = "MV-Split α=β=1/√L behind, MV-Split β=1 behind, MV-Split β=1/√L, writers standard"
    assert f"MV-Split α=β=1/√L, writers standard: at 2 layers {words} behind.\n" in text
    assert "MV-Split α=β=1/√L, writers standard takes the place of MV-Split α=β=1/√L, and" in text
    assert "and nothing takes the place of MV-Split α=β=1/√L, writers standard (" in text


def test_a_table_shows_the_best_first_and_what_is_dead():
    rows = [
        *seeds("plain", [0.5, 0.6]),
        *seeds("mvsplit-root", [0.4]),
        *[row(rate, None, name="keel") for rate in TINY.rates],
    ]
    found = cells(TINY, ENTRIES, rows)
    lines = [line for line in best_table(2, TINY, found, {}) if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| MV-Split β=1/√L",
        "| plain",
        "| Keel",
    ]
    assert "0.4 (**1 seed**)" in lines[2]
    assert "0.55 ± 0.071 (**2 seeds**)" in lines[3]
    assert "nothing lives" in lines[4]
    assert best_table(4, TINY, found, {})[1] == "Not run.\n"
    (keel,) = [line for line in rate_table(TINY, found) if line.startswith("| Keel")]
    assert keel == "| Keel | – of 0.001 … 0.01 | not run | not run |"


def test_rows_are_added_to_what_is_kept_and_the_rule_keeps_its_date(tmp_path):
    keep_rows(TINY, RULE, [row(1e-3, 0.5), row(1e-2, 0.6)], tmp_path)
    later = RULE | {"written": "2026-03-01T00:00:00+00:00"}
    again = row(1e-2, 0.7, date="2026-03-01T00:00:00+00:00")
    path = keep_rows(TINY, later, [again, row(3.2e-3, 0.4)], tmp_path)
    kept = json.loads(path.read_text())
    assert kept["rule"] == RULE
    assert sorted(r["validation_loss"] for r in kept["rows"]) == [0.4, 0.5, 0.7]


@pytest.mark.parametrize("first", ["alone", "as one"])
def test_of_a_run_by_both_ways_the_one_alone_counts_and_both_are_shown(
    tmp_path, monkeypatch, first
):
    alone, as_one = row(1e-3, 0.5), row(1e-3, 0.51, together=12)
    for each in (alone, as_one) if first == "alone" else (as_one, alone):
        path = keep_rows(TINY, RULE, [each], tmp_path)
    other = [row(1e-3, 0.5, name=name, together=2) for name in ("alpha", "standard", "beta-4")]
    keep_rows(TINY, RULE, other, tmp_path)
    kept = json.loads(path.read_text())["rows"]
    assert [r["validation_loss"] for r in kept if r["entry"] == "mvsplit-root"] == [0.5]
    again = path.with_name(f"{TINY.name}-again.json")
    assert [r["validation_loss"] for r in json.loads(again.read_text())["rows"]] == [0.51]
    name = "mvsplit-1-20x16-lr3.2e-04-seed0"
    run = {"run": name, "curve": 1e-4, "validation_loss": 2e-4, "alike": True}
    gate = {"passed": True, "wanted": 1, "limit": 0.01, "steps": 40, "device": "cpu"}
    path.with_name(f"gate-{TINY.name}.json").write_text(json.dumps(gate | {"runs": [run]}))
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    text = write_page(tmp_path).read_text()
    assert "| mvsplit-root-2x16-lr1.0e-03-seed0 | 0.5 | 0.51 | +2.0% |" in text
    words = "It had no network that starts as MV-Split α=β=1/√L, MV-Split β=1/√L, writers standard."
    assert f"losses within 2.0e-04, where 0.01 is the limit: **passed**. {words}\n" in text


def dated(day: int, loss: float, **fields):
    return row(1e-3, loss, date=f"2026-02-0{day}T00:00:00+00:00", **fields)


MADE = {  # the rows of one run, the one that counts first
    "as one": [dated(3, 0.53, together=6), dated(2, 0.52, together=6), row(1e-3, 0.5, together=6)],
    "alone": [dated(3, 0.53), dated(2, 0.52), row(1e-3, 0.5)],
    "both": [row(1e-3, 0.5), dated(3, 0.53, together=6), dated(2, 0.52, together=6)],
}


@pytest.mark.parametrize("order", [*permutations(range(3))])
@pytest.mark.parametrize("way", [*MADE])
def test_the_row_made_last_counts_in_whatever_order_they_are_kept_and_none_is_lost(
    tmp_path, way, order
):
    made = MADE[way]
    for n in (*order, *order):  # the second time each is there already
        path = keep_rows(TINY, RULE, [made[n]], tmp_path)
    again = path.with_name(f"{TINY.name}-again.json")
    assert json.loads(path.read_text())["rows"] == made[:1]
    beside = json.loads(again.read_text())["rows"]
    assert sorted(each["validation_loss"] for each in beside) == sorted(
        each["validation_loss"] for each in made[1:]
    )


@pytest.mark.parametrize("way", [*MADE])
def test_every_row_of_a_run_stands_beside_the_one_that_counts(tmp_path, monkeypatch, way):
    made = MADE[way]
    keep_rows(TINY, RULE, made, tmp_path)
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    text = write_page(tmp_path).read_text()
    for other in made[1:]:
        losses = [each["validation_loss"] for each in (made[0], other)]
        words = f"{losses[0]:.4g} | {losses[1]:.4g} | {losses[1] / losses[0] - 1:+.1%} |"
        assert f"| mvsplit-root-2x16-lr1.0e-03-seed0 | {words}" in text
    titles = {"as one": "trained as one more than", "alone": "run alone more", "both": "both ways"}
    assert [way for way, words in titles.items() if words in text] == [way]
    assert ("A row without a date" in text) == (way != "both")


def test_of_two_rows_without_a_date_the_one_that_counts_stays_and_the_page_says_so(
    tmp_path, monkeypatch
):
    for loss in (0.5, 0.51, 0.51):  # the last is the same row, merged again
        path = keep_rows(TINY, RULE, [row(1e-3, loss, together=6)], tmp_path)
    again = path.with_name(f"{TINY.name}-again.json")
    for file, loss in ((path, 0.5), (again, 0.51)):
        assert [r["validation_loss"] for r in json.loads(file.read_text())["rows"]] == [loss]
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    text = write_page(tmp_path).read_text()
    assert "of two without, nothing says which is later, and what counts is left as it is." in text
    assert "| run | counts | beside it | apart |" in text


def test_a_page_comes_from_its_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIZES", {"tiny": TINY})
    with pytest.raises(UserError, match="holds no rows of the bench"):
        write_page(tmp_path)
    rows = seeds("plain", [0.5, 0.6]) + seeds("mvsplit-root", [0.4], depth=3)
    keep_rows(TINY, RULE, rows, tmp_path)
    timing = TIMING | {"device": "cpu", "torch": "2", "steps": 3, "side_by_side": {}}
    (tmp_path / module.RESULTS / "timing-tiny.json").write_text(json.dumps(timing))
    text = write_page(tmp_path).read_text()
    assert "**and changed since**" in text  # the rule is not today's
    assert "3 layers, not run: plain," in text
    for name in ("best", "rates", "seconds"):
        picture = (tmp_path / f"depth-bench-tiny-{name}.png").read_bytes()
        assert picture[:4] == b"\x89PNG"
        assert f"](depth-bench-tiny-{name}.png)" in text
        write_page(tmp_path)
        assert (tmp_path / f"depth-bench-tiny-{name}.png").read_bytes() == picture


@pytest.mark.parametrize("name", [*SIZES])
def test_the_rows_of_the_repository_are_of_the_runs_that_the_bench_would_run(name, tmp_path):
    path = PAGES / module.RESULTS / f"{name}.json"
    for row_ in json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []:
        shape = {field: row_[field] for field in ("depth", "width", "rate", "seed")}
        check_row(BenchRun(entry=entry(row_["entry"]), **shape), SIZES[name], row_, tmp_path)


@pytest.mark.parametrize("name", [*SIZES])
def test_rows_of_the_repository_that_are_kept_again_change_nothing(name, tmp_path):
    paths = [PAGES / module.RESULTS / f"{name}{end}.json" for end in ("", module.AGAIN)]
    paths = [path for path in paths if path.exists()]
    (tmp_path / module.RESULTS).mkdir(parents=True)
    for path in paths:
        (tmp_path / module.RESULTS / path.name).write_bytes(path.read_bytes())
    for path in paths:
        result = json.loads(path.read_text("utf-8"))
        keep_rows(SIZES[name], result["rule"], result["rows"], tmp_path)
    for path in paths:
        assert (tmp_path / module.RESULTS / path.name).read_bytes() == path.read_bytes()


def test_the_page_of_the_repository_is_drawn_from_its_rows(tmp_path):
    (tmp_path / module.RESULTS).mkdir(parents=True)
    for path in (PAGES / module.RESULTS).glob("*.json"):
        (tmp_path / module.RESULTS / path.name).write_bytes(path.read_bytes())
    assert write_page(tmp_path).read_text() == (PAGES / "depth-bench.md").read_text()


def test_the_conclusion_says_what_to_use_and_how_sure_that_is():
    rows = [
        *seeds("alpha-standard", [0.40, 0.41, 0.42]),
        *seeds("keel", [0.50, 0.51, 0.52]),
        *seeds("plain", [0.60, 0.61, 0.62]),
        *seeds("alpha-standard", [0.30, 0.50, 0.60], depth=3),
        *seeds("keel", [0.40, 0.41, 0.42], depth=3),
        *seeds("keel", [0.40, 0.41, 0.42], depth=4),
    ]
    text = "\n".join(in_short([(TINY, cells(TINY, [*ENTRIES, *CANDIDATES], rows))]))
    ours = "MV-Split α=β=1/√L, writers standard"
    assert f"| 2 (tiny) | {ours}, 0.41 ± 0.01 | 3 | none | ahead |" in text
    assert f"| 3 (tiny) | Keel, 0.41 ± 0.01 | 3 | {ours} (3) | cannot tell |" in text
    lone = "nothing else has 3 seeds that live | cannot tell (0 seeds) |"
    assert f"| 4 (tiny) | Keel, 0.41 ± 0.01 | 3 | {lone}" in text
    assert f"best at every depth, and ahead of all others with 3 seeds: at 2 {ours}." in text
    assert "ahead at 2, cannot tell at 3 and 4, behind it nowhere that can be told." in text
    assert "3 seeds or more: Keel (none is ahead of it at 3 and 4)." in text


def test_depths_of_two_sizes_are_told_apart_by_their_steps():
    rows = [*seeds("alpha-standard", [0.40, 0.41, 0.42]), *seeds("keel", [0.50, 0.51, 0.52])]
    found = cells(TINY, [*ENTRIES, *CANDIDATES], rows)
    longer = replace(TINY, name="longer", steps=70)
    text = "\n".join(in_short([(TINY, found), (longer, found)]))
    ours = "MV-Split α=β=1/√L, writers standard"
    sure = f"at 2 {ours} and 2 after 70 steps {ours}"
    assert f"ahead of all others with 3 seeds: {sure}." in text
    assert "ahead at 2 and 2 after 70 steps, behind it nowhere" in text
    assert "| 2 (longer) |" in text


def test_it_is_said_what_of_ensembles_a_row_has(tmp_path):
    """Memory of the largest at the width of the size, of those that kept all that backward needs,
    which have dates."""

    def one(depth: int, count: int, peak: float | None, **fields):
        dated = {"date": "2026-01-03"} | fields
        return row(1e-3, 0.5, depth=depth, together=count, peak_gib_together=peak, **dated)

    rows = [
        one(2, 4, 8.0, seed=0, tasks={"geneval_mean": 0.1}),
        one(2, 2, 5.0, seed=1),
        one(2, 9, None, seed=2),
        one(3, 3, 12.0, seed=0),
        one(3, 8, 99.0, seed=1, width=32),
        row(1e-3, None, depth=3, seed=2, together=7, peak_gib_together=1.0),
        row(1e-3, 0.5, depth=4),
    ]
    keep_rows(replace(TINY, name="gpu"), RULE, rows, tmp_path)
    path = tmp_path / module.RESULTS / "gpu.json"
    words = module._together(json.loads(path.read_text())["rows"], TINY)
    assert words.startswith(" 6 of them were trained as one network with others, up to 9 at a time")
    memory = "memory: 2 GiB at 2 layers, 4 at a time; 4 GiB at 3 layers, 3 at a time."
    assert memory in words
    assert words.endswith(" 4 of these that live have no task scores.")
    assert module._together([row(1e-3, 0.5)], TINY) == ""
