"""`mvsplit demo`: two 400-layer networks on real digits; one collapses, its twin learns."""

from __future__ import annotations

import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

from mvsplit.diagnostics.logs import Record, last_record, read_jsonl
from mvsplit.diagnostics.report import write_report
from mvsplit.errors import UserError
from mvsplit.evaluation.digits import CHANCE
from mvsplit.evaluation.twins import DRAWN, Twin, dead_since, draw, examine
from mvsplit.evaluation.twins_picture import TITLES, save_twins_picture
from mvsplit.presets import get_preset
from mvsplit.sampling import make_grid, save_png, to_pictures
from mvsplit.training import Experiment
from mvsplit.training.checkpoint import list_checkpoints, step_of

TWINS = ("plain", "mvsplit")
# What is kept for after training: starting processes, the report; and drawing, in training steps,
# with both twins, or on both cores with one.
_AFTERWARDS = 15.0  # seconds
_DRAWING = {2: 20, 1: 12, 0: 0}  # steps, by how many are still to be drawn
_LATEST = 20  # steps, by whose time that of the drawing is told
_PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Trains the twins side by side, draws digits with both, and shows why one of them died.

    Attributes:
        minutes: time for all of it; training stops early, and says so, where it would not fit.
        stop_dead: a twin that is dead for good stops there, which leaves its core to the other.
        steps: training steps of each twin; those of the presets if not given.
        depth: layers of each twin; those of the presets if not given.
        runs: folder of the two runs; the same folder again goes on where they stopped.
        out: folder for demo.png, demo.json (its numbers) and report.html.
    """

    minutes: float = 5.0
    stop_dead: bool = True
    steps: int | None = None
    depth: int | None = None
    runs: Path = Path("runs/demo")
    out: Path = Path()


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: no time or no place to write; a twin failed, then the message is its own.
    """
    run(tyro.cli(Arguments, args=list(arguments), prog="mvsplit demo"))
    return 0


def run(args: Arguments) -> None:
    if not args.minutes > 0:
        raise UserError(
            f"minutes={args.minutes:g}: must be greater than 0; all of it takes about 5"
        )
    for name in TWINS:
        _experiment(name, args)  # refuses what cannot be before anything is made or said
    began = time.monotonic()
    console = Console()
    # Or the twins would train on without their parent.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    folders = [args.runs / name for name in TWINS]
    for folder in (*folders, args.out):
        _make(folder)
    trainers = [Trainer(name, args) for name in TWINS]
    with _drawing() as drawing:
        try:
            _follow(trainers, drawing, console, args, end=began + 60 * args.minutes)
        finally:
            _stop(trainers)
        console.print("drawing a hundred digits with each …")
        drawing.begin(folders)
        twins = [examine(folder, drawing.pictures(folder)) for folder in folders]
    for twin, folder in zip(twins, folders, strict=True):
        _save_sheet(twin, folder)
    _save_numbers(twins, args.out / "demo.json")
    picture = save_twins_picture(twins, args.out / "demo.png")
    # The other way round, so that each twin has the colour that it has in the picture.
    report = write_report(folders[::-1], args.out / "report.html")
    console.print(_summary(twins))
    for line in _verdict(twins):
        console.print(line)
    for trainer, twin in zip(trainers, twins, strict=True):
        if twin.steps[-1] < trainer.steps:
            console.print(_why_not_all(twin, trainer), soft_wrap=True)
    console.print(f"picture {picture.resolve()}\nreport  {report.resolve()}", soft_wrap=True)
    console.print(f"took {time.monotonic() - began:.0f} s")


