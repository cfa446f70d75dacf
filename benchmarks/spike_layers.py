"""Question: do the layers show a mean-mode collapse at the step at which the writers spike?

    python benchmarks/spike_layers.py [--only PART] [--json FILE]

Runs of the corpus (record_runs.py, the tuned ones alone) are trained to two steps after their
spike, with a look at every layer of each of the last steps. A row is one step: the similarity of
the tokens (TCS) and G_mean / G_ctr, as the median of the deepest quarter, which the detector reads,
and the largest of any layer; and both parts of the gradients of all writers together.

Cost: about half a minute on one CPU core for each run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from corpus import Run, corpus
from record_runs import intervene, rounded

from mvsplit.diagnostics import LayerProbe
from mvsplit.diagnostics.signals import LayerSignals
from mvsplit.training import build_state, train_step

SPIKES = {  # run: the step of its spike, as detector_live.py has it
    "plain-l32-d32-lr0.012": 104,
    "jump-plain-x30-seed0": 146,
    "jump-plain-x80-seed0": 141,
    "jump-layerscale-x80-seed0": 141,
    "disturbed-plain-lr-x100": 121,
    "jump-mvsplit-x80-seed0": 141,  # diverges without a mean mode
}
AROUND = (-1, 0, 1, 2)


def looks(run: Run, spike: int) -> Iterator[dict[str, Any]]:
    """The rows of a run, each seen before the update of its step."""
    experiment = run.experiment()
    state = build_state(experiment)
    base_lr = state.schedule
    for step in range(1, spike + AROUND[-1] + 1):
        for deed in run.interventions:
            if deed.step == step:
                intervene(state, deed, base_lr)
        due = step - spike in AROUND
        with LayerProbe(state.taps) if due else nullcontext() as look:
            metrics = train_step(state, experiment.train)
        if look is not None:
            yield {"run": run.name, "after_spike": step - spike, **row(metrics, look.arrays())}


def row(metrics: dict[str, float], arrays: dict[str, Any]) -> dict[str, Any]:
    """What a look shows."""
    deep = LayerSignals.of({"step": 0, **arrays})
    assert deep is not None
    writers = [(arrays[f"g_mean_{b}"], arrays[f"g_ctr_{b}"]) for b in ("attn", "ffn")]
    pairs = [pair for means, rests in writers for pair in zip(means, rests, strict=True)]
    numbers = {
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "tcs_deep": deep.similarity,
        "tcs_most": max(arrays["tcs"]),
        "ratio_deep": deep.mode_ratio,
        "ratio_most": max(mean / rest for mean, rest in pairs if rest > 0),
        "g_mean": math.hypot(*(mean for mean, _ in pairs)),
        "g_ctr": math.hypot(*(rest for _, rest in pairs)),
    }
    return {name: rounded(value, 3) for name, value in numbers.items()}


def table(result: dict[str, Any]) -> str:
    """The rows as docs/detector.md shows them."""
    lines = [
        "| run | steps after the spike | loss | TCS deep, any layer | "
        "G_mean / G_ctr deep, any layer | G_mean, G_ctr of all writers |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        cells = [r["run"], f"{r['after_spike']}", f"{r['loss']:.2f}"]
        cells += [f"{r['tcs_deep']:.2f}, {r['tcs_most']:.2f}"]
        cells += [f"{r['ratio_deep']:.3g}, {r['ratio_most']:.3g}"]
        cells += [f"{r['g_mean']:.3g}, {r['g_ctr']:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def medians(rows: Sequence[dict[str, Any]], after: int) -> dict[str, float]:
    """Over the collapsing runs, so many steps after the spike."""
    here = [r for r in rows if r["after_spike"] == after and "mvsplit" not in r["run"]]
    names = ("tcs_deep", "tcs_most", "ratio_deep", "ratio_most")
    return {name: rounded(statistics.median(r[name] for r in here), 3) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the result here, adding to it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    there = options.json is not None and options.json.exists()
    result = json.loads(options.json.read_text()) if there else {"rows": []}
    runs = {run.name: run for run in corpus() if not run.held_out}
    for name, spike in SPIKES.items():
        if options.only in name and all(r["run"] != name for r in result["rows"]):
            result["rows"] += looks(runs[name], spike)
            result |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
            result["medians"] = {f"{n}": medians(result["rows"], n) for n in AROUND}
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
