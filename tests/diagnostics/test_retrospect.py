"""What is known of a step from the logs of a monitor alone."""

from __future__ import annotations

import json
import math

import pytest

from mvsplit.diagnostics.retrospect import is_watched_elsewhere, look_back
from mvsplit.errors import UserError

WATCHING = {"event": "watching", "step": 0, "level": "info", "message": "watching 2 layers of Net"}


def write(folder, name, lines):
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def metrics(steps, **at):
    """Calm but for the gradient norms that `at` gives, by s and the step."""
    norms = {s: 1.0 + 0.1 * (s % 3) for s in steps}
    norms |= {int(name[1:]): value for name, value in at.items()}
    return [{"step": s, "loss": 2.0, "grad_norm": norm} for s, norm in norms.items()]


def verdict(step, level, name="mean-mode", **evidence):
    event = {"event": "watch", "step": step, "level": level, "verdict": name, "layer": 1}
    return event | {"message": f"{level} at {step}", "evidence": evidence}


def test_the_first_of_the_gravest_verdicts_beside_the_usual_numbers(tmp_path):
    said = [verdict(30, "warning"), verdict(35, "alarm", grad="NaN"), verdict(38, "alarm")]
    write(tmp_path, "events", [WATCHING, *said])
    write(tmp_path, "metrics", metrics(range(1, 41), s35=50.0, s40=7.0))
    looks = [{"step": s, "layer": [0, 1], "tcs": [0.1, 0.5]} for s in (1, 8, 33, 40)]
    write(tmp_path, "layers", looks)
    found = look_back(tmp_path)
    assert (found.step, found.chosen, found.watching) == (
        35,
        "its first alarm",
        WATCHING["message"],
    )
    assert [event.step for event in found.events] == [30, 35, 38]
    assert math.isnan(found.events[1].evidence["grad"])
    norm = found.numbers["grad_norm"]
    assert (norm.value, norm.usual, norm.last) == (50.0, 1.1, 7.0)
    assert norm.times == pytest.approx(50 / 1.1)
    assert (found.look, found.looks) == (looks[2], 4)
    assert (found.first, found.last, found.lines, found.left_out) == (1, 40, 40, {})


def test_without_a_verdict_it_is_the_most_unusual_gradient(tmp_path):
    write(tmp_path, "events", [WATCHING])
    write(tmp_path, "metrics", metrics(range(1, 41), s20=3.0))
    found = look_back(tmp_path)
    assert (found.step, found.look, found.events) == (20, None, [])
    assert look_back(tmp_path, 7).step == 7


def test_a_step_of_which_no_numbers_are_there_is_not_chosen(tmp_path):
    write(tmp_path, "events", [WATCHING, verdict(30, "alarm"), verdict(3, "warning")])
    write(tmp_path, "metrics", metrics(range(1, 9), s6=4.0))
    found = look_back(tmp_path)
    assert (found.step, found.chosen) == (3, "its first warning of which the numbers are there")
    (tmp_path / "events.jsonl").unlink()
    foreign = verdict(3, "alarm", grad="much")  # no verdict of a monitor
    write(tmp_path, "events", [WATCHING, verdict(30, "alarm"), foreign])
    found = look_back(tmp_path)
    assert [event.step for event in found.events] == [30]
    chosen = "chosen by its gradient norm, for no line has the step of a verdict"
    assert (found.step, found.chosen) == (6, chosen)


def test_without_verdicts_and_gradient_norms_it_is_the_last(tmp_path):
    write(tmp_path, "events", [WATCHING])
    write(tmp_path, "metrics", [{"step": s, "loss": 1.0} for s in range(1, 9)])
    found = look_back(tmp_path)
    assert (found.step, found.chosen) == (
        8,
        "the last, for there is no verdict and no gradient norm",
    )


def test_a_later_watch_in_the_folder_takes_the_place_of_the_earlier(tmp_path):
    write(tmp_path, "events", [WATCHING, verdict(35, "alarm"), WATCHING, verdict(12, "warning")])
    write(tmp_path, "metrics", metrics(range(1, 41)) + metrics(range(1, 21)))
    found = look_back(tmp_path)
    assert ([e.step for e in found.events], found.last, found.lines) == ([12], 20, 20)
    assert found.runs == 2
    with pytest.raises(UserError, match=r"steps 1 to 20; 2 runs in this folder; showing the last"):
        look_back(tmp_path, 35)
    assert found.left_out == {
        "events.jsonl": "1 of an earlier watch in this folder",
        "metrics.jsonl": "40 of an earlier watch in this folder",
    }


def test_a_watch_that_went_on_keeps_what_was_said_before(tmp_path):
    on = WATCHING | {"step": 30}
    write(tmp_path, "events", [WATCHING, verdict(25, "alarm"), verdict(35, "alarm"), on])
    write(tmp_path, "metrics", metrics(range(1, 41)) + metrics(range(31, 51)))
    found = look_back(tmp_path)
    assert ([e.step for e in found.events], found.step) == ([25], 25)
    assert (found.first, found.last, found.lines, found.runs) == (1, 50, 50, 1)


def test_a_line_that_was_cut_off_is_counted(tmp_path):
    write(tmp_path, "events", [WATCHING])
    write(tmp_path, "metrics", metrics(range(1, 5)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert look_back(tmp_path).left_out == {"metrics.jsonl": "cut short at the end (1)"}


def test_what_is_no_log_of_a_monitor(tmp_path):
    write(tmp_path, "events", [WATCHING])
    write(tmp_path, "metrics", [])
    with pytest.raises(UserError, match=r"no step; call monitor\.step\(\) once a step"):
        look_back(tmp_path)
    write(tmp_path, "metrics", metrics(range(1, 5)))
    with pytest.raises(UserError, match=r"step=9: .* has the steps 1 to 4"):
        look_back(tmp_path, 9)
    (tmp_path / "events.jsonl").write_text('{"event": "note", "step": 1}\n')
    with pytest.raises(UserError, match=r"mvsplit monitor replay .* judges its logs now"):
        look_back(tmp_path)


@pytest.mark.parametrize(
    ("config", "elsewhere"),
    [
        (None, True),
        ('{"architectures": ["Llama"], "model": "llama"}', True),  # of another program
        ('{"model": {}, "train": {}, "data": {}}', False),
        ('{"model": {}, "tr', False),  # damaged: reading it says so
    ],
)
def test_a_run_of_ours_is_told_from_a_folder_of_a_monitor(tmp_path, config, elsewhere):
    assert not is_watched_elsewhere(tmp_path)
    write(tmp_path, "events", [WATCHING])
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert is_watched_elsewhere(tmp_path) is elsewhere
