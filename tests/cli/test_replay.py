"""`mvsplit monitor replay` on files as runs, crashes and other programs leave them."""

from __future__ import annotations

import json

import pytest

from mvsplit import cli

CALM = [
    {"step": s, "loss": 1.0 + 0.01 * (s % 7), "grad_norm": 1 + 0.1 * (s % 5)} for s in range(60)
]


def write(path, records, end="\n"):
    path.write_text("\n".join(json.dumps(r) for r in records) + end)
    return str(path)


def replayed(capsys, *files, status=0):
    assert cli.main(["monitor", "replay", *files, "--json"]) == status
    out, err = capsys.readouterr()
    return json.loads(out, parse_constant=pytest.fail)["events"], err


def test_the_output_is_one_object_with_exactly_these_fields(tmp_path, capsys):
    log = write(tmp_path / "a.jsonl", [*CALM, {"step": 60, "loss": float("nan")}])
    (event,), _ = replayed(capsys, log)
    assert event.pop("message")
    assert event == {
        "step": 60,
        "level": "alarm",
        "verdict": "non-finite",
        "layer": None,
        "evidence": {"loss": "NaN"},
    }


@pytest.mark.parametrize("records", [[], [{"step": 1, "train_loss": 2.0}, {"loss": 3.0}]])
def test_a_log_that_holds_nothing_to_judge_says_so(tmp_path, capsys, records):
    log = write(tmp_path / "a.jsonl", records, end="")
    events, err = replayed(capsys, log, status=2)
    assert events == []
    assert "no line holds a step and any of loss, grad_norm, " in err


def test_a_text_that_is_no_log_is_not_called_calm(tmp_path, capsys):
    (tmp_path / "a.md").write_text("# text\n")
    assert cli.main(["monitor", "replay", str(tmp_path / "a.md")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing was judged" in err
    assert "lines left out: not a JSON object (1)" in err


def test_the_learning_rate_under_its_long_name(tmp_path, capsys):
    records = [{**r, "learning_rate": 1e-3 * (10 if r["step"] > 40 else 1)} for r in CALM]
    (event,), err = replayed(capsys, write(tmp_path / "a.jsonl", records))
    assert (event["step"], event["verdict"], err) == (41, "learning-rate", "")


def test_a_cut_off_line_and_noise_are_left_out_and_counted(tmp_path, capsys):
    log = tmp_path / "a.jsonl"
    write(log, CALM, end='\n[1]\nnot json\n{"loss": 3}\n{"step": 60, "lo')
    events, err = replayed(capsys, str(log))
    assert events == []
    assert "cut short at the end (1), not a JSON object (2), without a valid step (1)" in err


def test_infinity_in_either_spelling(tmp_path, capsys):
    log = tmp_path / "a.jsonl"
    log.write_text('{"step": 1, "loss": Infinity}\n{"step": 2, "loss": 1e999}\n')
    (event,), _ = replayed(capsys, str(log))
    assert (event["step"], event["verdict"]) == (1, "non-finite")
    assert event["evidence"] == {"loss": "Infinity"}


def test_a_run_folder_stands_for_its_logs_and_their_order_does_not_matter(tmp_path, capsys):
    calm = [
        {"step": s, "layer": [0, 1], "tcs": [0.1, 0.1], "g_mean_ffn": [1, 1], "g_ctr_ffn": [1, 1]}
        for s in range(0, 60, 10)
    ]
    alike = {**calm[0], "step": 55, "tcs": [0.2, 0.95], "g_mean_ffn": [1, 50]}
    metrics = write(tmp_path / "metrics.jsonl", CALM)
    layers = write(tmp_path / "layers.jsonl", [*calm, alike])
    (tmp_path / "checkpoints").mkdir()
    (event,), _ = replayed(capsys, str(tmp_path))
    assert (event["step"], event["verdict"], event["layer"]) == (55, "mean-mode", 1)
    assert replayed(capsys, layers, metrics)[0] == [event]


def test_a_rollback_stands_at_one_place_in_both_logs(tmp_path, capsys):
    look = {"layer": [0], "tcs": [0.1], "g_mean_ffn": [1], "g_ctr_ffn": [1]}
    metrics = write(tmp_path / "metrics.jsonl", [*CALM, *CALM[40:]])
    steps = [*range(0, 60, 10), 40, 50]
    layers = write(tmp_path / "layers.jsonl", [{"step": s, **look} for s in steps])
    assert replayed(capsys, metrics, layers)[0] == []
    assert cli.main(["monitor", "replay", str(metrics), str(layers)]) == 0
    assert capsys.readouterr().out == "Nothing to report in 80 steps and 8 looks into the layers.\n"


def test_the_table_says_when_there_is_nothing_and_what_there_is(tmp_path, capsys):
    assert cli.main(["monitor", "replay", write(tmp_path / "a.jsonl", CALM)]) == 0
    assert capsys.readouterr().out == "Nothing to report in 60 steps.\n"
    log = write(tmp_path / "b.jsonl", [{"step": 1234, "loss": float("inf")}])
    assert cli.main(["monitor", "replay", log]) == 0
    out = capsys.readouterr().out
    assert "1,234" in out
    assert "non-finite" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "missing.jsonl"], "missing.jsonl"),
        (["replay"], "at least one log"),
        (["repaly"], "did you mean"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["monitor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
