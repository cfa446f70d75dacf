"""What the benchmarks of the training step have in common: sizes, a trainer, times.

The trainer is that of a run (`mvsplit.training.builders`) with batches of noise in the place of
data, on one process or, within `joined`, on several.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.builders import build_model
from mvsplit.training.graphs import Graphs
from mvsplit.training.memory_plan import Planner
from mvsplit.training.optimizer import AdamW, clip_gradients_, flatten_parameters, global_norm
from mvsplit.training.parallelize import shards
from mvsplit.training.pieces import Piece
from mvsplit.training.step import add_gradients

PEAK = 989e12  # dense bf16 of an H200, FLOP/s
TEXT = 64


@dataclass(frozen=True)
class Size:
    """How wide the networks of this run are; small for a trial on a CPU."""

    width: int = 1024
    heads: int = 8
    side: int = 16
    text: int = TEXT

    @property
    def tokens(self) -> int:
        return self.side**2 + self.text

    def model(
        self, depth: int, beta: float = 0.05, writers: str = "standard", **other: Any
    ) -> DiTConfig:
        """Writers are not zero, as they are when training begins: half of the products of backward
        would multiply zeros, which takes less power and so less time."""
        return DiTConfig(
            writers=writers,  # type: ignore[arg-type]
            depth=depth,
            width=self.width,
            heads=self.heads,
            ffn_width=3 * self.width,
            channels=128,
            text_width=self.width,
            rule=RuleConfig(name="mvsplit", beta=beta),
            **other,
        )


class Trainer:
    """A network with its optimiser, and batches of noise; the same code as a run's step."""

    def __init__(self, model: DiTConfig, config: TrainConfig, size: Size, device: str) -> None:
        self.config, self.size, self.device = config, size, torch.device(device)
        self.model = build_model(model, config, self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.groups = flatten_parameters(self.model)
        self.optimizer = AdamW(self.groups, config)
        self.planner = Planner(self.model, config, self.device)
        self.graphs = None if shards(config) else Graphs(self.model, self.device)

    def piece(self, samples: int, seed: int = 0, masked: bool = False) -> Piece:
        """Noise; `masked`: with captions of unequal lengths, at least one token each."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        size = self.size
        lengths = torch.randint(
            1, size.text + 1, (samples,), generator=generator, device=self.device
        )
        return Piece(
            data=draw(samples, 128, size.side, size.side),
            noise=draw(samples, 128, size.side, size.side),
            times=torch.rand(samples, generator=generator, device=self.device),
            text=draw(samples, size.text, size.width),
            text_valid=lengths if masked else None,
        )

    def step(self, parts: list[Piece], lr: float = 0.0) -> tuple[float, float]:
        """Loss of this process's pieces, and the gradient norm of all; `lr` 0 leaves the weights,
        for a step that can be repeated."""
        self.planner.before(max(len(p.data) for p in parts) * self.size.tokens)
        self.optimizer.zero_grad()
        losses = add_gradients(self.model, self.config, parts, self.graphs)
        self.optimizer.collect_grads()
        return self.update(losses.mean(), lr)

    def update(self, loss: Tensor, lr: float = 0.0) -> tuple[float, float]:
        """What follows the gradients in a step; the loss and the norm."""
        mean, norm = torch.stack([loss, global_norm(self.groups)]).tolist()
        clip_gradients_(self.groups, norm, self.config.clip)
        self.optimizer.step(lr)
        return mean, norm

    def flops(self, samples: int) -> float:
        """Of the model for an optimiser step: 6N and attention."""
        c, tokens = self.model.config, self.size.tokens
        return samples * tokens * (6 * self.parameters + 12 * c.depth * tokens * c.width)

    def levels(self) -> dict[str, int]:
        found = [block.recompute for block in self.model.blocks]
        return {level: found.count(level) for level in sorted(set(found))}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def keep_busy(run: Callable[[], Any], least: float) -> tuple[int, float]:
    """Runs for at least so many seconds: how often it ran, and how long that took. A card that has
    just been idle has a higher clock than one at work."""
    synchronise()
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < least:
        run()
        count += 1
        if count % 3 == 0:
            synchronise()
    synchronise()
    return count, time.perf_counter() - began


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def rates(trainer: Trainer, samples: int, took: float) -> dict[str, Any]:
    return {
        "seconds": took,
        "tokens_per_second": samples * trainer.size.tokens / took,
        "mfu": trainer.flops(samples) / took / PEAK,
        "peak_gib": peak_gib(),
        "recompute": trainer.levels(),
        **({"bytes_a_parameter": 6} if trainer.config.weights == "bf16" else {}),
    }
