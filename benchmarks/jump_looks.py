"""Question: what do the layers of a plain network show, by depth, when it goes into the collapse?

    python benchmarks/jump_looks.py RUN … [--beside FOLDER] [--json FILE]

RUN: folders of runs with a rise of the learning rate, as `mvsplit reproduce modes --size gpu`
leaves them in OUT/gpu/runs. Each look from 40 steps before the rise on is a row. Norms are over the
layers together (L2), shares are of their squares; a layer has its tokens alike from a similarity of
0.95 on. A − 1 (`excess`) and its envelope (T − 1)κ̂ are medians over layers. `settled`: from which
look on, to the last, the tokens of the deepest quarter are alike. FOLDER holds runs of the same
names, made before; `same_losses`: for how many steps from the first the losses are theirs to the
bit.

Cost: a few seconds on one CPU core; no training.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

from mvsplit.reproduce.runlog import ALIKE, BEFORE, Array, RunLog
from mvsplit.training.files import read_lines

WRITERS = {"W_O": "attn", "W_2": "ffn"}
QUARTERS = 4


def rounded(value: float) -> float | None:
    """To four digits; None for what is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def by_quarter(values: Array) -> list[Array]:
    """Of [L]: the layers in four parts, the shallowest first."""
    return np.array_split(values, QUARTERS)


def writer(look: dict[str, Any], end: str, alike: Array) -> dict[str, Any]:
    """What a look [L] shows of one writer."""
    mean, centered, amplification, envelope = (
        np.asarray([np.nan if v is None else v for v in look[f"{name}_{end}"]], float)
        for name in ("g_mean", "g_ctr", "amplification", "envelope")
    )
    row: dict[str, Any] = {}
    for name, values in (("mean", mean), ("ctr", centered)):
        squares = np.square(values)
        row[f"g_{name}"] = rounded(float(np.sqrt(squares.sum())))
        shares = [part.sum() / squares.sum() for part in by_quarter(squares)]
        row[f"{name}_by_quarter"] = [round(float(share), 3) for share in shares]
    row["last_layer"] = round(float(np.square(mean[-1]) / np.square(mean).sum()), 3)
    for words, chosen in (("", alike >= 0), ("_alike", alike >= ALIKE)):
        there = chosen & np.isfinite(amplification) & np.isfinite(envelope)
        for name, values in (("excess", amplification - 1), ("envelope", envelope)):
            row[name + words] = rounded(float(np.median(values[there]))) if there.any() else None
    return row


def looks(run: Path) -> list[dict[str, Any]]:
    """The rows of a run."""
    record = json.loads((run / "trial.json").read_text("utf-8"))
    losses = {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl")}
    rows = []
    for look in read_lines(run / "layers.jsonl"):
        if look["step"] <= record["jump"] - BEFORE:
            continue
        similarity = np.asarray(look["tcs"], float)
        parts = [round(float(part.mean()), 3) for part in by_quarter(similarity)]
        rows.append(
            {
                "step": look["step"],
                "loss_over_floor": rounded(losses[look["step"]] / record["floor"]),
                "similarity_by_quarter": parts,
                "alike": int((similarity >= ALIKE).sum()),
                **{name: writer(look, end, similarity) for name, end in WRITERS.items()},
            }
        )
    return rows


def settled(run: Path) -> float | None:
    """The step of the look from which on the deepest quarter has its tokens alike."""
    lines = list(read_lines(run / "layers.jsonl"))
    empty: dict[str, Any] = {"label": "", "seed": 0, "steps": 0, "record": {}, "metrics": ()}
    return RunLog(**empty, layers=lines).settled


def same_losses(run: Path, other: Path) -> int:
    """For how many steps from the first the losses of two runs are the same to the bit."""
    ours, theirs = (
        {line["step"]: line["loss"] for line in read_lines(folder / "metrics.jsonl")}
        for folder in (run, other)
    )
    step = 0
    while step + 1 in ours and ours[step + 1] == theirs.get(step + 1):
        step += 1
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--beside", type=Path, help="run folders of the same names")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for run in options.runs:
        record = json.loads((run / "trial.json").read_text("utf-8"))
        found[run.name] = {"seed": record["seed"], "jump": record["jump"], "settled": settled(run)}
        if options.beside is not None:
            other = options.beside / run.name
            steps = sum(1 for _ in read_lines(other / "metrics.jsonl"))
            beside = {"steps": steps, "same_losses": same_losses(run, other)}
            found[run.name]["beside"] = beside | {"settled": settled(other)}
        found[run.name]["looks"] = looks(run)
    environment = json.loads((options.runs[0] / "environment.json").read_text("utf-8"))
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/jump_looks.py RUN … --beside FOLDER --json FILE",
        "device": environment["device_name"],
        "torch": environment["versions"]["torch"],
        "runs": found,
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    if options.json is None:
        print(text)
    else:
        options.json.write_text(compact(text) + "\n", encoding="utf-8")


def compact(text: str) -> str:
    """JSON of one row a line."""
    tree = json.loads(text)
    lines = []
    for name, run in tree.pop("runs").items():
        rows = ",\n   ".join(json.dumps(row, ensure_ascii=False) for row in run.pop("looks"))
        head = json.dumps(run)[1:-1]
        lines.append(f'  {json.dumps(name)}: {{{head}, "looks": [\n   {rows}\n  ]}}')
    head = json.dumps(tree, indent=1, ensure_ascii=False)[:-2]
    return f'{head},\n "runs": {{\n' + ",\n".join(lines) + "\n }\n}"


if __name__ == "__main__":
    main()
