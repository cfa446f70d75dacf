"""One training step of the demo's network on the CPU: ours against the straightforward version.

The straightforward version is what one writes first: autograd through every formula as it stands
in the paper, separate Q, K, V, gate and value projections, an optimiser over single tensors. Both
start from the same weights and see the same batch; loss and every gradient are compared before any
time is taken. Nearly all of the time of so narrow a network is per-operator overhead.

    python benchmarks/cpu_step.py [--depth 400] [--repeats 5] [--json benchmarks/results/FILE.json]

Cost: about one minute on one CPU core, at 400 layers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mvsplit.flow import flow_loss
from mvsplit.kernels import Segments
from mvsplit.models import Block, DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training.config import TrainConfig
from mvsplit.training.optimizer import AdamW, clip_gradients_, flatten_parameters, global_norm

LR, CLIP = 1e-3, 1.0
TARGET = 1.5


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)


class StraightBlock(nn.Module):
    """The weights of `block`, one tensor for each matrix of the paper, and its formulas."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.heads = block.attention.heads
        parts = (
            *block.attention.qkv.weight.chunk(3),
            block.attention.proj.weight,
            *block.ffn.w13.weight.chunk(2),
            block.ffn.w2.weight,
        )
        self.q, self.k, self.v, self.proj, self.gate, self.value, self.w2 = (
            nn.Parameter(part.detach().clone()) for part in parts
        )
        rules = (block.rule_attention, block.rule_ffn)
        gains = [p for rule in rules for p in rule.parameters()]  # β, α of one rule, then the other
        self.gains = nn.ParameterList(nn.Parameter(gain.detach().clone()) for gain in gains)

    def merge(self, x: Tensor, f: Tensor, branch: int, image: int) -> Tensor:
        if not len(self.gains):
            return rms(x + f, 1e-5)
        beta, alpha = self.gains[2 * branch], self.gains[2 * branch + 1]
        parts = []
        for tokens in (slice(0, image), slice(image, None)):
            x_s, f_s = x[:, tokens], f[:, tokens]
            mean_x, mean_f = x_s.mean(1, keepdim=True), f_s.mean(1, keepdim=True)
            parts.append(x_s + beta * (f_s - mean_f) + alpha * (mean_f - mean_x))
        return rms(torch.cat(parts, 1), 1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        b, t, _ = x.shape
        image = segments.lengths[0]
        q, k, v = (
            functional.linear(x, w).view(b, t, self.heads, -1).transpose(1, 2)
            for w in (self.q, self.k, self.v)
        )
        q, k = (rms(rotate(y, cos, sin), 1e-6) for y in (q, k))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = self.merge(x, functional.linear(mixed, self.proj), 0, image)
        hidden = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.value)
        return self.merge(x, functional.linear(hidden, self.w2), 1, image)

    def packed_grads(self) -> list[Tensor]:
        """Its gradients in the order of the parameters of `Block`."""
        g = {name: p.grad for name, p in self.named_parameters(recurse=False)}
        gains = [p.grad for p in self.gains]
        half = len(gains) // 2
        return [
            torch.cat((g["q"], g["k"], g["v"])),
            g["proj"],
            *gains[:half],
            torch.cat((g["gate"], g["value"])),
            g["w2"],
            *gains[half:],
        ]


def straight_twin(model: DiT) -> DiT:
    """A copy of `model` whose blocks are the straightforward ones."""
    twin = DiT(model.config)
    twin.load_state_dict(model.state_dict())
    twin.blocks = nn.ModuleList(StraightBlock(block) for block in model.blocks)
    return twin


def build(rule: str, depth: int) -> DiT:
    config = DiTConfig(
        depth=depth,
        width=32,
        heads=2,
        ffn_width=96,
        channels=1,
        patch=2,
        text_width=32,
        rule=RuleConfig(name=rule, beta=0.05),
        writers="standard",  # zero writers would leave most gradients zero, which proves nothing
    )
    return DiT(config, torch.Generator().manual_seed(0))


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*s, generator=g) for s in [(16, 1, 8, 8)] * 3 + [(16, 1, 32)])


def loss_of(model: DiT, data: tuple[Tensor, ...]) -> Tensor:
    z, x0, x1, text = data
    return flow_loss(model(z, text), x0, x1)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def check(rule: str, depth: int = 6) -> float:
    """Largest relative difference of loss and gradients between the two, in fp64."""
    ours = build(rule, depth).double()
    theirs = straight_twin(ours).double()
    data = tuple(x.double() for x in batch())
    losses = [loss_of(m, data) for m in (ours, theirs)]
    for loss in losses:
        loss.backward()
    mine = [p.grad for block in ours.blocks for p in block.parameters()]
    other = [g for block in theirs.blocks for g in block.packed_grads()]
    worst = max(relative(a, b) for a, b in zip(mine, other, strict=True))
    return max(worst, relative(losses[0].detach(), losses[1].detach()))


def our_step(model: DiT, data: tuple[Tensor, ...]) -> Callable[[], None]:
    groups = flatten_parameters(model)
    optimizer = AdamW(groups, TrainConfig(steps=1, batch_size=1))

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, data).backward()
        clip_gradients_(groups, global_norm(groups).item(), CLIP)
        optimizer.step(LR)

    return step


def straight_step(model: DiT, data: tuple[Tensor, ...]) -> Callable[[], None]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, data).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def best_times(steps: list[Callable[[], None]], repeats: int) -> list[float]:
    """The fastest of `repeats` runs of each, taken in turns so that all see the same machine."""
    best = [float("inf")] * len(steps)
    for step in steps:
        step()
    for _ in range(repeats):
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/cpu_step.py --depth {arguments.depth}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "depth": arguments.depth,
        "rules": {},
    }
    print(f"{'rule':10} {'ours, s':>9} {'straightforward, s':>19} {'ratio':>6}  gate")
    for rule in ("plain", "mvsplit"):
        worst = check(rule)
        if not worst < 1e-10:
            raise SystemExit(f"{rule}: the two differ by {worst:.1e}; no time is taken")
        model = build(rule, arguments.depth)
        twin = straight_twin(model)
        data = batch()
        ours, theirs = best_times(
            [our_step(model, data), straight_step(twin, data)], arguments.repeats
        )
        ratio = theirs / ours
        row = {"ours_s": ours, "straightforward_s": theirs, "ratio": ratio, "difference": worst}
        result["rules"][rule] = {k: float(f"{v:.4g}") for k, v in row.items()}
        print(f"{rule:10} {ours:9.3f} {theirs:19.3f} {ratio:6.2f}  {worst:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if min(row["ratio"] for row in result["rules"].values()) < TARGET:
        raise SystemExit(f"slower than the {TARGET} times that are claimed")


if __name__ == "__main__":
    main()
