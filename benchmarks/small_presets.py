"""How long a step of the presets for small machines takes on this CPU, after a few of them.

Each is trained as `mvsplit train PRESET` would, on its own data; `pictures` on a cache of random
latents of its channels, 16×16 as of pictures of 256×256, with captions of 12 words. The median of
wall-clock time, the first step left out. What else runs on the machine makes it longer: its load
before each preset stands in the result.

    python benchmarks/small_presets.py [--steps 4] [--json benchmarks/results/FILE.json] [PRESET …]

Cost: some fifteen minutes on two CPU cores, most of them of `clips-12l`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mvsplit.data.encode import EncodeConfig, Encoders, encode
from mvsplit.data.encoders import OpenWords
from mvsplit.data.sources import Picture, Record
from mvsplit.presets import get_preset
from mvsplit.training import Experiment, Observer, TrainState, train
from mvsplit.training.environment import describe_environment

MEASURED = ("tiny", "shapes-12l", "pictures", "clips-12l")
SIDE, SQUEEZED = 256, 16  # pixels of a picture, and how many of them a latent stands for
WORDS = "a photograph of a flower in a garden with a stone temple"


class Latents:
    """Stands in for an autoencoder that cannot be had here: random latents, as many as it gives."""

    multiple = SQUEEZED

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def encode(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        return torch.randn(count, self.channels, height // SQUEEZED, width // SQUEEZED)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("a step draws nothing")

    def fingerprint(self) -> str:
        return f"random:{self.channels}"


class Blank:
    """As many as a batch has."""

    def __init__(self, count: int) -> None:
        self.size = count

    def __iter__(self) -> Iterator[Record]:
        picture = Picture(image=Image.new("RGB", (SIDE, SIDE)), captions=(WORDS,))
        for number in range(self.size):
            yield Record(name=str(number), load=lambda: picture)

    def fingerprint(self) -> str:
        return f"blank:{self.size}"


class Clock(Observer):
    """The time after each step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step(self, state: TrainState, line: dict[str, Any]) -> None:
        self.at.append(time.perf_counter())


def with_data(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment itself, or with a cache where it needs one."""
    if experiment.data.dataset != "cache":
        return experiment
    model, cache = experiment.model, folder / "cache"
    encoders = Encoders(vae=Latents(model.channels), text=OpenWords(model.text_width))
    source = Blank(experiment.train.batch_size)
    encode(source, cache, encoders, EncodeConfig(resolution=SIDE, max_aspect=1.0))
    return replace(experiment, data=replace(experiment.data, path=str(cache)))


def measure(name: str, steps: int) -> dict[str, Any]:
    """Seconds a step of a preset, as it is, but on the CPU."""
    clock, wanted, load = Clock(), get_preset(name), os.getloadavg()[0]
    short = replace(wanted.train, steps=steps + 1, warmup=0, save_every=steps + 1, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        experiment = with_data(replace(wanted, train=short), Path(folder))
        train(experiment, Path(folder) / "run", observers=[clock])
    taken = [after - before for before, after in itertools.pairwise(clock.at)]
    return {
        "preset": name,
        "batch": wanted.train.batch_size,
        "steps": steps,
        "seconds": round(statistics.median(taken), 3),
        "load_before": round(load, 2),
        "each": [round(seconds, 3) for seconds in taken],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("presets", nargs="*", default=MEASURED)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    environment = describe_environment(torch.device("cpu"))
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cores": len(os.sched_getaffinity(0)),
        **{name: environment[name] for name in ("processor", "threads", "revision")},
        "torch": torch.__version__,
        "times": [],
    }
    for name in args.presets:
        result["times"].append(measure(name, args.steps))
        print(json.dumps(result["times"][-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