class Drawing:
    """The drawing of what the twins have learned, in processes beside their training."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._parts: dict[Path, list[Future[Tensor]]] = {}

    def begin(self, folders: Sequence[Path], *, processes: int = len(TWINS)) -> None:
        """Begins to draw with those with which it has not, on `processes` cores together."""
        new = [folder for folder in folders if folder not in self._parts]
        for folder in new:
            size = DRAWN * len(new) // processes  # each picture has its own noise, wherever drawn
            parts = [slice(first, first + size) for first in range(0, DRAWN, size)]
            self._parts[folder] = [self._pool.submit(draw, folder, part) for part in parts]

    def missing(self, trainers: Sequence[Trainer]) -> int:
        """With how many it has not begun."""
        return sum(trainer.folder not in self._parts for trainer in trainers)

    def pictures(self, folder: Path) -> Tensor:
        """Waits for them. [100, 1, 8, 8]"""
        return torch.cat([part.result() for part in self._parts[folder]])


@contextmanager
def _drawing() -> Iterator[Drawing]:
    pool = ProcessPoolExecutor(
        len(TWINS),
        mp_context=get_context("spawn"),
        initializer=signal.signal,  # or Ctrl-C would have each of them show where it was
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield Drawing(pool)
    finally:
        pool.shutdown(cancel_futures=True)


class Trainer:
    """A twin's training, in a process of its own on one core; none for one that is dead already."""

    def __init__(self, name: str, args: Arguments) -> None:
        self.name = name
        self.preset = _preset(name)
        self.folder = args.runs / name
        experiment = _experiment(name, args)
        self.steps, self.depth = experiment.train.steps, experiment.model.depth
        probe_every = max(min(experiment.train.probe_every, self.steps), 1)
        self.since = self._dead_and_saved() if args.stop_dead else None
        self._stopped = self.since is not None
        self._process: subprocess.Popen[str] | None = None
        self._output = self.folder.with_suffix(".log")
        if self._stopped:
            return
        command = [sys.executable, "-m", "mvsplit", "train", self.preset]
        command += ["--run-dir", str(self.folder), "--steps", str(self.steps)]
        command += ["--model.depth", str(self.depth), "--device", "cpu"]
        command += ["--probe-every", str(probe_every)]
        with open(self._output, "w", encoding="utf-8") as output:
            self._process = _start(command, output)

    def _dead_and_saved(self) -> int | None:
        """Since which step the twin is dead, where it was stopped for that, not killed before its
        last step was saved."""
        saved, last = list_checkpoints(self.folder / "checkpoints"), self._last("metrics.jsonl")
        whole = bool(saved) and step_of(saved[-1]) == last.get("step")
        return dead_since(self.folder) if whole else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Has the twin finish its step, save and leave."""
        if self._process is not None and self.running:
            self._stopped = True
            self._process.send_signal(signal.SIGTERM)

    def stop_if_dead(self) -> bool:
        """Stops the twin and waits for it if nothing will come of it any more; whether it did."""
        if not self.running or (since := dead_since(self.folder)) is None:
            return False
        self.since = since
        self.stop()
        self.wait()
        return True

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()

    def check(self) -> None:
        """Raises UserError with the twin's last words if it failed."""
        status = 0 if self._process is None else self._process.poll()
        ended = (128 + signal.SIGTERM, -signal.SIGTERM)  # the second before its first step
        if status and not (self._stopped and status in ended):
            lines = self._output.read_text(encoding="utf-8").strip().splitlines()
            last = lines[-1] if lines else f"exit status {status}"
            raise UserError(f"the {self.name} twin stopped: {last.removeprefix('mvsplit: ')}")

    def seconds_per_step(self) -> float:
        """Median over the latest steps, 0 before the first."""
        log = self.folder / "metrics.jsonl"
        times = [line["seconds"] for line in read_jsonl(log)] if log.exists() else []
        return statistics.median(times[-_LATEST:]) if times else 0.0

    def row(self) -> tuple[str, ...]:
        """Name, step, loss, similarity of the deep tokens, query gradient, alarm."""
        metrics, layers = self._last("metrics.jsonl"), self._last("layers.jsonl")
        deep = layers.get("tcs", [])[-max(self.depth // 4, 1) :]
        return (
            TITLES[self.name],
            f"step {metrics.get('step', 0)}/{self.steps}" + (", stopped" if self.since else ""),
            f"loss {metrics['loss']:.3f}" if metrics else "starting",
            f"deep similarity {sum(deep) / len(deep):.3f}" if deep else "",
            f"query gradient {metrics['grad_query']:.1e}" if metrics else "",
            self._alarm(),
        )

    def _last(self, log: str) -> Record:
        return last_record(self.folder / log) or {}

    def _alarm(self) -> str:
        """The first alarm of the watch, in a few words."""
        log = self.folder / "events.jsonl"
        events = read_jsonl(log, latest=False) if log.exists() else ()
        first = next((e for e in events if e.get("level") == "alarm" and "verdict" in e), None)
        return f"ALARM at step {first['at_step']}: {first['verdict']}" if first else ""


def _preset(name: str) -> str:
    return f"digits-400l-{name}"


def _experiment(name: str, args: Arguments) -> Experiment:
    """A twin's preset with what was given instead.

    Raises:
        UserError: a number of steps or layers that cannot be.
    """
    preset = get_preset(_preset(name))
    train: dict[str, Any] = {} if args.steps is None else {"steps": args.steps}
    model: dict[str, Any] = {} if args.depth is None else {"depth": args.depth}
    return replace(
        preset, train=replace(preset.train, **train), model=replace(preset.model, **model)
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {folder}: {error.strerror}; choose another --runs or --out"
        ) from error


def _start(command: list[str], output: IO[str]) -> subprocess.Popen[str]:
    # One thread: at this width a second one only waits for the first.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        # Or Ctrl-C would reach it too, and the signal of `stop` be its second, which kills.
        process_group=0,
    )


def _stop(trainers: Sequence[Trainer]) -> None:
    for trainer in trainers:
        trainer.stop()
    for trainer in trainers:
        trainer.wait()


def _follow(
    trainers: Sequence[Trainer], drawing: Drawing, console: Console, args: Arguments, end: float
) -> None:
    """Shows both twins until they are done, or stops them in time to be drawn before `end`; those
    that are dead for good at once, which are then drawn beside the other's training."""
    printed = time.monotonic()
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with live or nullcontext():
        while any(trainer.running for trainer in trainers):
            time.sleep(0.5)
            for trainer in trainers:
                if args.stop_dead and trainer.stop_if_dead():
                    console.print(_epitaph(trainer), soft_wrap=True)
                trainer.check()
                if trainer.since is not None:
                    drawing.begin([trainer.folder], processes=1)
            if live is not None:
                live.update(_progress(trainers), refresh=True)
            elif time.monotonic() - printed > _PLAIN_INTERVAL:
                printed = time.monotonic()
                line = " | ".join(" ".join(trainer.row()) for trainer in trainers)
                console.print(line, soft_wrap=True, highlight=False)
            step = max((t.seconds_per_step() for t in trainers if t.running), default=0.0)
            afterwards = _AFTERWARDS + _DRAWING[drawing.missing(trainers)] * step
            if time.monotonic() > end - afterwards:
                _stop(trainers)
                console.print("the time is used up: training stops here (--minutes gives more)")
        for trainer in trainers:
            trainer.check()
        if live is not None:
            live.update(_progress(trainers), refresh=True)


def _epitaph(trainer: Trainer) -> str:
    return (
        f"{TITLES[trainer.name]} is dead since step {trainer.since}: its deep tokens are all alike "
        "and its queries get no gradient that could part them. It stops here and leaves its core "
        "to its twin (--no-stop-dead trains it on)"
    )


def _progress(trainers: Sequence[Trainer]) -> Table:
    table = Table(show_header=False)
    for trainer in trainers:
        table.add_row(*trainer.row())
    return table


def _why_not_all(twin: Twin, trainer: Trainer) -> str:
    """Why a twin has fewer steps than were asked for."""
    stopped = f"{TITLES[twin.name]} was stopped at step {twin.steps[-1]} of {trainer.steps}"
    whose = "its digits are those of that step"
    if trainer.since is not None:
        return f"{stopped}, dead since step {trainer.since}, and {whose}"
    return f"{stopped}, unfinished, and {whose}: the same command again goes on from there"


def _save_sheet(twin: Twin, folder: Path) -> None:
    """The drawings as a file of the run, where the report finds them."""
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    step = int(twin.steps[-1])
    record = {"run": twin.name, "step": step, "digit_accuracy": twin.accuracy}
    sheet = make_grid(to_pictures(twin.pictures))
    save_png(samples / f"step_{step:08d}_digits.png", sheet, record)


def _save_numbers(twins: Sequence[Twin], path: Path) -> None:
    numbers = {
        "date": datetime.date.today().isoformat(),
        "command": "mvsplit demo",
        "torch": torch.__version__,
        "twins": {twin.name: twin.numbers() for twin in twins},
    }
    path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _summary(twins: Sequence[Twin]) -> Table:
    table = Table("", *(TITLES[twin.name] for twin in twins))
    rows = {
        "steps": [str(twin.steps[-1]) for twin in twins],
        "seconds a step": [f"{twin.seconds:.2f}" for twin in twins],
        "first loss": [f"{twin.first_loss:.3f}" for twin in twins],
        "last loss": [f"{twin.last_loss:.3f}" for twin in twins],
        "deep token similarity": [f"{twin.deep_similarity:.3f}" for twin in twins],
        "query gradient, deep": [f"{twin.query_gradient[-1]:.1e}" for twin in twins],
        "digits recognised": [f"{twin.accuracy:.0%}" for twin in twins],
        "collapsed": ["yes" if twin.collapsed else "no" for twin in twins],
    }
    for label, values in rows.items():
        table.add_row(label, *values)
    return table


def _verdict(twins: Sequence[Twin]) -> list[str]:
    """What the numbers say, whichever way they came out."""
    lines = []
    for twin in twins:
        fate = "has collapsed" if twin.collapsed else "has not collapsed"
        lines.append(
            f"{TITLES[twin.name]} {fate}: {twin.accuracy:.0%} of its digits are recognised, "
            f"{twin.accuracy / CHANCE:.1f} times chance"
        )
    return [*lines, f"(of real digits {twins[0].accuracy_real:.0%} are recognised)"]
