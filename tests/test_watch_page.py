"""What docs/watch.md shows runs, and what it names exists."""

from __future__ import annotations

import importlib
import json
import re
import typing
from pathlib import Path

import pytest
import torch

from mvsplit.cli import COMMANDS, main
from mvsplit.cli.monitor import ACTIONS
from mvsplit.diagnostics import CHEAP_FIELDS, FIELDS, Monitor
from mvsplit.diagnostics.events import Verdict
from mvsplit.presets import PRESETS
from tests.diagnostics.test_ranks import batch, dit

FOLDER = Path(__file__).parents[1] / "docs"
PAGE = (FOLDER / "watch.md").read_text(encoding="utf-8")
LOOP, *EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_fields_of_a_look_are_all_there():
    table = PAGE.partition("| fields |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = {field: "(cheap)" in row for row in rows for field in re.findall(r"`(\w+)`", row)}
    assert named == {field: field in CHEAP_FIELDS for field in FIELDS}


def test_the_loop_watches(tmp_path):
    model = dit()
    names = {
        "model": model,
        "batches": [batch(slice(None))] * 6,
        "compute_loss": lambda model, inputs: model(*inputs).square().mean(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
    }
    before = model.blocks[0].ffn.w2.weight.clone()
    exec(LOOP.replace("runs/mine", str(tmp_path)), names)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert [json.loads(line)["step"] for line in (tmp_path / "layers.jsonl").open()] == [1, 3]
    assert not torch.equal(model.blocks[0].ffn.w2.weight, before)


def lines(name: str) -> list[dict]:
    text = (FOLDER / "watch" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_it_quotes_was_said():
    page = " ".join(PAGE.replace("\n>", "\n").split())
    said = [e for e in lines("plain.events.jsonl") if "verdict" in e]
    assert [event["level"] for event in said] == ["warning", "alarm"]
    for e in said:
        head = f"**step {e['at_step']}, {e['level']}: {e['verdict']}, layer {e['layer']}.**"
        assert f"{head} {e['message']}" in page


def test_its_numbers_are_those_of_the_runs():
    page = " ".join(PAGE.split())
    plain, twin = lines("plain.metrics.jsonl"), lines("mvsplit.metrics.jsonl")
    by_step = {line["step"]: line for line in plain}
    queries = [f"{by_step[step]['grad_query']:.2g}" for step in (15, 22, 28)]
    assert queries == ["0.023", "0.00011", "3.6e-09"]
    assert "0.023 at step 15, 0.00011 at step 22, 4·10⁻⁹ at step 28" in page
    assert f"the writers' are still {by_step[28]['grad_writer_attn']:.2g}." in page
    assert f"began with a loss of {plain[0]['loss']:.3g}" in page
    assert plain[0]["loss"] == twin[0]["loss"]
    ends = [sum(line["loss"] for line in run[-10:]) / 10 for run in (plain, twin)]
    assert f"it is {ends[0]:.2f} for the plain network and {ends[1]:.2f} for its twin" in page


def test_every_verdict_has_its_advice():
    table = PAGE.partition("| verdict |")[2].partition("\n\n")[0]
    advised = re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)
    assert sorted(advised) == sorted(typing.get_args(Verdict))


def test_every_command_and_preset_exists():
    shown = re.findall(r"^mvsplit (\w+) +(\S+)", PAGE, re.MULTILINE)
    assert len(shown) == 5
    for command, argument in shown:
        assert command in COMMANDS
        assert command != "train" or argument in PRESETS
    for action in re.findall(r"mvsplit monitor (\w+)", PAGE):
        assert action in ACTIONS


def test_going_back_with_a_lower_rate_is_the_command_that_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept, shown = re.search(
        r"with `(--save.*?)`:\n\n```sh\nmvsplit (train .*?)\n```", PAGE, re.S
    ).groups()
    small = ["--model.depth", "2", "--device", "cpu", "--ema-decay", "0.9"]
    first = ["train", "digits-400l-plain", "--run-dir", "runs/plain", "--keep", "1", *kept.split()]
    assert main([*first, "--steps", "20", *small]) == 0
    again = [word for word in shown.split() if word != "\\"]
    assert main([*again, "--steps", "1", *small]) == 0
    assert (
        '"source": "runs/plain/checkpoints/step_00000010"'
        in Path("runs/lower/config.json").read_text()
    )
    number = json.loads(Path("runs/lower/metrics.jsonl").read_text())
    assert number["lr"] == pytest.approx(1e-4)  # the first of ten steps of warm-up
    capsys.readouterr()
    assert main([*first, "--steps", "30", "--lr", "1e-3", *small]) == 2
    said = "train these weights, or those of an earlier checkpoint, on: --from "
    assert said + "runs/plain/checkpoints/step_00000020 --no-from" in capsys.readouterr().err


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", PAGE)
    assert len(links) >= 3
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_what_stop_raises_can_be_caught_as_shown(capsys):
    (example,) = (text for text in EXAMPLES if "Stopped" in text)

    def train(model, monitor):
        with monitor.look():
            loss = model(*batch(slice(None))).square().mean() * torch.nan
            loss.backward()
        monitor.step(loss)

    model = dit()
    exec(example, {"model": model, "monitor": Monitor(model, policy="stop"), "train": train})
    said = capsys.readouterr().out
    assert said.startswith("step 1: Not finite: loss")
    assert said.endswith("The update was not made.\n")


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_the_other_examples_import_exists(example):
    for module, name in re.findall(r"^from (mvsplit\S*) import (\w+)", example, re.MULTILINE):
        path = FOLDER.parent / (module.replace(".", "/") + ".py")
        if path.exists():  # read, for it may need a library that is not installed
            text = path.read_text(encoding="utf-8")
            assert re.search(rf"^class {name}\b", text, re.MULTILINE)
        else:
            assert hasattr(importlib.import_module(module), name)
