"""Records the corpus that the detector is measured on, results/recorded: a file a run, a manifest.

    python benchmarks/record_runs.py [--out FOLDER] [--only PART] [--budget SECONDS] [--workers N]

Each run is mvsplit.training's own step in a loop of its own, with the interventions of the run and
a look into the layers every few steps; a file holds the lines of metrics.jsonl and layers.jsonl in
the order in which they came, rounded, at most 32 layers of them. It runs on the CPU, 6
minutes on 16 cores. Runs that are in the manifest are not recorded again.

The truth about a run is a rule on its end (`truth`), which looks at no verdict of the detector.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from corpus import FOLDER, Intervention, Run, corpus, read_manifest, read_records
from torch import Tensor

from mvsplit.data import Batch
from mvsplit.diagnostics import LayerProbe
from mvsplit.reproduce.workers import worker_pool
from mvsplit.training import NonFiniteError, TrainState, build_state, train_step

PROBE_FIELDS = (
    "tcs",
    "rho",
    *(f"{n}_{b}" for b in ("attn", "ffn") for n in ("tr_ratio", "var_gain", "g_mean", "g_ctr")),
    "grad_query",
    "grad_key",
)
MOST_LAYERS = 32

# The truth about a run. The rules for collapsed, diverged and healthy were written before the first
# was recorded; `recovered` and the lock-in were added when the first recordings showed them.
COLLAPSED_SIMILARITY = 0.98  # median token similarity of the deepest quarter, last three probes
FLOOR_SHARE = 0.9  # of the loss of a network whose tokens are all alike
DIVERGED_RATIO = 1.25  # loss of the last tenth over the lowest of any tenth
LOCKED_IN = 1e-2  # share of the writers' gradients that still reaches Q and K
SPIKE = 5.0  # writer gradient over the median of the 20 steps before


class _OneBadBatch:
    """A loader whose next batch has its pictures multiplied, the others as they are."""

    def __init__(self, loader: Any, factor: float) -> None:
        self.loader, self.factor = loader, factor

    @property
    def position(self) -> int:
        return self.loader.position

    def next_batch(self) -> Batch:
        batch = self.loader.next_batch()
        factor, self.factor = self.factor, 1.0
        return dataclasses.replace(batch, latents=batch.latents * factor)


def intervene(state: TrainState, deed: Intervention, base_lr: Any) -> None:
    """Does to the run what `deed` says; its step is the next."""
    if deed.deed == "lr":
        state.schedule = lambda step: base_lr(step) * deed.amount
    elif deed.deed == "lr-once":
        state.schedule = lambda step: base_lr(step) * (deed.amount if step == deed.step else 1)
    elif deed.deed == "bad-batch":
        state.loader = _OneBadBatch(state.loader, deed.amount)  # type: ignore[assignment]
    elif deed.deed == "lose-moments":
        state.optimizer.forget()
    else:
        state.loader.position += int(deed.amount)


def lines(run: Run) -> Iterator[dict[str, Any]]:
    """The run's lines: metrics at each step, layers after each look into them."""
    experiment = run.experiment()
    state = build_state(experiment)
    base_lr = state.schedule
    for step in range(1, run.steps + 1):
        for deed in run.interventions:
            if deed.step == step:
                intervene(state, deed, base_lr)
        due = step % run.probe_every == 0
        probe = LayerProbe(state.taps, fields=PROBE_FIELDS) if due else nullcontext()
        with probe as look:
            try:
                metrics = train_step(state, experiment.train)
            except NonFiniteError:
                yield {"step": step, "loss": math.nan, "grad_norm": math.nan}
                return
        metrics.pop("tokens")
        yield {"step": step, **{name: rounded(v) for name, v in metrics.items()}}
        if look is not None:
            yield {"step": step, **thinned(look.arrays())}


