"""The sinks, read back from what the trackers themselves wrote."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MISSING = "missing: pip install 'mvsplit[track]'"
LINES: list[tuple[str, dict[str, Any]]] = [
    ("metrics", {"step": 3, "loss": 0.5, "grad_norm": math.inf}),
    ("layers", {"step": 3, "layer": [0, 1, 2], "tcs": [0.25, None, 0.75], "rho": [None] * 3}),
    ("layers", {"step": 4, "layer": [0, 1], "tcs": [math.nan, 1.0]}),
    (
        "events",
        {
            "event": "watch",
            "step": 4,
            "level": "alarm",
            "verdict": "mean-mode",
            "message": "The tokens are alike.",
        },
    ),
    ("events", {"event": "skipped", "step": 4, "message": "The update is left out."}),
]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorboard", reason="tensorboard is missing: pip install 'mvsplit[track]'"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mvsplit.diagnostics.integrations.tensorboard import TensorBoardSink

    sink = TensorBoardSink(tmp_path)
    for log, line in LINES:
        sink.append(log, line)
    sink.close()
    read = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    scalars = {
        tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]
    }
    (nan,) = [value for step, value in scalars["watch/layers/tcs"] if step == 4]
    assert math.isnan(nan)
    scalars["watch/layers/tcs"].pop()
    assert scalars == {
        "watch/loss": [(3, 0.5)],
        "watch/grad_norm": [(3, math.inf)],
        "watch/layers/tcs": [(3, 0.5)],
    }
    depths = [
        (e.step, e.histogram_value.num, e.histogram_value.sum)
        for e in read.Histograms("watch/layers/tcs/depth")
    ]
    assert depths == [(3, 2, 1.0), (4, 1, 1.0)]
    texts = [
        e.tensor_proto.string_val[0].decode() for e in read.Tensors("watch/events/text_summary")
    ]
    assert texts == [
        "**alarm: mean-mode** The tokens are alike.",
        "**info: skipped** The update is left out.",
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason=f"wandb is {MISSING}")
    from mvsplit.diagnostics.integrations.wandb import WandbSink

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    settings = wandb.Settings(console="off", x_disable_stats=True, silent=True)
    run = wandb.init(project="watch", mode="offline", dir=tmp_path, settings=settings)
    sink = WandbSink(run)
    for log, line in LINES:
        sink.append(log, line)
    run.finish()
    records = kept_records(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    rows = [history_row(r.history) for r in records if r.WhichOneof("record_type") == "history"]
    assert [row["watch/step"] for row in rows] == [3, 3, 4, 4, 4]
    assert (rows[0]["watch/loss"], rows[0]["watch/grad_norm"]) == (0.5, math.inf)
    assert rows[1]["watch/layers/tcs"] == 0.5
    assert sum(rows[1]["watch/layers/tcs/depth/values"]) == 2
    assert math.isnan(rows[2]["watch/layers/tcs"])
    assert (rows[3]["watch/event"], rows[4]["watch/event"]) == ("mean-mode", "skipped")
    assert rows[3]["watch/message"] == "The tokens are alike."
    (alert,) = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text) == ("mean-mode", "The tokens are alike.")


def kept_records(path: Path) -> list[Any]:
    """What an offline run keeps for its later upload, once its service has written the end of it,
    which may be after `finish` returned."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        data = path.read_bytes()[7:]  # behind the file's own mark
        records = [Record.FromString(record) for record in leveldb_log(data)]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{path} has no end")


def history_row(history: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in history.item}


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, in which each piece of a record has
    a checksum, a length and a kind (1 all of it, 2 its beginning, 3 its middle, 4 its end)."""
    place, record = 0, b""
    while place + 7 <= len(data):
        left = 32768 - (place + 7) % 32768  # the mark counts as part of the first block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
