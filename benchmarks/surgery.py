"""Claim: a plain network taken 50 steps before its collapse trains on as an MV-Split network.

    python benchmarks/surgery.py [--regime digits-32-late] [--seeds 0] [--json FILE] [--plot FILE]

The plain network is trained until it is dead, with the watch looking on; the step of its first
alarm, where the rate jumps of the first one after that, is the collapse. The newest checkpoint at
least 50 steps before it is then turned into MV-Split as `mvsplit train --split-from` does, and goes
on with the same data and the learning rates that killed the plain one. Beside it: the checkpoint as
it is, going on in the same way (it has to die again), and the network that had MV-Split from the
start. Regimes are those of policies.py.
Gate: on samples of its own the network after the surgery has the loss that it had before, to the
bit in fp32.

Cost: for each seed a minute and a half (digits-32-late, the default) or three minutes
(digits-64-jump) on one CPU core. shapes-400-jump, on one H200 shared with a dozen other programs:
six minutes for the plain network, three for each network that goes on from its checkpoint (in
processes of their own with --have, then --add).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from policies import REFERENCE, REGIMES, Jump, Regime, Trial, environment, final_loss, trials

from mvsplit.cli.start import starter
from mvsplit.training import Experiment, Observer, Origin, TrainState, train
from mvsplit.training.checkpoint import list_checkpoints, step_of
from mvsplit.training.files import read_lines

BEFORE = 50  # steps before the collapse
EVERY = 10  # steps between checkpoints
GAINS = (1 / 16, 1 / 64, 1.0)
SLOW = (1 / 16, 1 / 64)  # gains that learn at the same share of the rate
PLAIN, AGAIN = "plain", "no surgery"


class Later(Observer):
    """The learning rates of a run that goes on from step `since` of another."""

    def __init__(self, regime: Regime, since: int) -> None:
        self.jump, self.since = Jump(regime), since

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        self.jump.on_start(state, experiment)
        before = state.schedule
        state.schedule = lambda step: before(step + self.since)


def run(
    regime: Regime,
    trial: Trial,
    seed: int,
    folder: Path,
    since: int = 0,
    origin: Any = None,
    gain_lr: float = 1.0,
) -> dict[str, Any]:
    """Trains to the end of the regime, from step `since` on."""
    wanted = regime.experiment(trial, seed)
    steps = regime.steps - since
    every = EVERY if regime.device == "cpu" else regime.save_every
    config = replace(wanted.train, steps=steps, save_every=every, keep=10**6, gain_lr=gain_lr)
    wanted = replace(wanted, train=config, origin=origin)
    began = time.perf_counter()
    train(wanted, folder, observers=[Later(regime, since)], start=starter(wanted))
    lines = read_lines(folder / "metrics.jsonl")
    return {
        "since": since,
        "losses": [float(f"{line['loss']:.4g}") for line in lines],
        "loss": final_loss(wanted, folder),
        "alarms": [
            [e["at_step"] + since, e["verdict"]]
            for e in read_lines(folder / "events.jsonl")
            if e["event"] == "alarm"
        ],
        "seconds": round(time.perf_counter() - began, 1),
    }


def source_of(folder: Path, alarm: int) -> Path:
    """The newest checkpoint at least `BEFORE` steps before the alarm."""
    good = [p for p in list_checkpoints(folder / "checkpoints") if step_of(p) <= alarm - BEFORE]
    if not good:
        raise SystemExit(f"the collapse came at step {alarm}: there is nothing {BEFORE} before it")
    return good[-1]


def gate(regime: Regime, trial: Trial, source: Path, folder: Path) -> list[float]:
    """The loss before the surgery and after it, before a step; exits where it is another."""
    wanted = regime.experiment(trial, 0)
    before = final_loss(wanted, source.parent.parent, source)
    split = folder / "checkpoints" / "step_00000000"
    after = final_loss(wanted, folder, split)
    exact = regime.precision == "fp32"
    if before != after if exact else abs(after / before - 1) > 1e-3:
        raise SystemExit(f"gate failed: the surgery took the loss from {before} to {after}")
    print(f"gate: {before} before and {after} after the surgery", flush=True)
    return [before, after]


def measure(
    options: argparse.Namespace, seed: int, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Runs one seed: plain, split with each gain, plain from the checkpoint, the reference. `keep`
    is handed each row when it is known. Where an earlier process has seen the plain network die, it
    is trained only as far as the checkpoint lies."""
    name, known = options.regime, {trial.name: trial for trial in trials()}
    regime, plain, reference = options.wanted, known["plain, record"], known[REFERENCE]

    def note(way: str, trial: Trial, where: str, *start: Any) -> Any:
        if time.perf_counter() > options.until:
            print("no time for", way, seed, flush=True)
            return None
        found = run(regime, trial, seed, folder / where, *start)
        row = {"regime": name, "way": way, "seed": seed, **found}
        keep(row)
        shown = {k: v for k, v in row.items() if k != "losses"}
        print(way, seed, json.dumps(shown), flush=True)
        return row

    seen = [row for row in options.seen if (row["regime"], row["seed"]) == (name, seed)]
    first = seen[0] if seen else note(PLAIN, plain, "plain")
    died = [at for at, _ in first["alarms"] if at > regime.jump]
    if not died:
        raise SystemExit(f"{name}, seed {seed}: the plain network did not collapse")
    if seen:
        run(replace(regime, steps=died[0] - BEFORE), plain, seed, folder / "plain")
    source = source_of(folder / "plain", died[0])
    since = step_of(source)
    kept = Origin(source=str(source), ema=False, optimizer="kept")
    for gain in options.gains:
        trial = replace(plain, reaction=replace(plain.reaction, gain=gain))
        where = f"split-{gain:g}"
        row = note(f"surgery, gain {gain:g}", trial, where, since, replace(kept, split=True))
        if row:
            keep(row | {"gate": gate(regime, trial, source, folder / where)})
    for gain in options.slow:
        trial = replace(plain, reaction=replace(plain.reaction, gain=gain))
        way = f"surgery, gain {gain:g}, gains at {gain:g} of the rate"
        note(way, trial, f"slow-{gain:g}", since, replace(kept, split=True), gain)
    for way in options.beside:
        if way == REFERENCE:
            note(way, reference, "reference")
        else:
            note(way, plain, "again", since, kept)


