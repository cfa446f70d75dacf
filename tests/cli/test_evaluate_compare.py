"""`mvsplit evaluate compare` at 80 columns, what it says of differences, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from mvsplit.cli import main
from mvsplit.evaluation.passport import Evaluation, write_evaluation

PARTS = [f"validation_loss_t{b / 10:g}-{(b + 1) / 10:g}" for b in range(10)]
PASSPORT = {
    "weights": {"source": "a", "sha256": 64 * "1"},
    "sampling": {"steps": 6, "prompts_sha256": 64 * "a"},
    "validation": {"samples": 3, "sha256": 64 * "b"},
}


def written(place: Path, shift: float = 0.0, **changes: dict[str, object] | None) -> Path:
    """Scores in a file; groups of the passport are changed, None takes one with its scores away."""
    passport = copy.deepcopy(PASSPORT)
    scores = {"digit_accuracy": 0.5, "digit_accuracy_stderr": 0.25, "digit_frechet": 12.3456}
    for name in ("validation_loss", *PARTS):
        scores |= {name: 0.9065 + shift, f"{name}_stderr": 0.0055}
    samples = {
        "digit_accuracy": [0.0, 1.0, 1.0, 0.0],
        "validation_loss": [1.0, 2.0 + shift, 3.0 - shift],
    }
    for group, change in changes.items():
        passport[group] |= change or {}
        if change is None:
            del passport[group]
            start = {"sampling": "digit", "validation": "validation"}[group]
            scores = {n: v for n, v in scores.items() if not n.startswith(start)}
            samples = {n: v for n, v in samples.items() if not n.startswith(start)}
    done = Evaluation(name=place.stem, scores=scores, passport=passport, samples=samples)
    write_evaluation(place, done)
    return place


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def compare(*words: object) -> int:
    return main(["evaluate", "compare", *map(str, words)])


def table_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if "│" in line or "┃" in line]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_names_and_paths_are_whole_at_80_columns(count, capsys):
    long = "runs/a-run-with-quite-a-long-name-{}/evaluations/step_00000030_euler6_g2_n100.json"
    files = [written(Path(long.format(k)), shift=-0.01 * k) for k in range(count)]
    assert compare(*files) == 0
    out = capsys.readouterr().out
    lines, rows = out.splitlines(), table_of(out)
    letters = "ABCDE"[:count]
    assert lines[:count] == [f"{a}  {path}" for a, path in zip(letters, files, strict=True)]
    assert max(map(len, rows)) <= 80
    assert "…" not in "".join(rows)
    headers = [
        cell.strip()
        for row in rows
        if row.startswith("score")
        for cell in row.split("┃")
        if cell.strip() != "score"
    ]
    assert headers == [*letters, *(f"{letter} − A" for letter in letters[1:])]
    firsts = [row.split("│")[0].strip() for row in rows if "│" in row]
    assert len(firsts) % 13 == 0
    assert set(firsts[:13]) == {"validation_loss", *PARTS, "digit_accuracy", "digit_frechet"}
    loss = next(row for row in rows if row.startswith("validation_loss "))
    assert "0.9065 ± 0.0055 │ 0.8965 ± 0.0055" in loss


def test_two_fit_with_their_difference_in_one_table(capsys):
    assert compare(written(Path("a.json")), written(Path("b.json"), shift=-0.01)) == 0
    rows = table_of(capsys.readouterr().out)
    assert len(rows) == 1 + 13
    assert rows[0].split() == ["score", "┃", "A", "┃", "B", "┃", "B", "−", "A"]


def test_an_allowed_difference_is_said_above_and_why_cells_are_empty(capsys):
    first, second = written(Path("a.json")), written(Path("b.json"), sampling={"steps": 35})
    assert compare(first, second, "--allow", "sampling.steps") == 0
    out = capsys.readouterr().out
    head = out.split("score ")[0]
    assert "differs, and allowed: sampling.steps 6 | 35\n" in head
    assert "no difference of what was drawn is one of the networks alone" in head
    assert "of these two networks" not in out
    assert "B − A, paired (3 of validation_loss): both were asked the same samples" in out
    why = "not the same samples and noise (sampling.steps)"
    assert f"– in B − A: digit_accuracy: {why}\n" in out
    parts = f"{PARTS[0]}, …, {PARTS[-1]}"
    kept = "no values of single samples are kept"
    assert f"– in B − A: digit_frechet, {parts}: {kept}\n" in out


def test_a_score_of_one_alone_has_its_reason(capsys):
    files = [written(Path("a.json")), written(Path("b.json"), sampling=None)]
    assert compare(*files, "--allow", "sampling") == 0
    out = capsys.readouterr().out
    assert "differs, and allowed: sampling given | absent\n" in out
    assert "– in B: digit_accuracy, digit_frechet: not scored there\n" in out
    assert "– in B − A: digit_accuracy, digit_frechet: not scored in both\n" in out


def test_nothing_is_called_paired_where_nothing_is(capsys):
    files = [
        written(Path("a.json")),
        written(Path("b.json"), sampling={"steps": 35}, validation={"samples": 2}),
    ]
    assert compare(*files, "--allow", "sampling", "validation") == 0
    out = capsys.readouterr().out
    assert "the same samples with the same noise" not in out
    assert "B − A" not in "".join(table_of(out))
    why = "not the same samples and noise (validation.samples)"
    assert f"– in B − A: validation_loss: {why}\n" in out


def test_four_files_have_one_line_for_a_field_and_value(capsys):
    files = [
        written(Path("a.json")),
        written(Path("b.json"), sampling={"steps": 35, "prompts_sha256": 64 * "c"}),
        written(Path("c.json"), sampling=None),
        written(Path("d.json"), sampling={"steps": 35}),
    ]
    assert compare(*files) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[1:] == [
        "  A  a.json",
        "  B  b.json",
        "  C  c.json",
        "  D  d.json",
        "  sampling: given in A, B, D",
        "  sampling: absent in C",
        "  sampling.prompts_sha256: aaaaaaaaaaaa in A, D",
        "  sampling.prompts_sha256: cccccccccccc in B",
        "  sampling.steps: 6 in A",
        "  sampling.steps: 35 in B, D",
        "To compare all the same: --allow sampling",
    ]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--allow", "sampling.steps", "a.json", "b.json"], "a.json b.json --allow sampling.steps"),
        (["a.json", "--allow", "sampling.steps", "b.json"], "a.json b.json --allow sampling.steps"),
        (["a.json", "b.json", "--allow", "x", "c.json"], "a.json b.json c.json --allow x"),
        (["--allow", "sampling.steps"], "A B --allow sampling.steps"),
    ],
)
def test_allow_comes_last(words, remedy, capsys):
    for name in ("a.json", "b.json", "c.json"):
        written(Path(name))
    assert compare(*words) == 2
    refusal = capsys.readouterr().err
    assert "--allow comes last" in refusal
    assert refusal.endswith(f"mvsplit evaluate compare {remedy}\n")


def test_a_path_that_is_not_there_is_said_to_be_none(capsys):
    written(Path("a.json"))
    assert compare("a.json", "nope") == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("mvsplit: nope: there is neither a run nor a file of scores")
    assert "make one" not in refusal


@pytest.mark.parametrize("word", ["comapre", "compar", "compares"])
def test_a_misspelt_compare_is_recognised(word, capsys):
    assert main(["evaluate", word, "A", "my run", "--allow", "x"]) == 2
    refusal = capsys.readouterr().err
    wanted = f"no run at {word}; did you mean mvsplit evaluate compare A 'my run' --allow x?\n"
    assert refusal == f"mvsplit: {wanted}"


def test_a_run_named_alike_is_a_run(place, capsys):
    (place / "compared").mkdir()
    assert main(["evaluate", "compared", "-n", "0"]) == 2
    assert "did you mean mvsplit evaluate compare" not in capsys.readouterr().err
