"""The demo from end to end on twins of four layers; the real one differs in size only."""

import json

import pytest
from PIL import Image

from mvsplit.cli import demo, main
from mvsplit.errors import UserError


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--steps", "12", "--depth", "4", "--runs", str(folder / "runs")]
    assert main(["demo", *arguments, "--out", str(folder)]) == 0
    return folder


def test_leaves_picture_report_and_numbers(out):
    with Image.open(out / "demo.png") as picture:
        colours = len(set(picture.convert("RGB").resize((200, 120)).getdata()))
    assert colours > 50, "the picture is nearly empty"
    twins = json.loads((out / "demo.json").read_text())["twins"]
    assert {name: twin["steps"] for name, twin in twins.items()} == {"plain": 12, "mvsplit": 12}
    losses = [json.loads(line)["loss"] for line in (out / "runs/plain/metrics.jsonl").open()]
    assert twins["plain"]["first_loss"] == pytest.approx(losses[0], abs=1e-4)
    assert twins["plain"]["last_loss"] == pytest.approx(sum(losses[-10:]) / 10, abs=1e-4)
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
