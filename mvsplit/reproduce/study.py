"""Runs claims side by side and judges each: finished runs are not run again."""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from mvsplit.data.atomic import write_atomically
from mvsplit.errors import UserError
from mvsplit.reproduce.claim import Claim
from mvsplit.reproduce.claims import CLAIMS
from mvsplit.reproduce.measured_by import measure_fingerprint
from mvsplit.reproduce.progress import (
    PATIENCE,
    Progress,
    duration,
    read_progress,
    say_at_once,
    time_left,
)
from mvsplit.reproduce.rule import fingerprint, judge
from mvsplit.reproduce.runlog import Runs, read_run
from mvsplit.reproduce.sizes import Size
from mvsplit.reproduce.together import groups, run_trials
from mvsplit.reproduce.trial import Trial, run_trial, wait_for_trial
from mvsplit.reproduce.workers import Stopped, stoppable, worker_pool
from mvsplit.training.checkpoint import list_checkpoints
from mvsplit.training.run_folder import FolderInUse, holder_of

RULES = "rules.json"


class Study:
    """Claims at one size in one folder.

    Several processes may work in it at a time: each run is trained by one of them, whose lock is on
    the run's folder, and the others take what is left and wait for what they need.

    `OUT/SIZE/runs/` holds a run folder for each trial, which claims share; `OUT/SIZE/rules.json`
    the fingerprints of all rules, and of what measures their figures, as they were before the first
    run; `OUT/SIZE/CLAIM.json` a claim's result.

    Args:
        out: the folder; the same one again goes on where it stopped.
        size: of the runs.
        workers: runs side by side; those of the size if None.
        together: regimes whose runs are trained as one (`mvsplit.reproduce.together`); those that
            would not come to their end in time so are trained alone.
        members: of them at a time, at most; all of a kind if None.
        recompute: whether their blocks compute again what they would keep for backward; None where
            memory is too short for that.
        say: is told of each run that has ended, and meanwhile how far runs are.

    Raises:
        UserError: `workers` < 1.
    """

    def __init__(
        self,
        out: Path | str,
        size: Size,
        *,
        workers: int | None = None,
        together: Sequence[str] = (),
        members: int | None = None,
        recompute: bool | None = None,
        say: Callable[[str], None] = say_at_once,
    ) -> None:
        self.size, self.workers, self.say = size, workers or size.workers, say
        self.together, self.members, self.recompute = together, members, recompute
        if workers is not None and workers < 1:
            raise UserError(f"workers={workers}: must be at least 1")
        self.folder = Path(out) / size.name
        self.runs = self.folder / "runs"
        self.patience = PATIENCE

    def run(self, claims: Sequence[Claim], *, minutes: float | None = None) -> list[dict[str, Any]]:
        """Trains what is missing and gives the results, which are also written.

        Args:
            minutes: after these the runs are saved and left; only the claims whose runs are all
                there have a result then.

        Raises:
            UserError: a run failed, or a folder holds another.
            Stopped: SIGTERM or Ctrl-C stopped it, which is said; the same again goes on.
        """
        trials = {t.name: t for claim in claims for t in claim.trials(self.size)}
        try:
            with stoppable():
                self._note_rules(claims)
                todo = [t for t in trials.values() if not t.finished(self.runs)]
                if len(todo) < len(trials):
                    self.say(f"{len(trials) - len(todo)} of {len(trials)} runs are there already")
                self._train(todo, math.inf if minutes is None else time.time() + 60 * minutes)
                return [self.judge(claim) for claim in claims if self.complete(claim)]
        except Stopped as stop:
            self.say(stop.words(self._kept(trials.values())))
            raise

    def _kept(self, trials: Collection[Trial]) -> str:
        """What is there of them, in words."""
        left = [t for t in trials if not t.finished(self.runs)]
        saved = [t for t in left if list_checkpoints(self.runs / t.name / "checkpoints")]
        return (
            f"of {len(trials)} runs {len(trials) - len(left)} finished and {len(saved)} begun are "
            f"kept in {self.runs}"
        )

    def complete(self, claim: Claim) -> bool:
        """Whether all runs of a claim are finished."""
        return all(t.finished(self.runs) for t in claim.trials(self.size))

    def judge(self, claim: Claim) -> dict[str, Any]:
        """The result of a claim whose runs are all there; written to OUT/SIZE/CLAIM.json."""
        trials = claim.trials(self.size)
        runs = Runs(logs=[read_run(t, self.runs) for t in trials])
        figures = claim.measure(runs)
        found = judge(claim.rule, figures)
        rule, now = self._rules()[claim.name], _fingerprints(claim)
        result = {
            "claim": claim.name,
            "size": self.size.name,
            "hardware": self.size.hardware,
            "verdict": found.verdict,
            "reasons": list(found.reasons),
            "rule": [condition.as_dict() for condition in claim.rule],
            "rule_written": rule["written"],
            # Of rules that an older version wrote down the bounds alone are known.
            "rule_unchanged": all(rule.get(name, print_) == print_ for name, print_ in now.items()),
            "measure_sha256": now["measure"] if "measure" in rule else None,
            "figures": {figure.name: figure.as_dict() for figure in figures},
            "panels": [panel.as_dict() for panel in claim.panels(runs)],
            "runs": [_row(t, log.record) for t, log in zip(trials, runs.logs, strict=True)],
            "date": datetime.date.today().isoformat(),
            "command": f"mvsplit reproduce {claim.name} --size {self.size.name}",
            **_environments(self.runs, trials),
        }
        _write(self.folder / f"{claim.name}.json", result)
        return result

    def _note_rules(self, claims: Sequence[Claim]) -> None:
        """Writes down the rules of all claims before the first run, once."""
        there = self._rules()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        known = CLAIMS | {claim.name: claim for claim in claims}
        new = {
            name: _fingerprints(claim) | {"written": now}
            for name, claim in known.items()
            if name not in there
        }
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / RULES, there | new)

    def _rules(self) -> dict[str, Any]:
        path = self.folder / RULES
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _train(self, todo: Sequence[Trial], end: float) -> None:
        began, done = time.monotonic(), 0
        for group in groups(todo, self.together, self.members):
            if time.time() < end and run_trials(group, self.runs, end, recompute=self.recompute):
                self.say(f"{len(group)} runs as one ({time.monotonic() - began:.0f} s)")
        todo = [trial for trial in todo if not trial.finished(self.runs)]
        if not todo or time.time() > end:  # no worker need start
            return
        self._tell_begin(todo)
        with worker_pool(self.workers) as pool:
            jobs: dict[Future[bool], Trial] = {
                pool.submit(run_trial, t, self.runs, end): t for t in todo
            }
            while jobs:
                ended = wait(jobs, timeout=self.patience, return_when=FIRST_COMPLETED).done
                for job in ended:
                    trial = jobs.pop(job)
                    if _is_elsewhere(job):  # behind all that nobody trains
                        self.say(f"{trial.name}: another process trains it; waiting for that")
                        jobs[pool.submit(wait_for_trial, trial, self.runs, end)] = trial
                    elif _is_whole(job, trial, end):
                        done += 1
                        took = f"{time.monotonic() - began:.0f} s"
                        self.say(f"{trial.name} ({done} of {len(todo)}, {took})")
                if not ended:
                    self._tell_progress(jobs)

    def _tell_begin(self, todo: Sequence[Trial]) -> None:
        held = {path.name: holder_of(path) for path in sorted(self.runs.glob("*"))}
        others = [f"{name} by {holder}" for name, holder in held.items() if holder]
        if others:
            self.say(
                f"other processes work in {self.folder}, too ({', '.join(others)}): each run is "
                "trained by one of them, and this one waits for those that it needs"
            )
        at_a_time = f", {self.workers} at a time" if len(todo) > self.workers else ""
        self.say(f"{len(todo)} runs to train{at_a_time}; how far they are is told as they go")

    def _tell_progress(self, jobs: Mapping[Future[bool], Trial]) -> None:
        runs = [self._progress(trial) for trial in jobs.values()]
        for job, run in zip(jobs, runs, strict=True):
            if job.running():
                self.say(run.line())
        left = time_left(runs, self.workers)
        if left is not None and len(runs) > 1:
            self.say(f"{len(runs)} runs are left, about {duration(left)} in all")

    def _progress(self, trial: Trial) -> Progress:
        experiment = trial.experiment
        steps, layers = experiment.train.steps, experiment.model.depth
        return read_progress(self.runs / trial.name, steps=steps, layers=layers)


