"""Claim: watching every layer costs at most 3 % of the step at the default cadence.

One network, one batch, three kinds of step in turns: without the watch, with its first tier (the
gradient norms of W_O, W_2, Q and K, read together with the clip's norm), and inside a probe of
every layer. The cost at a cadence of one probe in N steps is (tier one + (probe − plain)/N) over
the plain step.

A block that nobody looks into runs as one node on the GPU; one that is probed runs part by part, so
a probe pays for that too.

Gate: a probed step gives the gradients of the same parts unprobed, as closely as those repeat
themselves: in bf16 the attention backward adds in no fixed order, which 400 layers amplify.

    python benchmarks/watch_cost.py [--depth 400 --width 1024 --batch 4] [--json FILE]

Cost: about one minute on one H200 at the default size (5.45 B parameters, 120 GB).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mvsplit.diagnostics.probe import CHEAP_FIELDS, FIELDS, LayerProbe
from mvsplit.diagnostics.taps import gradient_norm_tensors, read, taps_for_dit
from mvsplit.flow import flow_loss
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training.config import TrainConfig
from mvsplit.training.optimizer import AdamW, clip_gradients_, flatten_parameters, global_norm

CADENCE = 100  # TrainConfig.probe_every
TARGET = 0.03


class Bench:
    """A network on its device with a fixed batch; every step starts from the same gradients."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        config = DiTConfig(
            depth=args.depth,
            width=args.width,
            heads=max(args.width // 128, 1),
            ffn_width=3 * args.width,
            channels=128,
            text_width=args.width,
            rule=RuleConfig(name="mvsplit"),
            writers="standard",
        )
        torch.manual_seed(0)
        with self.device:
            self.model = DiT(config)
            side = args.side
            self.data = torch.randn(args.batch, 128, side, side)
            self.noise = torch.randn_like(self.data)
            self.text = torch.randn(args.batch, 64, args.width, dtype=torch.bfloat16)
        for block in self.model.blocks:
            block.adds_gradients = True
        self.groups = flatten_parameters(self.model)
        self.taps = taps_for_dit(self.model)
        self.tokens = args.batch * (side * side + 64)

    def add_optimizer(self) -> None:
        """Its moments are made last: the gate needs their memory for a copy of the gradients."""
        self.optimizer = AdamW(self.groups, TrainConfig(steps=1, batch_size=1))

    def gradients(self) -> Tensor:
        for group in self.groups:
            group.grads.zero_()
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.model(self.data, self.text)
        loss = flow_loss(velocity, self.data, self.noise)
        loss.backward()
        return loss.detach()

    def update(self, *, watched: bool) -> None:
        """One synchronisation either way: the watch's norms are read with the clip's."""
        norm = global_norm(self.groups)
        found = list(gradient_norm_tensors(self.taps).values()) if watched else []
        total, *_ = read([norm, *found])
        clip_gradients_(self.groups, total, 1.0)
        self.optimizer.step(0.0)  # the weights stay, so that every step is the same

    def plain(self) -> None:
        self.gradients()
        self.update(watched=False)

    def tier_one(self) -> None:
        self.gradients()
        self.update(watched=True)

    def probe(self, fields: tuple[str, ...]) -> None:
        with LayerProbe(self.taps, fields=fields) as probe:
            self.gradients()
        self.update(watched=True)
        probe.arrays()


def synchronised(bench: Bench, step: Callable[[], None]) -> float:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib(bench: Bench, step: Callable[[], None]) -> float:
    if bench.device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def check(bench: Bench) -> tuple[float, float]:
    """Largest relative difference of a gradient buffer between two steps by parts, then between
    such a step and a probed one."""
    hooks = [b.ffn.register_forward_hook(lambda *_: None) for b in bench.model.blocks]
    bench.gradients()
    first = [group.grads.clone() for group in bench.groups]
    bench.gradients()
    repeated = _difference(bench, first)
    for hook in hooks:
        hook.remove()
    with LayerProbe(bench.taps, fields=FIELDS):
        bench.gradients()
    return repeated, _difference(bench, first)


def _difference(bench: Bench, wanted: list[Tensor]) -> float:
    pairs = zip(bench.groups, wanted, strict=True)
    return max(((g.grads - w).norm() / w.norm()).item() for g, w in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("depth", 400), ("width", 1024), ("batch", 4), ("side", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    repeated, difference = check(bench)
    if not difference <= 1.5 * repeated + 1e-6:
        raise SystemExit(
            f"a probe changes the gradients by {difference:.1e}, a repetition by {repeated:.1e}; "
            "no time is taken"
        )
    bench.add_optimizer()
    steps = {
        "plain": bench.plain,
        "tier one": bench.tier_one,
        "probe, cheap": lambda: bench.probe(CHEAP_FIELDS),
        "probe, all": lambda: bench.probe(FIELDS),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(synchronised(bench, step))
    median = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    plain = median["plain"]
    tier = (median["tier one"] - plain) / plain
    cost = {
        name: tier + (median[name] - plain) / plain / CADENCE
        for name in ("probe, cheap", "probe, all")
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/watch_cost.py --depth {args.depth} --width {args.width} "
        f"--batch {args.batch}",
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens_per_step": bench.tokens,
        "gradient_difference": {"repeated": repeated, "probed": difference},
        "seconds": median,
        "peak_gib": {name: peak_gib(bench, step) for name, step in steps.items()},
        "cadence": CADENCE,
        "tier_one_share": tier,
        "share_at_cadence": cost,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if max(cost.values()) > TARGET:
        raise SystemExit(f"the watch costs more than {TARGET:.0%}")


if __name__ == "__main__":
    main()
