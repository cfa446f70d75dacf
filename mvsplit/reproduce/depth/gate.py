"""What must hold before runs that are trained as one count as runs: each is what it is alone."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, get_entries
from mvsplit.reproduce.depth.run import read_rows, run_bench
from mvsplit.reproduce.depth.together import run_together

NAMES = ("mvsplit-root", "plain", "layerscale-0.01", "rezero", "deepnorm", "alpha-free")
DEPTH, STEPS = 6, 40
RATES = (3.2e-4, 1e-3)  # at which all are calm: a spike makes much of rounding
CURVE, LOSS = 0.02, 0.03  # of the losses; a step in bf16 rounds by 0.4%


def check_together(size: BenchSize) -> None:
    """Trains a few shallow networks one by one and as one, at two rates and seeds, and compares
    training losses and validation losses.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    short = replace(size, steps=STEPS, warmup=5, validation=32, pictures=2, drawing=1)
    runs = [
        BenchRun(entry=entry, depth=DEPTH, width=size.width, rate=rate, seed=i % 2)
        for i, entry in enumerate(get_entries([*NAMES]))
        for rate in RATES
    ]
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as one:
        run_together(runs, short, Path(one))
        for run in runs[::3]:
            run_bench(run, short, Path(alone))
        together = {row["run"]: row for row in read_rows(Path(one))}
        apart: dict[str, list[float]] = {"curve": [], "validation_loss": []}
        for row in read_rows(Path(alone)):
            other = together[row["run"]]
            pairs = zip(row["curve"], other["curve"], strict=True)
            apart["curve"] += [abs(a / b - 1) for a, b in pairs]
            apart["validation_loss"] += [abs(row["validation_loss"] / other["validation_loss"] - 1)]
            if row["fingerprint"] != other["fingerprint"]:
                raise RuntimeError(f"{row['run']} is another experiment as part of an ensemble")
    words = ", ".join(f"{name} within {max(values):.1e}" for name, values in apart.items())
    limits = {"curve": CURVE, "validation_loss": LOSS}
    if not all(share < limits[name] for name in apart for share in apart[name]):  # NaN is not
        raise RuntimeError(f"runs that are trained as one differ from those alone: {words}")
    print(f"check: runs as one are what they are alone; {words}", flush=True)