def _is_elsewhere(job: Future[bool]) -> bool:
    """Whether another process trains the run."""
    return isinstance(job.exception(), FolderInUse)


def _is_whole(job: Future[bool], trial: Trial, end: float) -> bool:
    """Whether a run came to its end, and not to that of the time.

    Raises:
        UserError: it failed.
        Stopped: its worker had a signal.
    """
    try:
        whole = job.result()
    except UserError as error:
        raise UserError(f"run {trial.name}: {error}") from error
    if not whole and time.time() <= end:
        raise Stopped(signal.SIGTERM)  # only a worker has had one
    return whole


def _fingerprints(claim: Claim) -> dict[str, str]:
    """Of the bounds, and of what they are put to."""
    return {"sha256": fingerprint(claim.rule), "measure": measure_fingerprint(claim)}


def _row(trial: Trial, record: Mapping[str, Any]) -> dict[str, Any]:
    experiment = trial.experiment
    return {
        "run": trial.name,
        "label": trial.label,
        "seed": trial.seed,
        "ended": record["ended"],
        "seconds": record["seconds"],
        "depth": experiment.model.depth,
        "width": experiment.model.width,
        "rule": experiment.model.rule.name,
        "lr": experiment.train.lr * experiment.train.lr_factor if experiment.train.lr else None,
        "steps": experiment.train.steps,
        "jump": trial.jump,
        "factor": trial.factor,
        "together": record.get("together", 1),
    } | ({"look_every": trial.look_every} if trial.look_every else {})


def _environments(folder: Path, trials: Sequence[Trial]) -> dict[str, Any]:
    """`environment`: that of the first; `environments`, where they are not one: each with its
    runs."""
    found: list[dict[str, Any]] = []
    for trial in trials:
        here = _environment(folder / trial.name)
        same = next((each for each in found if each["environment"] == here), None)
        if same is None:
            same = {"environment": here, "runs": []}
            found.append(same)
        same["runs"].append(trial.name)
    return {"environment": found[0]["environment"]} | (
        {"environments": found} if len(found) > 1 else {}
    )


def _environment(run: Path) -> dict[str, Any]:
    found = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    names = ("python", "versions", "device_name", "processor", "revision")
    return {key: found.get(key) for key in names}


def _write(path: Path, tree: dict[str, Any]) -> None:
    text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text, writer=f".{os.getpid()}")  # others may write the same