def table(result: dict[str, Any]) -> str:
    """The result as docs/surgery.md shows it: the losses at the end, one for each seed."""
    rows = result["rows"]
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    lines = ["| | " + " | ".join(regimes) + " |", "|---" * (len(regimes) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for regime in regimes:
            here = [r for r in rows if (r["regime"], r["way"]) == (regime, way)]
            here = sorted(here, key=lambda r: r["seed"])
            named = "" if [r["seed"] for r in here] == list(range(len(here))) else "seed {seed}: "
            shown = [f"{named.format(seed=r['seed'])}{r['loss']:.3f}" for r in here]
            cells.append(", ".join(shown) or "–")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def before_jump(result: dict[str, Any], regime: str, seed: int = 0) -> str:
    """Of each way the mean loss of the batch over the ten steps before the rate jumps, in words."""
    rows = [r for r in result["rows"] if (r["regime"], r["seed"]) == (regime, seed)]
    found = []
    for row in rows:
        until = REGIMES[regime].jump - row["since"]
        found.append(f"{row['way']} {statistics.mean(row['losses'][until - 10 : until]):.2f}")
    return "; ".join(found)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["seed"] == 0]
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(regimes), figsize=(4.2 * len(regimes) + 2, 3.3), squeeze=False
    )
    for axis, regime in zip(axes[0], regimes, strict=True):
        here = [row for row in rows if row["regime"] == regime]
        for row in here:
            steps = range(row["since"] + 1, row["since"] + len(row["losses"]) + 1)
            axis.plot(steps, row["losses"], linewidth=1, label=row["way"])
        split = next(row for row in here if row["way"].startswith("surgery"))
        axis.axvline(split["since"], color="gray", linewidth=0.6, linestyle=":")
        axis.set(title=regime, xlabel="step", yscale="log")
    axes[0][0].set_ylabel("loss of the batch")
    axes[0][0].legend(
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(len(regimes) * 1.2 - 0.15, 0.5),
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--regime", choices=REGIMES, default="digits-32-late")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gains", type=float, nargs="*", default=GAINS)
    parser.add_argument("--slow", type=float, nargs="*", default=SLOW)
    parser.add_argument(
        "--beside", nargs="*", choices=(REFERENCE, AGAIN), default=(REFERENCE, AGAIN)
    )
    parser.add_argument("--json", type=Path, help="adds its rows to this file")
    parser.add_argument("--from", dest="known", action="store_true", help="only draw what is there")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="FILEs of other processes")
    parser.add_argument("--plot", type=Path, help="also draw the curves of seed 0 here")
    parser.add_argument("--steps", type=int, help="instead of those of the regime")
    parser.add_argument("--have", type=Path, help="where the plain network is known to die, a FILE")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds to begin a run in")
    parser.add_argument("--note", help="kept with the result: who else used the GPU, for example")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    options.until = time.perf_counter() + options.budget
    options.wanted = REGIMES[options.regime]
    if options.steps:
        options.wanted = replace(options.wanted, steps=options.steps)
    have = json.loads(options.have.read_text())["rows"] if options.have else []
    options.seen = [row for row in have if row["way"] == PLAIN]
    torch.set_num_threads(1)
    there = options.json is not None and options.json.exists()
    result = json.loads(options.json.read_text()) if there else {"environment": [], "rows": []}

    def keep(row: dict[str, Any]) -> None:
        same = ("regime", "way", "seed")
        others = [r for r in result["rows"] if any(r[key] != row[key] for key in same)]
        result["rows"] = [*others, row]
        if options.json:
            options.json.write_text(json.dumps(result) + "\n")

    for other in (json.loads(path.read_text()) for path in options.add):
        result["environment"] += other["environment"]
        for row in other["rows"]:
            keep(row)
    for seed in () if options.known else options.seeds:
        result["environment"].append(environment() | {"note": options.note})
        with tempfile.TemporaryDirectory() as folder:
            measure(options, seed, Path(folder), keep)
    print(table(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
