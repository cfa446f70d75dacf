"""The demo from end to end on twins of four layers; the real one differs in size only."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from mvsplit.cli import demo, main
from mvsplit.errors import UserError
from mvsplit.evaluation import twins as evaluation
from mvsplit.evaluation.twins import DRAWN, draw, examine
from mvsplit.presets import get_preset


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--steps", "9", "--depth", "4", "--runs", str(folder / "runs")]
    assert main(["demo", *arguments, "--out", str(folder)]) == 0
    return folder


def test_leaves_picture_report_and_numbers(out):
    with Image.open(out / "demo.png") as picture:
        colours = len(set(picture.convert("RGB").resize((200, 120)).getdata()))
    assert colours > 50, "the picture is nearly empty"
    twins = json.loads((out / "demo.json").read_text())["twins"]
    assert {name: twin["steps"] for name, twin in twins.items()} == {"plain": 9, "mvsplit": 9}
    losses = [json.loads(line)["loss"] for line in (out / "runs/plain/metrics.jsonl").open()]
    assert twins["plain"]["first_loss"] == pytest.approx(losses[0], abs=1e-4)
    assert twins["plain"]["last_loss"] == pytest.approx(sum(losses) / 9, abs=1e-4)
    page = (out / "report.html").read_text()
    assert "mvsplit" in page
    assert "plain" in page


def test_twins_share_everything_but_the_rule(out):
    plain, mvsplit = (
        json.loads((out / "runs" / name / "config.json").read_text()) for name in demo.TWINS
    )
    assert plain["model"].pop("rule")["name"] == "plain"
    assert mvsplit["model"].pop("rule")["name"] == "mvsplit"
    assert plain == mvsplit
    first = [
        json.loads((out / "runs" / name / "metrics.jsonl").open().readline())["loss"]
        for name in demo.TWINS
    ]
    assert first[0] == first[1], "writers start at zero, so the first loss is the same"


def test_the_failure_of_a_twin_is_said(tmp_path):
    (tmp_path / "runs" / "plain").mkdir(parents=True)
    (tmp_path / "runs" / "plain" / "config.json").write_text("{}")
    arguments = demo.Arguments(steps=2, depth=2, runs=tmp_path / "runs", out=tmp_path)
    with pytest.raises(UserError, match=r"the plain twin stopped: .*config\.json"):
        demo.run(arguments)


def wait_for_steps(logs, count):
    deadline = time.monotonic() + 240
    while not all(log.exists() and log.read_bytes().count(b"\n") >= count for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_lets_both_twins_finish_their_step_and_save(tmp_path):
    arguments = ["--steps", "100000", "--depth", "2", "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "mvsplit", "demo", *arguments, "--out", str(tmp_path)]
    logs = [tmp_path / "runs" / name / "metrics.jsonl" for name in demo.TWINS]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            wait_for_steps(logs, 3)
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
        assert process.wait(120) == 130
        assert process.stderr.read() == "mvsplit: interrupted\n"
    for log in logs:
        last = json.loads((log.parent / "events.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "interrupted"
        assert (log.parent / "checkpoints" / f"step_{last['step']:08d}").is_dir()


def test_every_layer_is_looked_into_in_a_short_run_too(out):
    assert get_preset("digits-400l-mvsplit").train.probe_every > 9
    (line,) = (out / "runs" / "mvsplit" / "layers.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 9


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_no_time_is_refused_before_anything_is_made(tmp_path, capsys, minutes):
    arguments = ["--minutes", minutes, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main(["demo", *arguments]) == 2
    assert f"minutes={minutes}: must be greater than 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["model.depth", "train.steps"])
def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, capsys, option):
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main(["demo", f"--{option.partition('.')[2]}", "0", *places]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"mvsplit: {option}=0: must be at least 1\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--runs", "--out"])
def test_a_place_that_cannot_be_made_is_one_line(tmp_path, capsys, option):
    (tmp_path / "file").write_text("")
    places = {"--runs": tmp_path / "runs", "--out": tmp_path, option: tmp_path / "file" / "x"}
    assert main(["demo", *(str(word) for pair in places.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert "Not a directory; choose another --runs or --out" in error
    assert error.startswith("mvsplit: cannot create ")


def test_a_run_without_probes_is_one_line(tmp_path):
    run = tmp_path / "run"
    assert main(["train", "tiny", "--run-dir", str(run), "--steps", "1"]) == 0
    with pytest.raises(UserError, match="has no probe of its layers yet"):
        examine(run, torch.zeros(DRAWN, 1, 8, 8))


def test_a_hundred_digits_are_the_same_in_two_parts(out):
    run = out / "runs" / "mvsplit"
    whole = draw(run, slice(0, 20))
    parts = torch.cat((draw(run, slice(0, 10)), draw(run, slice(10, 20))))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert whole.std() > 0.1, "nothing is drawn"


def test_a_dead_twin_stops_for_good_and_the_other_goes_on(tmp_path, monkeypatch, capsys):
    def dead_since(folder):
        log = folder / "metrics.jsonl"
        looked_into = log.exists() and log.read_bytes().count(b"\n") >= 12
        return 2 if looked_into and folder.name == "plain" else None

    for module in (demo, evaluation):
        monkeypatch.setattr(module, "dead_since", dead_since)
    arguments = demo.Arguments(steps=400, depth=2, runs=tmp_path / "runs", out=tmp_path)
    demo.run(arguments)
    twins = json.loads((tmp_path / "demo.json").read_text())["twins"]
    assert 12 <= twins["plain"]["steps"] < twins["mvsplit"]["steps"] == 400
    assert (twins["plain"]["dead_since"], twins["mvsplit"]["dead_since"]) == (2, None)
    log = (tmp_path / "runs" / "mvsplit" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line)["loss"] for line in log[-10:]]
    assert twins["mvsplit"]["last_loss"] == pytest.approx(sum(last) / 10, abs=1e-4)
    said = capsys.readouterr().out
    assert said.count("plain residual is dead since step 2") == 1
    assert f"stopped at step {twins['plain']['steps']} of 400, dead since step 2" in said
    log = tmp_path / "runs" / "plain.log"
    log.write_text("not started again")
    again = demo.Trainer("plain", arguments)
    assert not again.running
    assert log.read_text() == "not started again"


def test_a_dead_twin_that_lacks_its_last_steps_is_taken_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "dead_since", lambda folder: 2)
    arguments = demo.Arguments(steps=4, depth=2, runs=tmp_path)
    folder = tmp_path / "plain"
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')  # killed before it could save
    twin = demo.Trainer("plain", arguments)
    assert twin.running
    twin.stop()
    twin.wait()
