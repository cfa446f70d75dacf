"""A size of seconds, and rows made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mvsplit.reproduce.depth.plan import SMALL, BenchRun, Entry, get_entries
from mvsplit.reproduce.depth.run import head

TINY = replace(
    SMALL,
    name="tiny",
    depths=(2, 3, 4),
    width=16,
    steps=20,
    warmup=2,
    batch_size=4,
    rates=(1e-3, 3.2e-3, 1e-2),
    seeds=(0, 1, 2),
    shapes=((3, 16), (1, 32)),
    validation=8,
    pictures=6,
    drawing=2,
    probes=2,
)


def entry(name: str = "mvsplit-root") -> Entry:
    (found,) = get_entries([name])
    return found


def row(
    rate: float,
    loss: float | None,
    *,
    name: str = "mvsplit-root",
    depth: int = 2,
    width: int = 16,
    seed: int = 0,
    **fields: Any,
) -> dict[str, Any]:
    """A finished run; it lives unless its loss is None."""
    run = BenchRun(entry=entry(name), depth=depth, width=width, rate=rate, seed=seed)
    lives = {"validation_loss": loss, "lives": loss is not None, "ended": "finished"}
    kept = {"curve": [1.0, 0.9], "seconds_a_step": 0.1, "seconds": 2.0, "floor": 1.0}
    kept |= {"collapse_step": None, "collapse_seconds": None, "watch": None, "tasks": None}
    kept |= {"similarity": 0.1, "peak_gib": None, "device": "cpu", "torch": "2.13.0"}
    return head(run, TINY) | lives | kept | fields
