"""benchmarks/jump_looks.py: what looks show by depth, and for how long two runs are the same."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAME = "jump-plain-seed7"


def leave(folder: Path, losses: list[float], looks: list[dict[str, Any]]) -> Path:
    """A run folder of 8 layers whose rate rises after step 2."""
    run = folder / NAME
    run.mkdir(parents=True)
    (run / "trial.json").write_text(json.dumps({"seed": 7, "jump": 2, "floor": 2.0}))
    environment = {"device_name": "a card", "versions": {"torch": "9"}}
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "layers.jsonl").write_text("\n".join(map(json.dumps, looks)) + "\n")
    return run


def look(step: int, similarity: float) -> dict[str, Any]:
    shallow, deep = [3.0] + [0.0] * 6, [4.0]
    fields: dict[str, Any] = {"step": step, "tcs": [0.0] * 4 + [similarity] * 4}
    for end in ("attn", "ffn"):
        fields |= {f"g_mean_{end}": shallow + deep, f"g_ctr_{end}": [1.0] * 8}
        fields |= {f"amplification_{end}": [2.0] * 4 + [9.0] * 3 + [None]}
        fields |= {f"envelope_{end}": [3.0] * 4 + [8.0] * 4}
    return fields


def test_of_looks_and_losses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("jump_looks")
    losses = [4.0, 3.0, 2.0, 1.0, 0.5]
    run = leave(tmp_path / "now", losses, [look(3, 0.5), look(4, 0.97), look(5, 0.98)])
    leave(tmp_path / "then", [4.0, 3.0, 2.0000001, 1.0], [look(3, 0.96), look(4, 0.96)])
    out = tmp_path / "looks.json"
    given = [str(run), "--beside", str(tmp_path / "then"), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["jump_looks.py", *given])
    script.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["device"], result["torch"]) == ("a card", "9")
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    found = result["runs"][NAME]
    assert (found["seed"], found["jump"], found["settled"]) == (7, 2, 4)
    assert found["beside"] == {"steps": 4, "same_losses": 2, "settled": 3}
    first, second, _ = found["looks"]
    assert (first["step"], first["loss_over_floor"], first["alike"]) == (3, 1.0, 0)
    assert second["similarity_by_quarter"] == [0.0, 0.0, 0.97, 0.97]
    assert second["alike"] == 4
    writer = second["W_2"]
    assert (writer["g_mean"], writer["last_layer"]) == (5.0, 0.64)
    assert writer["mean_by_quarter"] == [0.36, 0.0, 0.0, 0.64]
    assert writer["ctr_by_quarter"] == [0.25] * 4
    # Medians over the layers that have both, of all and of those with tokens alike.
    assert (writer["excess"], writer["envelope"]) == (1.0, 3.0)
    assert (writer["excess_alike"], writer["envelope_alike"]) == (8.0, 8.0)
    assert (first["W_O"]["excess_alike"], first["W_O"]["envelope_alike"]) == (None, None)


def test_the_kept_result_is_of_its_form():
    path = BENCHMARKS / "results" / "jump_looks_h200_2026-11-30.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert [run["seed"] for run in runs.values()] == [0, 1, 2]
    for run in runs.values():
        for row in run["looks"]:
            for writer in (row["W_O"], row["W_2"]):
                assert sum(writer["ctr_by_quarter"]) == pytest.approx(1, abs=3e-3)
