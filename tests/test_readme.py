"""What the README shows runs, and what it names exists."""

import json
import re
from pathlib import Path

import pytest
import torch

from mvsplit.cli import COMMANDS, main
from mvsplit.diagnostics import Stopped
from mvsplit.evaluation.passport import read_evaluation
from mvsplit.presets import PRESETS
from mvsplit.residuals import RuleConfig, build_rule
from mvsplit.residuals.mvsplit import starts
from tests.slow import slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_example_computes_the_rule():
    example, _ = EXAMPLES
    assert len(example.strip().splitlines()) <= 15
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    x, f, h = names["x"], names["f"], names["h"]
    z = torch.cat(
        [part(h, f, s) for part, s in ((merged, slice(0, 16)), (merged, slice(16, 17)))], 1
    )
    expected = z / z.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(x, expected)


def merged(x, f, tokens):
    """Eq. 7 at β = α = 1/√400."""
    mean_f, mean_x = (each[:, tokens].mean(1, keepdim=True) for each in (f, x))
    return x[:, tokens] + 0.05 * (f[:, tokens] - mean_f) + 0.05 * (mean_f - mean_x)


def test_the_loop_of_the_example_is_watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3)
    before = [p.clone() for p in model.parameters()]
    names = {
        "model": model,
        "batches": torch.randn(4, 2, 5, 16),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "compute_loss": lambda model, batch: model(batch).square().mean(),
    }
    exec(EXAMPLES[1], names)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    lines = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    looks = (tmp_path / "runs" / "mine" / "layers.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert len(json.loads(looks[0])["layer"]) == 3


def test_the_loop_of_the_example_trains_no_network_on_that_an_alarm_gave_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3)
    batches = torch.randn(4, 2, 5, 16)
    batches[2] = torch.nan
    names = {
        "model": model,
        "batches": batches,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "compute_loss": lambda model, batch: model(batch).square().mean(),
    }
    with pytest.raises(Stopped, match="step 3: Not finite"):
        exec(EXAMPLES[1], names)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert f"`{Stopped.__module__.rsplit('.', 1)[0]}.Stopped`" in README


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_where_gains_start_is_as_its_table_says():
    """And the command it gives instead starts as the library does."""
    table = README.split("### Where β and α start")[1].split("```")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if "`" in line]
    library, *rows = (line for line in lines if len(line) == 5)
    assert library[1:4] == ["1/√L", "1/√L", "standard"]
    shown = {name: row[1:] for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    ours = {name: e for name, e in PRESETS.items() if e.model.rule.name == "mvsplit"}
    assert set(shown) == set(ours)
    for name, experiment in ours.items():
        rule, depth = experiment.model.rule, experiment.model.depth
        beta, alpha = starts(rule, depth)
        first = shown[name][0].split()[0]
        assert beta == pytest.approx(depth**-0.5 if first == "1/√L" else float(first))
        assert alpha == float(shown[name][1])
        assert (experiment.model.writers, shown[name][2]) == ("rule", writers(rule, depth))
    instead = r"train (\S+) --model.rule.beta None --model.rule.alpha None\n"
    depth = PRESETS[re.search(instead, README)[1]].model.depth
    assert starts(RuleConfig(), depth) == (depth**-0.5, depth**-0.5)
    assert writers(RuleConfig(), depth) == library[3]


def writers(rule: RuleConfig, depth: int) -> str:
    built = build_rule(rule, width=8, depth=depth, branch="ffn")
    return "zero" if built.zero_writers else "standard"


def test_what_it_says_of_your_own_writers_is_what_the_rule_says():
    words = " ".join(README.split())
    assert "With this default start your writers, W_O and W_2, keep the start they have." in words
    assert "where you give β or α, or take another rule, and `rule.zero_writers` is true" in words
    assert writers(RuleConfig(), 400) == "standard"
    for given in ({"beta": 0.05}, {"alpha": 0.05}, {"beta": 0.05, "alpha": 0.05}):
        assert writers(RuleConfig(**given), 400) == "zero"


def test_what_it_says_of_beta_at_a_lower_rate_is_in_the_result():
    path = ROOT / "docs" / "experiments" / "results" / "collapse-gpu.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    figures = {name: [*each["values"].values()] for name, each in result["figures"].items()}
    assert figures["MV-Split: lives"] == [1, 1, 1]
    one, deep = (figures[f"MV-Split{n}: end loss"] for n in ("", ", small beta"))
    ratios = {f"{a / b:.1f}" for a, b in zip(one, deep, strict=True)}
    assert ratios == {"1.3"}
    words = " ".join(README.split())
    assert f"after 300 steps, at {ratios.pop()} times the loss of β = 1/√L" in words
    (row,) = (r for r in result["runs"] if (r["label"], r["seed"]) == ("MV-Split", 0))
    assert (row["lr"], row["width"], row["steps"]) == (0.001, 128, 300)


def test_what_it_says_of_1000_layers_is_in_the_result():
    path = ROOT / "docs" / "experiments" / "results" / "thousand-gpu.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    figures = {name: [*each["values"].values()] for name, each in result["figures"].items()}
    losses = figures["MV-Split: end loss"]
    words = " ".join(README.split())
    said = f"three of three seeds are at {min(losses):.2f} to {max(losses):.2f} times the loss"
    assert said in words
    assert "with their deep tokens alike ([thousand]" in words
    assert min(figures["MV-Split: end similarity"]) > 0.95
    (row,) = (r for r in result["runs"] if (r["label"], r["seed"]) == ("MV-Split", 0))
    assert (row["lr"], row["width"], row["steps"]) == (0.001, 128, 200)
    rows = bench_rows()
    learns = [r["lives"] for r in rows if r["run"].startswith("alpha-standard-1000x64-lr1.0e-03-")]
    assert learns == [True]


def bench_rows() -> list[dict]:
    path = ROOT / "docs" / "experiments" / "results" / "depth-bench" / "gpu.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_what_speaks_against_the_default_is_in_the_rows():
    """The same sentences as on the page, whose standings tests/reproduce/depth/test_understood.py
    holds against the rows."""

    def above(shape: str) -> float:
        ends = [
            [
                row["validation_loss"]
                for row in bench_rows()
                if row["run"].startswith(f"{name}-{shape}-lr3.2e-03-")
            ]
            for name in ("alpha-standard", "layerscale-0.01")
        ]
        mine, rival = (sum(each) / len(each) for each in ends)
        return mine / rival - 1

    assert above("1000x64") < 0.03, "or it is no tie"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for text in (README, changelog):
        words = " ".join(text.split())
        assert f"at 1000 layers it is {above('1000x64'):.1%} above, a tie" in words
        assert f"its mean is {above('100x128'):.1%} above LayerScale's" in words
        assert "on 2026-11-30 by a decision after the" in words
        assert "after 200 steps, though behind after 1,000" in words


def test_what_it_says_of_the_paper_s_beta_is_in_the_rows():
    assert "β = 1 lives at 0.001 in three of three seeds, far behind the library's start" in (
        " ".join(README.split())
    )
    rows = {row["run"]: row for row in bench_rows()}
    one = [rows[f"mvsplit-1-400x64-lr1.0e-03-seed{seed}"] for seed in range(3)]
    assert all(row["lives"] for row in one)
    assert not rows["mvsplit-1-400x64-lr3.2e-03-seed0"]["lives"]
    start = rows["alpha-standard-400x64-lr1.0e-03-seed0"]["validation_loss"]
    assert min(row["validation_loss"] for row in one) > 1.2 * start


def test_every_command_and_preset_it_shows_exists():
    shown = re.findall(r"^mvsplit (\w+) ?(\S*)", README, re.MULTILINE)
    assert shown
    for command, argument in shown:
        assert command in COMMANDS
        if command == "train" and not argument.startswith("-"):
            assert argument in PRESETS


@slow
def test_its_first_run_draws_what_is_asked_for(tmp_path, monkeypatch):
    """Most pictures are read as the digit of the prompt; chance is one in ten."""
    command = re.search(r"^mvsplit (train tiny .*?) *#", README, re.MULTILINE)[1].split()
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0
    run = command[command.index("--run-dir") + 1]
    options = ["-n", "100", "--steps", "12", "--validation-samples", "0"]
    assert main(["evaluate", run, *options]) == 0
    assert read_evaluation(Path(run)).scores["digit_accuracy"] > 0.7
