"""docs/evaluation.md: its commands run as written, its figures are those of the results."""

import importlib.util
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

from mvsplit.cli import main
from mvsplit.cli.evaluate import Arguments
from mvsplit.cli.evaluate_compare import Arguments as CompareArguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "benchmarks/results/shapes_reader_2026-11-24.json").read_text())


def test_the_commands_do_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = []
    commands = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))
    assert commands.count("--steps 300") == 2
    for line in commands.replace("--steps 300", "--steps 20").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "mvsplit"
        capsys.readouterr()
        status.append(main(arguments))
    assert status == [0, 0, 0, 0, 0, 0, 1]
    refusal = capsys.readouterr().err
    assert refusal == re.search(r"((?: {4}.*\n)+)\n`--allow`", PAGE)[1].replace(
        "    ", "", 1
    ).replace("\n    ", "\n")


def test_the_figures_of_the_example_are_those_of_its_result():
    name = re.search(r"results/(evaluation_example_\S+\.json)\)", PAGE)[1]
    found = json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))
    for score in ("validation_loss", "digit_accuracy", "digit_frechet"):
        row = re.search(rf"^\| `{score}` \| (.*) \|$", PAGE, re.MULTILINE)[1].split(" | ")
        for cell, scores in zip(row, found["scores"].values(), strict=False):
            error = scores.get(f"{score}_stderr")
            assert cell == f"{scores[score]:.4g} ± {'?' if error is None else f'{error:.2g}'}"
        if score in found["paired"]:
            pair = found["paired"][score]
            assert row[2] == f"{pair['difference']:+.2g} ± {pair['stderr']:.2g}"
            assert abs(pair["difference"]) < 2 * pair["stderr"]  # "neither is shown to be better"

    pairs = [found["paired"][score]["pairs"] for score in ("validation_loss", "digit_accuracy")]
    assert f"(here {pairs[0]} and {pairs[1]})" in PAGE


def test_the_reader_is_as_good_as_stated():
    spec = importlib.util.spec_from_file_location("reader", ROOT / "benchmarks/shapes_reader.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert RESULT["passed"]
    assert module.table(RESULT["rows"]) in PAGE
    assert {row["pictures"] for row in RESULT["rows"]} == {3000}
    samples = RESULT["samples"]
    words = f"of {samples['depth']} layers after {samples['step']:,} steps the noise is "
    words += (
        f"{samples['noise_median']:.3f} in the median and {samples['noise_upper_tenth']:.2f} in"
    )
    assert words in " ".join(PAGE.split())
    for row in RESULT["rows"]:
        if row["quality"] != module.NOT_GATED:
            assert row["right"] >= module.NEEDED
            assert f"{row['another_scene_taken_for_right']:.1%}" == "1.9%"


def test_its_options_and_links_exist():
    known = {
        f.name.replace("_", "-") for kind in (Arguments, CompareArguments) for f in fields(kind)
    }
    trained = {"steps", "run-dir", "data.split", "seed"}
    assert set(re.findall(r"--([a-z][a-z.-]+)", PAGE)) <= known | trained
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
