"""One run of the bench: trained as any run is, then scored, and kept as one row.

OUT/runs/NAME/       the run folder, while it trains
OUT/rows/NAME.json   its row, once it is finished; the run folder goes then
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvsplit.data import Embedder, Shapes
from mvsplit.data.atomic import write_atomically
from mvsplit.data.scenes import Scene
from mvsplit.errors import UserError
from mvsplit.evaluation.geneval import evaluate_shapes, geneval_indices, scenes_at
from mvsplit.evaluation.held_out import SERIES, validation_loss
from mvsplit.models import DiTConfig
from mvsplit.reproduce.depth.plan import BenchRun, BenchSize
from mvsplit.reproduce.runlog import DEAD_LOSS, LIVING_LOSS, Array
from mvsplit.reproduce.trial import Deadline, stepped_seconds, token_floor
from mvsplit.residuals import RuleConfig
from mvsplit.residuals.mvsplit import starts_by_default, written_out
from mvsplit.sampling import classifier_free, get_sampler, sample_noise
from mvsplit.sampling.guidance import Network
from mvsplit.training import (
    Experiment,
    NonFiniteError,
    Observer,
    TrainConfig,
    TrainState,
    train,
)
from mvsplit.training.config import flat_fields
from mvsplit.training.files import read_lines

ROWS, RUNS = "rows", "runs"
WINDOW = 10  # steps over which the training loss is averaged
REAL = 600  # rendered pictures, for the Fréchet distance
GUIDANCE = 2.0
FINISHED = "finished"


class Held(Observer):
    """Keeps the state of a run, so that it can be scored when the run is over."""

    def __init__(self) -> None:
        self.state: TrainState | None = None

    def on_start(self, state: TrainState, experiment: Experiment) -> None:
        self.state = state

    @property
    def graphs(self) -> int:
        """CUDA graphs that the steps ran from at the end."""
        graphs = self.state.graphs if self.state else None
        return graphs.recorded if graphs else 0


def run_bench(
    run: BenchRun,
    size: BenchSize,
    out: Path,
    end: float = math.inf,
    scratch: Path | None = None,
) -> bool:
    """Trains and scores a run, from where it stopped if it did, and says whether it came to its
    end; the time `end`, in seconds of the clock, stops it before.

    A row's `seconds_trained`, until the last step was saved, and `seconds`, with scores, are of
    this process and of the steps that earlier ones took, without what those took to start and to
    save, which nothing keeps; so at least `seconds_stepping`. `cpu_seconds`, of the training, is
    None where there was an earlier one, for nothing keeps its share.

    Args:
        scratch: where run folders are while they train; OUT/runs if None.

    Raises:
        UserError: the folder holds another run.
    """
    if size.device == "cpu":
        torch.set_num_threads(1)
    path, experiment = (scratch or out / RUNS) / run.name, run.experiment(size)
    held, ended, earlier = Held(), FINISHED, stepped_seconds(path)
    began, cpu = time.perf_counter(), time.process_time()
    on_gpu = size.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        outcome = train(experiment, path, observers=[held, Deadline(end)])
        if outcome.signal is not None:
            return False
    except NonFiniteError as error:
        ended = f"non-finite: {error}"
    trained, cpu = time.perf_counter() - began, time.process_time() - cpu
    row = head(run, size) | {"date": now(), "ended": ended, "floor": token_floor(experiment)}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    row["device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
    row["torch"] = torch.__version__
    row |= from_logs(path, row["floor"], finite=ended == FINISHED)
    if ended == FINISHED:
        assert held.state is not None
        row |= score(held.state, size)
    row["lives"] = ended == FINISHED and row["validation_loss"] < LIVING_LOSS * row["floor"]
    row["seconds_trained"] = earlier + trained
    row["seconds"] = earlier + time.perf_counter() - began
    row["cpu_seconds"], row["graphs"] = None if earlier else cpu, held.graphs
    write_row(row, out)
    shutil.rmtree(path)
    return True


def now() -> str:
    """When a row is made: of several rows of a run the later counts."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def head(run: BenchRun, size: BenchSize) -> dict[str, Any]:
    """What a row is of."""
    return {
        "run": run.name,
        "entry": run.entry.name,
        "depth": run.depth,
        "width": run.width,
        "rate": run.rate,
        "seed": run.seed,
        "steps": size.steps,
        "rule": dataclasses.asdict(run.entry.rule(run.depth)),
        "fingerprint": fingerprint(run.experiment(size)),
    }


