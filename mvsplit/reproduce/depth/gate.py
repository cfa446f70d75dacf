"""What must hold before runs that are trained as one count as runs: each is what it is alone."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvsplit.data.atomic import write_atomically
from mvsplit.reproduce.depth.ensemble import Family
from mvsplit.reproduce.depth.groups import family
from mvsplit.reproduce.depth.plan import ENTRIES, BenchRun, BenchSize, Entry, get_run
from mvsplit.reproduce.depth.run import read_rows, run_bench
from mvsplit.reproduce.depth.together import run_together
from mvsplit.reproduce.workers import Stopped

DEPTH, STEPS = 20, 40
RATES = (3.2e-4, 1e-3)  # at which all are calm: a spike makes much of rounding
# Of a loss: a third of what counts as a tie between entries (`verdict.TIE`). Rounding, which both
# ways do in other places, makes less: 2.4e-4 in bf16 on a CPU, nothing in fp32.
ALIKE = 0.01


def check_together(
    size: BenchSize, entries: Sequence[Entry] = ENTRIES, keep: Path | None = None
) -> None:
    """Trains shallow networks, two of each kind of merge (`Entry.merge`) among `entries`, as one
    for each family, and one of each kind alone, and compares training and validation losses.

    Args:
        keep: a JSON file of what was found, written after each run; what it says of other entries
            on the same device stays.

    Raises:
        RuntimeError: they differ by more than rounding.
        Stopped: a signal came meanwhile.
    """
    short = replace(size, steps=STEPS, warmup=5, validation=32, pictures=2, drawing=1)
    before = _read(keep)
    found: list[dict[str, Any]] = []
    families = _families(size, entries)
    wanted = sum(len(pairs) for pairs in families)
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as one:
        for pairs in families:
            run_together([run for pair in pairs for run in pair], short, Path(one))
            together = {row["run"]: row for row in read_rows(Path(one))}
            for number, pair in enumerate(pairs):
                if not run_bench(pair[number % 2], short, Path(alone)):
                    raise Stopped(signal.SIGTERM)  # no clock has stopped it
                (row,) = (r for r in read_rows(Path(alone)) if r["run"] == pair[number % 2].name)
                found.append(_apart(row, together[row["run"]]))
                _tell(found, wanted)
                if keep is not None:
                    _keep(found, wanted, row, before, keep)
    worst = {n: max(each[n] for each in found) for n in ("curve", "validation_loss")}
    words = ", ".join(f"{name} within {share:.1e}" for name, share in worst.items())
    if not all(each["alike"] for each in found):
        raise RuntimeError(f"runs that are trained as one differ from those alone: {words}")
    print(f"check: {len(found)} runs as one are what they are alone; {words}", flush=True)


def _apart(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """By which share a run alone differs from the same one as a member."""
    if row["fingerprint"] != other["fingerprint"]:
        raise RuntimeError(f"{row['run']} is another experiment as part of an ensemble")
    steps = [abs(a / b - 1) for a, b in zip(row["curve"], other["curve"], strict=True)]
    loss = abs(row["validation_loss"] / other["validation_loss"] - 1)
    alike = all(share < ALIKE for share in (*steps, loss))  # NaN is not
    return {"run": row["run"], "curve": max(steps), "validation_loss": loss, "alike": alike}


def _tell(found: Sequence[Mapping[str, Any]], wanted: int) -> None:
    each = found[-1]
    words = f"curve {each['curve']:.1e}, validation loss {each['validation_loss']:.1e}"
    print(f"gate, {len(found)} of {wanted}: {each['run']}: {words}", flush=True)


def _read(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path is not None and path.exists() else {}


def _keep(
    found: Sequence[Mapping[str, Any]],
    wanted: int,
    row: Mapping[str, Any],
    before: Mapping[str, Any],
    path: Path,
) -> None:
    where = {"limit": ALIKE, "steps": STEPS, "device": row["device"], "torch": row["torch"]}
    same = all(before.get(name) == value for name, value in where.items())
    now = {_entry(each) for each in found}
    others = [each for each in before["runs"] if _entry(each) not in now] if same else []
    passed = len(found) == wanted and all(each["alike"] for each in (*others, *found))
    tree = {"passed": passed, "wanted": wanted + len(others), **where, "runs": [*others, *found]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(tree, indent=1) + "\n")


def _entry(each: Mapping[str, Any]) -> str:
    return get_run(each["run"]).entry.name


def _families(size: BenchSize, entries: Sequence[Entry]) -> list[list[list[BenchRun]]]:
    """By family, for each kind of merge two runs of the first entry that has it, apart in rate and
    seed."""
    merges: dict[tuple[str, bool, bool, str], Entry] = {}
    for entry in entries:
        merges.setdefault(entry.merge(DEPTH), entry)
    found: dict[Family, list[list[BenchRun]]] = {}
    for entry in merges.values():
        pair = [
            BenchRun(entry=entry, depth=DEPTH, width=size.width, rate=rate, seed=seed)
            for seed, rate in enumerate(RATES)
        ]
        found.setdefault(family(pair[0]), []).append(pair)
    return list(found.values())
