"""Claim: moments of two bytes a parameter cost a network of bf16 weights next to no loss.

A small network without attention learns the velocity of the real digits, 64 values each, for 3,000
steps: by AdamW in fp32; with bf16 weights and gradients, the first moment in a byte and the second
in bf16 (`two bytes`); and by `mvsplit.kernels.low_adamw`, whose second moment is a byte too. Same
seeds, same samples. Mean loss of the last 1,000 steps.

    python benchmarks/low_moments.py [--seeds 0 1 2 3] [--steps 3000] [--json FILE]

Cost: two to four minutes on one CPU core for each seed, four seeds by default.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from mvsplit.kernels import low_adamw as low

SIZES = ((256, 128), (256, 256), (256, 256), (64, 256))
RATE, WARMUP, BATCH, LAST = 2e-3, 100, 64, 1000
WAYS = ("fp32", "two bytes", "one byte")


def digits() -> Tensor:
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    return (x - x.mean()) / x.std()


def start(seed: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(o, i, generator=chance) * i**-0.5 for o, i in SIZES]


def loss_of(weights: list[Tensor], data: Tensor, chance: torch.Generator) -> Tensor:
    x = data[torch.randint(0, len(data), (BATCH,), generator=chance)]
    noise = torch.randn(x.shape, generator=chance)
    t = torch.rand(BATCH, 1, generator=chance)
    h = torch.cat(((1 - t) * x + t * noise, t.expand_as(x)), 1)
    for weight in weights[:-1]:
        branch = 1.6 * torch.nn.functional.silu(h @ weight.T)
        h = h + branch if h.shape == branch.shape else branch
    return (h @ weights[-1].T - (x - noise)).square().mean()


class TwoBytes:
    """`low_adamw` with its second moment in bf16, rounded stochastically."""

    def __init__(self, values: Tensor) -> None:
        self.state = low.LowState.zeros(values)
        self.second = torch.zeros_like(values)

    def update(self, values: Tensor, grads: Tensor, s: low.LowSettings) -> None:
        g, chance = grads.float(), low.random_words(values.numel(), s.update, values.device)
        first = s.beta1 * self.state.first() + (1 - s.beta1) * g
        second = s.beta2 * self.second.float() + (1 - s.beta2) * g * g
        w = values.float() * (1 - s.lr * s.weight_decay) - low.step_of(first, second, s)
        values.copy_(low.round_to_bf16(w, chance & 0xFFFF))
        scales = first.view(-1, low.BLOCK).abs().amax(1) / low.LARGEST
        safe = torch.where(scales > 0, scales, 1)[:, None]
        scaled = (first.view(-1, low.BLOCK) / safe).flatten()
        self.state.scales.copy_(scales)
        self.state.codes.copy_(low.encode(scaled, (chance >> 16) & 0xFF))
        self.second.copy_(low.round_to_bf16(second, (chance >> 16) & 0xFFFF))


class OneByte:
    def __init__(self, values: Tensor) -> None:
        self.state = low.LowState.zeros(values)

    def update(self, values: Tensor, grads: Tensor, s: low.LowSettings) -> None:
        low.reference_low_adamw_(values, grads, self.state, s)


def run(way: str, seed: int, steps: int, data: Tensor) -> float:
    """The mean loss of the last steps."""
    chance, losses = torch.Generator().manual_seed(1000 + seed), []
    weights = start(seed)
    if way == "fp32":
        weights = [w.requires_grad_() for w in weights]
        adam = torch.optim.AdamW(weights, RATE, (0.9, 0.999), 1e-8, 0.1)
    else:
        weights = [w.bfloat16() for w in weights]
        kind = TwoBytes if way == "two bytes" else OneByte
        moments = [kind(w.flatten()) for w in weights]
    for step in range(1, steps + 1):
        rate = RATE * min(1.0, step / WARMUP)
        learning = weights if way == "fp32" else [w.float().requires_grad_() for w in weights]
        loss = loss_of(learning, data, chance)
        grads = torch.autograd.grad(loss, learning)
        losses.append(float(loss.detach()))
        if way == "fp32":
            adam.param_groups[0]["lr"] = rate
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad
            adam.step()
            continue
        settings = low.LowSettings(rate, 0.9, 0.999, 1e-8, 0.1, step)
        for weight, grad, moment in zip(weights, grads, moments, strict=True):
            moment.update(weight.view(-1), grad.flatten().bfloat16(), settings)
    return statistics.fmean(losses[-LAST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": "cpu",
        "torch": torch.__version__,
        "steps": args.steps,
        "loss": {way: [] for way in WAYS},
    }
    for seed in args.seeds:
        for way in WAYS:
            result["loss"][way].append(run(way, seed, args.steps, data))
            print(seed, way, result["loss"][way][-1], flush=True)
        result["over_fp32"] = {
            way: [
                o / f - 1 for o, f in zip(result["loss"][way], result["loss"]["fp32"], strict=True)
            ]
            for way in WAYS[1:]
        }
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(result["over_fp32"])


if __name__ == "__main__":
    main()