def fingerprint(experiment: Experiment) -> str:
    """SHA-256 of all that decides a run and is not as configurations are by default, so that a
    field which comes later changes nothing."""
    plain = flat_fields(dataclasses.asdict(_PLAIN))
    fields = flat_fields(dataclasses.asdict(experiment))
    # In rules that have none, β was 1 and α 0 by default when the first runs were run.
    rule = written_out(experiment.model.rule, experiment.model.depth)
    for name, start, before in (("beta", rule.beta, 1.0), ("alpha", rule.alpha, 0.0)):
        if fields[f"model.rule.{name}"] is None:
            fields[f"model.rule.{name}"] = before if start is None else start
    if fields["model.writers"] == "rule" and starts_by_default(experiment.model.rule):
        fields["model.writers"] = "standard"  # as they start there since, and did not before
    decides = {n: v for n, v in fields.items() if v != plain[n] and n not in _DECIDES_NOTHING}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


_PLAIN = Experiment(
    model=DiTConfig(
        depth=1,
        width=4,
        heads=1,
        ffn_width=1,
        channels=1,
        text_width=4,
        rule=RuleConfig(beta=1.0, alpha=0.0),
    ),
    train=TrainConfig(steps=1, batch_size=1, probe_every=100),  # its default then
)
_DECIDES_NOTHING = ("train.device", "train.save_every", "train.keep")


