"""What must hold before runs that are trained as one count as runs: each is what it is alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mvsplit.reproduce.depth.ensemble import Family
from mvsplit.reproduce.depth.groups import family
from mvsplit.reproduce.depth.plan import ENTRIES, BenchRun, BenchSize, Entry
from mvsplit.reproduce.depth.run import read_rows, run_bench
from mvsplit.reproduce.depth.together import run_together

DEPTH, STEPS = 6, 40
RATES = (3.2e-4, 1e-3)  # at which all are calm: a spike makes much of rounding
# Of a loss: a third of what counts as a tie between entries (`verdict.TIE`). Rounding, which both
# ways do in other places, makes less: 2.4e-4 in bf16 on a CPU, nothing in fp32.
ALIKE = 0.01


def check_together(size: BenchSize, entries: Sequence[Entry] = ENTRIES) -> None:
    """Trains shallow networks, two of each rule among `entries`, as one for each family, and one of
    each rule alone, and compares training and validation losses.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    short = replace(size, steps=STEPS, warmup=5, validation=32, pictures=2, drawing=1)
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as one:
        for pairs in _families(size, entries):
            run_together([run for pair in pairs for run in pair], short, Path(one))
            for number, pair in enumerate(pairs):
                run_bench(pair[number % 2], short, Path(alone))
        together = {row["run"]: row for row in read_rows(Path(one))}
        rows = read_rows(Path(alone))
    apart: dict[str, list[float]] = {"curve": [], "validation_loss": []}
    for row in rows:
        other = together[row["run"]]
        steps = zip(row["curve"], other["curve"], strict=True)
        apart["curve"] += [abs(a / b - 1) for a, b in steps]
        apart["validation_loss"] += [abs(row["validation_loss"] / other["validation_loss"] - 1)]
        if row["fingerprint"] != other["fingerprint"]:
            raise RuntimeError(f"{row['run']} is another experiment as part of an ensemble")
    words = ", ".join(f"{name} within {max(values):.1e}" for name, values in apart.items())
    if not all(share < ALIKE for shares in apart.values() for share in shares):  # NaN is not
        raise RuntimeError(f"runs that are trained as one differ from those alone: {words}")
    print(f"check: {len(rows)} runs as one are what they are alone; {words}", flush=True)


def _families(size: BenchSize, entries: Sequence[Entry]) -> list[list[list[BenchRun]]]:
    """By family, for each rule two runs of the first entry that has it, apart in rate and seed."""
    rules: dict[tuple[str, bool], Entry] = {}
    for entry in entries:
        rule = entry.rule(DEPTH)
        rules.setdefault((rule.name, rule.tied_leak), entry)
    found: dict[Family, list[list[BenchRun]]] = {}
    for entry in rules.values():
        pair = [
            BenchRun(entry=entry, depth=DEPTH, width=size.width, rate=rate, seed=seed)
            for seed, rate in enumerate(RATES)
        ]
        found.setdefault(family(pair[0]), []).append(pair)
    return list(found.values())
