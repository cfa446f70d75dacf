"""Claim: live, with looks at the cadence that adapts, the alarm comes before the update of the step
at which the writer gradients spike.

    python benchmarks/detector_live.py [--only PART] [--runs FOLDER] [--workers N] [--json FILE]

The corpus of detector_quality.py was looked into every 4 to 8 steps; a live run looks when
something stirs. Each run here is trained again with a look at every step, which changes no bit of
it, and the detector is given those looks that the cadence of `Monitor` asks for, in the order in
which it has them live: first the numbers of a step, then its look, both before the step's update.
The truth is the rule of record_runs.py. Runs that lie in FOLDER already are not trained again.

The runs are those of the corpus with up to 100 layers that jump or are disturbed by a factor of 30
or more, some that collapse or stay healthy from the start, and of the held-out ones those that jump
and the plain ones of up to 80 layers: 50.

Cost: 25 to 50 minutes on one CPU core, half a minute to a minute for each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import Run, corpus, read_records
from record_runs import record, token_floor, truth

from mvsplit.diagnostics.detector import Detector
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.monitor import Cadence, Schedule
from mvsplit.diagnostics.signals import LayerSignals
from mvsplit.reproduce.workers import worker_pool

_FROM_THE_START = (
    *("front-l32-lr0.012", "front-l64-lr0.012", "plain-l64-d32-lr0.03", "plain-l32-d32-lr0.012"),
    *("plain-l64-d32-lr0.016-seed1", "plain-l64-d32-lr0.016-seed2", "plain-l64-d32-lr0.016-seed3"),
    *("attention-only-lr0.016", "stable-mvsplit-b0.05-seed0", "stable-layerscale-seed0"),
    *("stable-sandwich-seed0", "stable-deepnorm-seed0", "stable-keel-seed0"),
)


def chosen() -> list[Run]:
    """The runs of the corpus that are trained again, with a look at every step."""
    runs = [r for r in corpus() if r.depth <= 100 and (_shaken(r) or r.name in _FROM_THE_START)]
    return [dataclasses.replace(run, probe_every=1) for run in runs]


def _shaken(run: Run) -> bool:
    if run.held_out:
        return run.name.startswith(("unseen-jump", "unseen-plain-l48", "unseen-plain-l80"))
    return any(deed.amount in (30, 80, 100) for deed in run.interventions)


def recorded(run: Run, folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, which is trained where `folder` does not have it."""
    file = folder / f"{run.name}.jsonl.gz"
    if not file.exists():
        record(run, folder)
    return read_records(file)


def live(records: Iterable[dict[str, Any]]) -> tuple[list[Event], int]:
    """The events of a run with the looks that the cadence asks for, and how many those are."""
    detector, schedule = Detector(), Schedule(Cadence())
    events: list[Event] = []
    looks, look = 0, False
    for line in records:
        if "loss" in line:
            look = schedule.due(detector.stirred)
            events += detector.update(line)
        elif look:
            looks += 1
            events += detector.update(line)
    return events, looks


def judge(run: Run, folder: Path) -> dict[str, Any]:
    """What the detector says of a run, beside the truth about it."""
    torch.set_num_threads(1)
    records = recorded(run, folder)
    found = truth(records, token_floor(run))
    events, looks = live(records)
    alarms = [e for e in events if e.level == "alarm"]
    row = {
        "run": run.name,
        "held_out": run.held_out,
        "truth": found["label"],
        "spike": found["spike_step"],
        "lock_in": found["lock_in_step"],
        "steps": run.steps,
        "looks": looks,
        "jump": _after_jump(run, records),
        "at_spike": _look_at(records, found["spike_step"]),
        "two_after_spike": _look_at(records, (found["spike_step"] or -9) + 2),
        "alarms": [{"step": e.step, "verdict": e.verdict, "layer": e.layer} for e in alarms],
        "warnings": [
            {"step": e.step, "verdict": e.verdict} for e in events if e.level == "warning"
        ],
    }
    print(json.dumps(row), flush=True)
    return row


