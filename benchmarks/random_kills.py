"""Claim: killed at random fifty times, a run loses nothing but the steps since its last save.

A tiny network trains on two processes, which meet as under torchrun. Again and again one of them,
or both, are killed (kill −9) at a random moment, starting up and saving included; the same command
is given again. In the end the run's weights, averages, moments, data position, random states and
losses must be, bit for bit, those of a run that nobody disturbed.

    python benchmarks/random_kills.py [--kills 50] [--json FILE]

Cost: about eight minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from mvsplit.errors import UserError
from mvsplit.presets import get_preset
from mvsplit.training import Experiment, train
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint, step_of
from mvsplit.training.config import ParallelConfig
from mvsplit.training.files import read_lines

PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["mvsplit.training", "sklearn.datasets", "torch.distributed.fsdp", "torch._dynamo"]
WORLD = 2
MOST_STEPS = 9  # that a life is given before its end is rolled for
TIMES = ("seconds", "tokens_per_second")


def experiment(steps: int, save_every: int) -> Experiment:
    preset = get_preset("tiny")
    config = replace(
        preset.train,
        steps=steps,
        save_every=save_every,
        device="cpu",
        parallel=ParallelConfig(unit=2, timeout=60.0),
    )
    return replace(preset, train=config)


def start(run: Path, what: Experiment, store: TCPStore, attempt: int) -> list[Any]:
    """The processes of the run, as torchrun would start them."""
    arguments = (run, what, store.port, attempt)
    processes = [PROCESSES.Process(target=_rank, args=(r, *arguments)) for r in range(WORLD)]
    for process in processes:
        process.start()
    return processes


def _rank(rank: int, run: Path, what: Experiment, port: int, attempt: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # of connections that are lost on purpose
    try:
        train(what, run)
    except UserError:  # the other process was killed
        os._exit(2)


def lines(run: Path) -> list[dict[str, Any]]:
    return read_lines(run / "metrics.jsonl")


def newest(run: Path) -> int:
    saved = list_checkpoints(run / "checkpoints")
    return step_of(saved[-1]) if saved else 0


def one_life(
    run: Path, what: Experiment, store: TCPStore, attempt: int, dice: random.Random
) -> dict[str, Any]:
    """Starts the run, kills a part of it at a random moment, and says what was found after."""
    processes = start(run, what, store, attempt)
    began, goal = time.monotonic(), len(lines(run)) + dice.randrange(1, MOST_STEPS)
    starting_up = dice.random() < 0.2  # a moment of the start, else one after some steps
    while not starting_up and len(lines(run)) < goal and any(p.is_alive() for p in processes):
        time.sleep(0.01)
    time.sleep(dice.uniform(0.0, 1.5 if starting_up else 0.3))
    moment = time.monotonic() - began
    victims = dice.choice([[0], [1], [0, 1]])
    if not any(process.is_alive() for process in processes):
        raise SystemExit(f"the run has ended after {attempt} kills; raise --steps")
    for number in victims:
        processes[number].kill()
    for process in processes:
        process.join(120)
        if process.is_alive():
            raise SystemExit(f"after the kill of {victims} a process still waits")
    taken = lines(run)[-1]["step"] if lines(run) else 0
    return {
        "seconds": round(moment, 3),
        "killed": victims,
        "taken": taken,
        "saved": newest(run),
        "while_saving": any((run / "checkpoints").glob(".step_*")),
    }


def to_the_end(run: Path, what: Experiment, store: TCPStore, attempt: int) -> None:
    processes = start(run, what, store, attempt)
    for process in processes:
        process.join(600)
    statuses = [process.exitcode for process in processes]
    if statuses != [0] * WORLD:
        raise SystemExit(f"{run} ended with {statuses}")


def differences(left: Path, right: Path) -> list[str]:
    """In what two finished runs differ by a bit."""
    a, b = (read_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (left, right))
    found = [name for name in a.values if a.values[name] != b.values[name]]
    for file in a.tensors:
        ours, theirs = a.tensors[file], b.tensors[file]
        found += [f"{file}/{n}" for n in ours if not torch.equal(ours[n], theirs[n])]
    logs = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(run)]
        for run in (left, right)
    ]
    return found + ([] if logs[0] == logs[1] else ["metrics.jsonl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("kills", 50), ("steps", 500), ("save-every", 3), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    PROCESSES.set_forkserver_preload(PRELOADED)
    what, dice = experiment(args.steps, args.save_every), random.Random(args.seed)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        killed, whole = Path(folder) / "killed", Path(folder) / "whole"
        # Each attempt has a store of its own: as with torchrun, it outlives the processes.
        stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
        lives = []
        for attempt in range(args.kills):
            lives.append(one_life(killed, what, stores[0], attempt, dice))
            last = lives[-1]
            print(f"{attempt + 1:3} killed {last['killed']} at step {last['taken']}", flush=True)
        to_the_end(killed, what, stores[0], args.kills)
        to_the_end(whole, what, stores[0], args.kills + 1)
        differ = differences(killed, whole)
    lost = [life["taken"] - life["saved"] for life in lives]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/random_kills.py --kills {args.kills} --steps {args.steps} "
        f"--save-every {args.save_every} --seed {args.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "processes": WORLD,
        "kills": len(lives),
        "kills_while_saving": sum(life["while_saving"] for life in lives),
        "steps": args.steps,
        "save_every": args.save_every,
        "most_steps_lost": max(lost),
        "steps_lost": sum(lost),
        "differs_in": differ,
        "minutes": round((time.time() - began) / 60, 1),
        "lives": lives,
    }
    print(
        f"{len(lives)} kills, {result['kills_while_saving']} of them during a save: "
        f"{sum(lost)} steps taken again, at most {max(lost)} at once; "
        f"differs from the undisturbed run in: {', '.join(differ) or 'nothing'}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if differ:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