def thinned(arrays: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """At most `MOST_LAYERS` of the layers, evenly, the last among them."""
    stride = -(-len(arrays["layer"]) // MOST_LAYERS)
    kept = {name: values[::-stride][::-1] for name, values in arrays.items()}
    return {name: [rounded(v, digits=3) for v in values] for name, values in kept.items()}


def rounded(value: Any, digits: int = 4) -> Any:
    """So many significant digits."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def token_floor(run: Run) -> float:
    """The loss of a network that answers every image token alike, and otherwise perfectly: the
    energy of the centered part P(x0 − x1) of the target, a number of the data alone."""
    experiment = dataclasses.replace(run, batch_size=256).experiment()
    data = build_state(dataclasses.replace(experiment, model=_smallest(experiment.model))).loader
    x0 = data.next_batch().latents
    target = x0 - torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    tokens = patches(target, experiment.model.patch)
    return float((tokens - tokens.mean(1, keepdim=True)).square().mean())


def _smallest(model: Any) -> Any:
    return dataclasses.replace(model, depth=1)


def patches(pictures: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, T, patch²·C]."""
    return torch.nn.functional.unfold(pictures, patch, stride=patch).mT


def truth(records: Sequence[dict[str, Any]], floor: float) -> dict[str, Any]:
    """What became of a run: collapsed, diverged, recovered, healthy, or unclear.

    collapsed: the tokens of the deepest quarter are alike and the loss is at least 0.9 of the floor
    of such a network. diverged: not so, but non-finite or 1.25 above the best tenth of the run.
    recovered: neither at its end, but three looks into it or more found the deep tokens alike.
    healthy: none of these, and below 0.9 of the floor. unclear: the rest, such as a run that never
    left its start.
    """
    losses = [r["loss"] for r in records if "loss" in r]
    similarities = [deep_similarity(r["tcs"]) for r in records if "tcs" in r]
    similarity = statistics.median(similarities[-3:]) if similarities else math.nan
    alike = sum(value > COLLAPSED_SIMILARITY for value in similarities)
    tenth = max(len(losses) // 10, 1)
    tenths = [statistics.fmean(losses[i : i + tenth]) for i in range(0, len(losses), tenth)]
    end = statistics.fmean(losses[-tenth:])
    if math.isfinite(end) and similarity > COLLAPSED_SIMILARITY and end >= FLOOR_SHARE * floor:
        label = "collapsed"
    elif not math.isfinite(end) or end > DIVERGED_RATIO * min(tenths):
        label = "diverged"
    elif alike >= 3:
        label = "recovered"
    else:
        label = "healthy" if end < FLOOR_SHARE * floor else "unclear"
    return {
        "label": label,
        "deep_similarity": rounded(similarity),
        "loss_end": rounded(end) if math.isfinite(end) else None,
        "loss_floor": rounded(floor),
        "spike_step": spike_step(records),
        "lock_in_step": lock_in_step(records),
    }


def deep_similarity(tcs: Sequence[float | None]) -> float:
    """The median over the deepest quarter, rounded up, of the layers that were recorded."""
    deep = [v for v in tcs[len(tcs) - -(-len(tcs) // 4) :] if v is not None]
    return statistics.median(deep) if deep else math.nan


def lock_in_step(records: Sequence[dict[str, Any]]) -> int | None:
    """The step from which on, to the end, Q and K receive less than `LOCKED_IN` of the writers'
    gradients (five steps at least); None where there is no such step."""
    steps = [r for r in records if "loss" in r and "grad_query" in r]
    attention = (math.hypot(r["grad_query"], r["grad_key"]) for r in steps)
    writers = (math.hypot(r["grad_writer_attn"], r["grad_writer_ffn"]) for r in steps)
    open_steps = [a >= LOCKED_IN * w for a, w in zip(attention, writers, strict=True)]
    first = max((place + 1 for place, is_open in enumerate(open_steps) if is_open), default=0)
    return steps[first]["step"] if first + 5 <= len(steps) else None


def spike_step(records: Sequence[dict[str, Any]]) -> int | None:
    """The first step whose writer gradient is `SPIKE` times the median of the 20 steps before,
    once ten steps have been taken; None where there is no such step."""
    for name in ("grad_writer_attn", "grad_writer_ffn"):
        past: list[float] = []
        for record in (r for r in records if "loss" in r and name in r):
            if len(past) >= 10 and record[name] > SPIKE * statistics.median(past[-20:]):
                return record["step"]
            past.append(record[name])
    return None


def record(run: Run, folder: Path) -> dict[str, Any]:
    """Records one run and returns its row of the manifest."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    records = list(lines(run))
    file = folder / f"{run.name}.jsonl.gz"
    text = "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records)
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return {
        "name": run.name,
        "file": file.name,
        "command": f"python benchmarks/record_runs.py --only {run.name} --out FOLDER",
        "held_out": run.held_out,
        "environment": {"torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(time.perf_counter() - began, 1),
        "run": dataclasses.asdict(run),
        "truth": truth(records, token_floor(run)),
    }


def record_all(runs: Sequence[Run], folder: Path, workers: int, budget: float) -> dict[str, Any]:
    """Records the runs side by side; those not begun within `budget` seconds are left out."""
    end = time.monotonic() + budget
    with worker_pool(workers) as pool:
        jobs: dict[str, Future[Any]] = {
            r.name: pool.submit(record_in_time, r, folder, end)
            for r in sorted(runs, key=lambda r: -r.depth * r.steps)
        }
        failed = {name: str(job.exception()) for name, job in jobs.items() if job.exception()}
        rows = {name: job.result() for name, job in jobs.items() if name not in failed}
    done = [rows[r.name] for r in runs if rows.get(r.name)]
    return {
        "left_out": [r.name for r in runs if not rows.get(r.name)],
        "failed": failed,
        "runs": done,
    }


def record_in_time(run: Run, folder: Path, end: float) -> dict[str, Any] | None:
    """`record`, or None once `end` of the monotonic clock, which all processes share, is past."""
    if time.monotonic() > end:
        return None
    row = record(run, folder)
    print(f"{row['seconds']:6.1f} s  {row['truth']['label']:10}{run.name}", flush=True)
    return row


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the manifest in `folder`, by name; they are not recorded again."""
    if not (folder / "manifest.json").exists():
        return {}
    return {row["name"]: row for row in read_manifest(folder)["runs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds in which to begin")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [r for r in corpus() if options.only in r.name]
    there = recorded(options.out)
    manifest = record_all(
        [r for r in wanted if r.name not in there], options.out, options.workers, options.budget
    )
    rows = there | {row["name"]: row for row in manifest["runs"]}
    manifest["runs"] = [rows[r.name] for r in corpus() if r.name in rows]
    for row in manifest["runs"]:  # by the rules as they now are
        floor = row["truth"]["loss_floor"]
        row["truth"] = truth(read_records(options.out / row["file"]), floor)
    (options.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    labels = [row["truth"]["label"] for row in manifest["runs"]]
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    print(f"{counts}, left out: {manifest['left_out']}, failed: {manifest['failed']}")


if __name__ == "__main__":
    main()