def _after_jump(run: Run, records: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """How far loss and writer gradient rise over the median of the 20 steps before, in the three
    steps after a lasting jump of the learning rate."""
    jumps = [deed for deed in run.interventions if deed.deed == "lr" and deed.amount > 1]
    if not jumps:
        return None
    at = jumps[0].step  # whose update is the first with the new rate
    steps = {r["step"]: r for r in records if "loss" in r}
    before = [steps[n] for n in range(at - 19, at + 1)]
    after = [steps[n] for n in range(at + 1, at + 4)]
    return {
        "factor": jumps[0].amount,
        "loss": _rise([r["loss"] for r in before], [r["loss"] for r in after]),
        "writer": _rise(list(map(_writer, before)), list(map(_writer, after))),
    }


def _rise(before: Sequence[float], after: Sequence[float]) -> float:
    return round(max(after) / statistics.median(before), 2)


def _writer(line: dict[str, Any]) -> float:
    return math.hypot(line["grad_writer_attn"], line["grad_writer_ffn"])


def _look_at(records: Sequence[dict[str, Any]], step: int | None) -> dict[str, Any] | None:
    """The similarity of the deep tokens and G_mean / G_ctr at a step."""
    looks = (LayerSignals.of(r) for r in records if r["step"] == step and "tcs" in r)
    found = next((look for look in looks if look is not None), None)
    return found and {"tcs_deep": found.similarity, "mode_ratio": found.mode_ratio}


def first(row: dict[str, Any], *verdicts: str) -> int | None:
    """The step of the first alarm, of these verdicts if any are named."""
    named = [a["step"] for a in row["alarms"] if not verdicts or a["verdict"] in verdicts]
    return min(named, default=None)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over some runs."""
    collapsed = [r for r in rows if r["truth"] == "collapsed"]
    spiked = [r for r in collapsed if r["spike"] is not None]
    locked = [r for r in collapsed if r["lock_in"] is not None]
    diverged = [r for r in rows if r["truth"] == "diverged"]
    healthy = [r for r in rows if r["truth"] == "healthy"]
    return {
        "collapsed": len(collapsed),
        "caught": sum(bool(r["alarms"]) for r in collapsed),
        "as_mean_mode": sum(first(r, "mean-mode") is not None for r in collapsed),
        "with_spike": len(spiked),
        "alarm_by_spike": sum(_by(first(r), r["spike"]) for r in spiked),
        "mean_mode_by_spike": sum(_by(first(r, "mean-mode"), r["spike"]) for r in spiked),
        "mean_mode_two_after_spike": sum(
            _by(first(r, "mean-mode"), r["spike"] + 2) for r in spiked
        ),
        "with_lock_in": len(locked),
        "alarm_by_lock_in": sum(_by(first(r), r["lock_in"]) for r in locked),
        "diverged": len(diverged),
        "diverged_caught": sum(bool(r["alarms"]) for r in diverged),
        "diverged_as_mean_mode": sum(first(r, "mean-mode") is not None for r in diverged),
        "healthy": len(healthy),
        "false_alarms": sum(bool(r["alarms"]) for r in healthy),
        "looks_per_step": round(sum(r["looks"] for r in rows) / sum(r["steps"] for r in rows), 3)
        if rows
        else None,
    }


def _by(alarm: int | None, step: int) -> bool:
    return alarm is not None and alarm <= step


def measure(runs: Sequence[Run], folder: Path, workers: int) -> dict[str, Any]:
    """The rows of all runs and their counts by split."""
    with worker_pool(workers) as pool:
        rows = list(pool.map(judge, runs, [folder] * len(runs)))
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "command": "python benchmarks/detector_live.py",
        "tuned": summary([r for r in rows if not r["held_out"]]),
        "held out": summary([r for r in rows if r["held_out"]]),
        "runs": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--runs", type=Path, help="where the recorded runs lie, or are put")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    runs = [run for run in chosen() if options.only in run.name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(runs, folder, options.workers)
    for split in ("tuned", "held out"):
        print(f"{split}: {found[split]}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
