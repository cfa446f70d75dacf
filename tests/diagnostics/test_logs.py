"""The log reader against logs as crashes, rollbacks and other programs leave them."""

from __future__ import annotations

import json
import math
import random
import tracemalloc

import pytest

from mvsplit.diagnostics.logs import Dropped, as_number, last_record, read_jsonl
from mvsplit.errors import UserError


@pytest.fixture
def log(tmp_path):
    """Writes bytes or lines to a log and gives its reader."""

    def write(content: bytes | list[str], **options):
        path = tmp_path / "metrics.jsonl"
        if isinstance(content, list):
            content = "".join(line + "\n" for line in content).encode()
        path.write_bytes(content)
        return read_jsonl(path, **options)

    return write


def test_a_truncated_last_line_is_left_out_and_counted(log):
    lines = log(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert list(lines) == [{"step": 1, "loss": 2.0}]
    assert (lines.dropped.truncated, lines.dropped.total) == (1, 1)
    assert str(lines.dropped) == "cut short at the end (1)"


def test_a_truncated_line_supersedes_nothing(log):
    """After a resume the killed line may be of a step that the log already has."""
    lines = log(b'{"step": 1, "loss": 2.0}\n{"step": 1, "lo')
    assert [record["loss"] for record in lines] == [2.0]


def test_a_whole_last_line_without_its_newline_counts(log):
    lines = log(b'{"step": 1}\n{"step": 2}')
    assert [record["step"] for record in lines] == [1, 2]
    assert lines.dropped.total == 0


def test_nan_and_infinity_come_through(log):
    (record,) = log(['{"step": 0, "a": NaN, "b": Infinity, "c": -Infinity}'])
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "line",
    [
        b"loss went up",
        b"[1, 2]",
        b"3",
        b'{"step": 1} {"step": 2}',
        b"\xff\xfe",
        b"\x00" * 64,
        b"[" * 200_000,
        b'{"step": ' + b"9" * 5000 + b"}",  # more digits than Python turns into a number
    ],
)
def test_what_is_no_json_object_is_left_out_and_counted(log, line):
    lines = log(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert [record["step"] for record in lines] == [1, 3]
    assert (lines.dropped.malformed, lines.dropped.total) == (1, 1)


@pytest.mark.parametrize("step", ["null", "true", '"7"', "-1", "1.5", "NaN", "Infinity", "1e300"])
def test_a_line_without_a_whole_step_is_left_out_and_counted(log, step):
    lines = log([f'{{"step": {step}, "loss": 1}}', '{"loss": 2}', '{"step": 4.0}'])
    assert list(lines) == [{"step": 4}]
    assert (lines.dropped.stepless, lines.dropped.total) == (2, 2)


def test_empty_files_and_empty_lines_hold_nothing(log):
    assert list(log(b"")) == []
    lines = log(b"\n\n  \n")
    assert list(lines) == []
    assert lines.dropped.total == 0


def test_after_a_rollback_the_later_line_of_a_step_wins(log):
    steps = [0, 1, 2, 3, 4, 2, 3, 4, 5]
    lines = log([json.dumps({"step": s, "line": i}) for i, s in enumerate(steps)])
    assert [(r["step"], r["line"]) for r in lines] == [
        (0, 0),
        (1, 1),
        (2, 5),
        (3, 6),
        (4, 7),
        (5, 8),
    ]
    assert (lines.dropped.superseded, lines.dropped.total) == (3, 3)


def test_any_order_agrees_with_a_dictionary(log):
    rng = random.Random(0)
    records = [{"step": rng.randrange(60), "value": i, "f": rng.random()} for i in range(300)]
    latest = {record["step"]: record for record in records}
    lines = log([json.dumps(record) for record in records])
    for _ in range(2):  # the counts are of one iteration
        assert sorted(lines, key=lambda r: r["step"]) == [latest[s] for s in sorted(latest)]
        assert lines.dropped.superseded == len(records) - len(latest)


def test_all_lines_come_in_their_order_where_asked(log):
    steps = [5, 1, 1, 7, 5]
    lines = log([json.dumps({"step": s}) for s in steps], latest=False)
    assert [record["step"] for record in lines] == steps
    assert lines.dropped.total == 0


def test_a_log_that_grows_while_it_is_read_gives_what_it_held(log):
    lines = log(['{"step": 1}', '{"step": 0}', '{"step": 1, "later": true}'])
    stream = iter(lines)
    first = next(stream)
    with lines.path.open("a") as file:
        file.write('{"step": 0, "new": true}\n')
    assert [first, *stream] == [{"step": 0}, {"step": 1, "later": True}]


def test_memory_grows_by_a_few_bytes_a_line(log):
    count = 40_000
    text = [f'{{"step": {i // 2}, "loss": 0.5, "note": "{"x" * 400}"}}' for i in range(count)]
    lines = log(text)
    del text
    tracemalloc.start()
    kept = sum(1 for _ in lines)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == count // 2
    assert peak < 64 * count + 500_000


def test_a_missing_log_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        read_jsonl(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), (0.5, 0.5), (10**400, math.inf), (-(10**400), -math.inf)],
)
def test_numbers_become_floats(value, number):
    assert as_number(value) == number


@pytest.mark.parametrize("value", [True, None, "1", [1], {}])
def test_nothing_else_is_a_number(value):
    assert as_number(value) is None


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (b"", None),
        (b'{"step": 1', None),
        (b'{"step": 1}\n{"step": 2}\n', 2),
        (b'{"step": 1}\n{"step": 2}', 1),  # it may still be being written
        (b'{"step": 1}\nnoise\n{"loss": 2}\n', 1),
        (b'{"step": 1}\n' + b"x" * 3_000_000 + b'\n{"step": 7}\n', 7),
    ],
)
def test_the_last_whole_record_of_a_log_in_the_making(log, content, step):
    record = last_record(log(content).path)
    assert (record and record["step"]) == step


def test_a_log_that_is_not_there_yet_has_no_last_record(tmp_path):
    assert last_record(tmp_path / "absent.jsonl") is None


def test_a_line_too_long_for_a_record_is_left_out_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("mvsplit.diagnostics.logs._LONGEST", 40)
    long = '{"step": 2, "x": "' + 90 * "a" + '"}'
    pieces = "x" * 80 + '{"step": 7}'  # the end of which looks like a record
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"step": 1}}\n{long}\n{pieces}\n{{"step": 3}}\n')
    log = read_jsonl(path, latest=False)
    assert [record["step"] for record in log] == [1, 3]
    assert log.dropped == Dropped(malformed=2)