def from_logs(path: Path, floor: float, *, finite: bool) -> dict[str, Any]:
    """What the logs say of a run: its curve, its collapse, its speed, the watch's words.

    Returns:
        `curve`, `seconds_curve`: the mean training loss and seconds of each WINDOW steps;
        `collapse_step`, `collapse_seconds`: when it lost what it had learned, None where it did
        not; `seconds_a_step`: the median; `seconds_stepping`: of all steps; `looks`: how many there
        were; `similarity`: of tokens, deepest quarter, in the last look; `watch`: the first alarm,
        if there was one, else the first warning.
    """
    lines = {line["step"]: line for line in read_lines(path / "metrics.jsonl")}
    metrics = [lines[step] for step in sorted(lines)]
    losses = np.array([line["loss"] for line in metrics], float)
    seconds = np.array([line["seconds"] for line in metrics], float)
    curve = windows(losses)
    at = collapse(curve / floor, dead_at_end=not finite)
    looks = list(read_lines(path / "layers.jsonl"))
    deep = looks[-1]["tcs"] if looks else []
    deep = [v for v in deep[len(deep) - -(-len(deep) // 4) :] if v is not None]
    events = list(read_lines(path / "events.jsonl"))
    return {
        "steps_taken": len(metrics),
        "curve": [six_digits(v) for v in curve],
        "collapse_step": None if at is None else at * WINDOW,
        "collapse_seconds": None if at is None else six_digits(seconds[: at * WINDOW].sum()),
        "seconds_a_step": six_digits(np.median(seconds)) if len(seconds) else None,
        "similarity": six_digits(np.mean(deep)) if deep else None,
        "watch": first_words(events),
        "looks": len(looks),
        "seconds_stepping": six_digits(seconds.sum()),
        "seconds_curve": [six_digits(v) for v in windows(seconds)],
    }


def windows(losses: Array) -> Array:
    """Means over each WINDOW steps in a row, a shorter rest left out."""
    whole = len(losses) // WINDOW
    return losses[: whole * WINDOW].reshape(whole, WINDOW).mean(1)


def collapse(shares: Array, *, dead_at_end: bool) -> int | None:
    """The number of windows after which a run had lost what it had learned: below LIVING_LOSS of
    the floor at some time, and at the end above DEAD_LOSS of it or no longer finite. None where it
    lives, or never learned."""
    living = np.flatnonzero(shares < LIVING_LOSS)
    if not len(living) or not (dead_at_end or shares[-1] >= DEAD_LOSS):
        return None
    return int(living[-1]) + 1


def first_words(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The watch's first alarm, else its first warning, with how many of each there were."""
    said = {level: [e for e in events if e.get("level") == level] for level in ("alarm", "warning")}
    first = next((found[0] for found in said.values() if found), None)
    if first is None:
        return None
    counts = {f"{level}s": len(found) for level, found in said.items()}
    return {"level": first["level"], "verdict": first["verdict"], "step": first["at_step"]} | counts


def score(state: TrainState, size: BenchSize) -> dict[str, Any]:
    """Validation loss and task scores of the network as it stands, which becomes one of the run's
    precision."""
    model, embedder = state.model.eval(), state.loader.embedder
    if size.precision == "bf16":
        model = model.to(torch.bfloat16)
    held = held_out_shapes(size.pictures)
    asked = validation_loss(model, embedder, held.shapes, samples=size.validation, batch_size=256)
    losses, weight = dict(asked), next(model.parameters())
    prompts = [scene.caption for scene in held.scenes]
    pictures = draw(model, embedder, prompts, size.drawing, like=weight)
    return {
        "validation_loss": six_digits(losses["validation_loss"]),
        "by_time": [six_digits(v) for n, v in losses.items() if "_t" in n and "stderr" not in n],
        "tasks": task_scores(pictures),
    }


class HeldOutShapes(NamedTuple):
    """Samples that no run sees.

    Attributes:
        shapes: for the validation loss.
        real: rendered pictures [REAL, 3, 32, 32].
        scenes: what is asked for, GenEval's six tasks in turn.
    """

    shapes: Shapes
    real: Tensor
    scenes: list[Scene]


@cache
def held_out_shapes(pictures: int) -> HeldOutShapes:
    """With so many scenes."""
    shapes = Shapes(32, SERIES)
    scenes = scenes_at(shapes, geneval_indices(shapes, pictures))
    return HeldOutShapes(shapes, shapes.fetch(range(REAL)).latents, scenes)


def task_scores(pictures: Tensor) -> dict[str, float] | None:
    """Of pictures [N, 3, 32, 32] of the first N held-out scenes; None where they are not finite."""
    if not bool(pictures.isfinite().all()):
        return None
    held = held_out_shapes(len(pictures))
    return dict(evaluate_shapes(pictures, held.scenes, held.real))


@torch.no_grad()
def draw(
    network: Network,
    embedder: Embedder,
    prompts: Sequence[str],
    steps: int,
    *,
    like: Tensor,
    copies: int = 1,
) -> Tensor:
    """Pictures [copies·N, 3, 32, 32] by Euler's method with guidance, all in one batch, which holds
    the N prompts with the same noise `copies` times. The network runs as it is: an engine would
    take longer to record than these few steps take.

    Args:
        like: has the network's precision and device.
    """
    text, valid = embedder.encode([*prompts, ""])
    text, valid = text.to(like), valid.to(like.device)
    each, lengths = text[:-1].repeat(copies, 1, 1), valid[:-1].repeat(copies)
    velocity = classifier_free(
        network, each, text[-1:], GUIDANCE, text_valid=lengths, null_valid=valid[-1:]
    )
    noise = sample_noise(range(len(prompts)), (3, 32, 32), seed=0, device=like.device)
    noise = noise.repeat(copies, 1, 1, 1)
    return get_sampler("euler").sample(velocity, noise, steps=steps, shift=1.0).float().cpu()


def write_row(row: Mapping[str, Any], out: Path) -> Path:
    """Whole or not at all."""
    path = out / ROWS / f"{row['run']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(row, allow_nan=False) + "\n")
    return path


def read_rows(out: Path) -> list[dict[str, Any]]:
    """All rows of a folder, by name."""
    return [json.loads(p.read_text("utf-8")) for p in sorted((out / ROWS).glob("*.json"))]


def check_row(run: BenchRun, size: BenchSize, row: Mapping[str, Any], out: Path) -> None:
    """Raises UserError where a row of the same name is of another experiment."""
    if row["fingerprint"] != fingerprint(run.experiment(size)):
        raise UserError(
            f"{out / ROWS / run.name}.json is a run with other settings; choose another --out"
        )


def six_digits(value: float) -> float | None:
    """What JSON can hold, to six digits."""
    return float(f"{float(value):.6g}") if math.isfinite(value) else None
