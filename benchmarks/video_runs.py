"""Networks that are trained on clips and scored: the validation loss, and the reader on samples."""

from __future__ import annotations

import itertools
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.data import Clips
from mvsplit.evaluation.clips import evaluate_clips
from mvsplit.evaluation.held_out import SERIES, validation_loss
from mvsplit.models import DiTConfig
from mvsplit.presets import get_preset
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, generate, to_clips
from mvsplit.sampling.clips import contact_sheet, gif_bytes
from mvsplit.training import (
    DataConfig,
    Experiment,
    Observer,
    TrainConfig,
    TrainState,
    load_run,
    train,
)

MEANS = ("clip", "frame", "sequence")
# depth, width, heads, patch, frames, clips a step
SIZES = {"gpu": (12, 256, 8, 8, 8, 64), "cpu": (4, 48, 3, 4, 4, 4)}
HELD_OUT = 256  # clips of the validation loss at most; fewer where fewer are drawn, but for 0
PROMPTS = (
    "a red circle moving left",
    "a yellow square quickly moving down on a black background",
    "a green triangle moving right and bouncing back",
    "a cyan ring moving up and bouncing back on a brown background",
    "a blue diamond moving left and an orange cross moving right",
    "a purple circle moving up and a green square moving up on a white background",
    "a red square moving right behind a cyan ring",
    "a yellow triangle moving down in front of a blue circle on a gray background",
)


def experiment(mean: str, seed: int, steps: int, device: str, size: str) -> Experiment:
    """A small network for the comparison of means, as wide as a patch has values at least."""
    depth, width, heads, patch, frames, clips = SIZES[size]
    model = DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        ffn_width=3 * width,
        channels=3,
        patch=patch,
        text_width=max(64, width // 2),
        rule=RuleConfig(name="mvsplit", beta=1.0),
        mean=mean,  # type: ignore[arg-type]
    )
    config = TrainConfig(
        steps=steps,
        batch_size=clips,
        lr=2e-3,
        warmup=min(100, steps // 5),
        ema_decay=0.99,
        precision="bf16" if device == "cuda" else "fp32",
        seed=seed,
        save_every=steps,
        probe_every=0,
        device=device,
        sample_shift=2.0,
    )
    data = DataConfig(dataset="clips", frames=frames, motions=("move", "bounce"))
    return Experiment(model=model, data=data, train=config)


def preset(name: str, steps: int | None, device: str) -> Experiment:
    """A preset as it is, on `device`, for so many steps."""
    wanted = get_preset(name)
    steps = wanted.train.steps if steps is None else steps
    return replace(wanted, train=replace(wanted.train, steps=steps, device=device))


def painting(clips: int = 64, frames: int = 8) -> dict[str, Any]:
    """The median processor time in which so many clips of 32×32 are painted."""
    data, taken = Clips(frames, 32, 0, None), []
    for number in range(1, 12):
        begun = time.process_time()
        data.fetch(range(clips * number, clips * (number + 1)))
        taken.append(time.process_time() - begun)
    return {"painted": clips, "frames": frames, "seconds": round(statistics.median(taken), 5)}


class _Clock(Observer):
    """The processor time after each step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step(self, state: TrainState, line: dict[str, Any]) -> None:
        self.at.append(time.process_time())


def stepping(name: str, steps: int, device: str) -> dict[str, Any]:
    """The median processor time of a preset's step, painting and all."""
    clock, wanted = _Clock(), preset(name, steps + 1, device)
    with tempfile.TemporaryDirectory() as folder:
        train(wanted, Path(folder) / "run", observers=[clock])
    taken = [after - before for before, after in itertools.pairwise(clock.at)]
    return {
        "step_of": name,
        "clips": wanted.train.batch_size,
        "steps": steps,
        "device": device,
        "seconds": round(statistics.median(taken), 4),
    }


class StopAfter(Observer):
    """Ends a run, as Ctrl-C would, so many seconds after its first step."""

    def __init__(self, seconds: float) -> None:
        self._left, self._begun = seconds, 0.0

    def on_step(self, state: TrainState, line: dict[str, Any]) -> None:
        self._begun = self._begun or time.perf_counter()
        if time.perf_counter() - self._begun > self._left:
            self._left = float("inf")
            signal.raise_signal(signal.SIGINT)


def run(
    wanted: Experiment,
    *,
    count: int,
    seconds: float = float("inf"),
    guidances: Sequence[float] = (2.0,),
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Trains in a folder that is thrown away, and scores the averaged weights: the validation loss,
    and the reader on `count` samples of held-out captions (0: the loss alone). With `pictures`
    writes there a contact sheet and GIFs of `PROMPTS`."""
    with tempfile.TemporaryDirectory() as folder:
        path, begun = Path(folder) / "run", time.perf_counter()
        outcome = train(wanted, path, observers=[StopAfter(seconds)])
        if outcome.signal == signal.SIGTERM:
            raise SystemExit(128 + outcome.signal)
        spent = time.perf_counter() - begun
        loaded = load_run(path, device=wanted.train.device)
        row = {"step": outcome.step, "seconds": round(spent, 1)}
        row |= {} if pictures is None else draw(loaded, pictures)
        print(row, flush=True)
        return row | scores(loaded, count, guidances)


def scores(loaded: Any, count: int, guidances: Sequence[float]) -> dict[str, Any]:
    data = loaded.experiment.data
    clips = Clips(data.frames or 8, data.size or 32, SERIES, data.motions or None)
    samples = min(HELD_OUT, count or 64)
    losses = dict(validation_loss(loaded.model, loaded.embedder, clips, samples=samples))
    found: dict[str, Any] = {n: losses[n] for n in ("validation_loss", "validation_loss_stderr")}
    scenes = clips.scenes(range(count))
    for guidance in guidances if count else ():
        drawn = sampled(loaded, [scene.caption for scene in scenes], guidance)
        found[f"guidance {guidance:g}"] = dict(evaluate_clips(drawn, scenes))
    return {name: _rounded(value) for name, value in found.items()}


def sampled(loaded: Any, prompts: Sequence[str], guidance: float) -> Tensor:
    """One clip a prompt, as `mvsplit sample` draws them, [N, 3, F, S, S]."""
    data = loaded.experiment.data
    shape = (3, data.frames or 8, data.size or 32, data.size or 32)
    config = SamplingConfig(
        guidance=guidance, shift=loaded.experiment.train.sample_shift, batch_size=64
    )
    batches = generate(loaded.model, loaded.embedder, prompts, shape, config)
    return torch.cat([batch.latents for batch in batches]).clamp(-1, 1)


def draw(loaded: Any, folder: Path) -> dict[str, Any]:
    """The contact sheet and two GIFs; what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    known = loaded.experiment.data.motions
    prompts = PROMPTS[:2] if known == ("move",) else PROMPTS
    made = to_clips(sampled(loaded, prompts, 2.0))
    contact_sheet(made).save(folder / "contact.png", optimize=True)
    for number in (0, -1):
        content = gif_bytes(made[number], 8, {"prompt": prompts[number]})
        (folder / f"clip{number % len(made)}.gif").write_bytes(content)
    return {"prompts": list(prompts)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(number) for name, number in value.items()}
    return round(value, 5)
