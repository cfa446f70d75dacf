"""Claim: watching every layer costs at most 3 % of the step at the default cadence.

One network and one batch in pieces, three kinds of step in turns, each as a run makes it: without
the watch, with its first tier (the gradient norms of W_O, W_2, Q and K, read together with the
clip's norm), and with a probe of every layer, which looks at the first piece. The cost at a cadence
of one probe in N steps is ((tier one − plain) + (probe − tier one)/N) over the plain step.

Pieces that nobody looks into are replays of a CUDA graph. So is one that is probed, of a graph of
its own, where half of the memory is free; else, as at the default size, it runs part by part, and a
graph whose memory it needs is recorded anew. A probe pays for all that.

Gate: a probed step gives the gradients of the same parts unprobed, as closely as those repeat
themselves: in bf16 the attention backward adds in no fixed order, which 400 layers amplify.

    python benchmarks/watch_cost.py [--depth 400 --batch 26 --pieces 4] [--small] [--json FILE]

Cost: 90 seconds on one H200 with --repeats 2, at the default size (5.45 B parameters, 130 GB of GPU
memory); the file is written after each round. `mvsplit bench page` puts it into
docs/performance.md.
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
from step_parts import Size, Trainer, free, peak_gib, seconds
from torch import Tensor

from mvsplit.diagnostics.probe import CHEAP_FIELDS, FIELDS, LayerProbe
from mvsplit.diagnostics.taps import gradient_norm_tensors, read, taps_for_dit
from mvsplit.training import TrainConfig
from mvsplit.training.optimizer import clip_gradients_, global_norm
from mvsplit.training.step import add_gradients

LOOKS = 3  # until one is from a graph
TARGET = 0.03  # for the fields that a run looks at unless it is asked for all


class Bench(Trainer):
    """A network with a fixed batch; no step moves its weights, so that every step is the same."""

    def __init__(self, size: Size, depth: int, batch: int, pieces: int, device: str) -> None:
        config = TrainConfig(steps=1, batch_size=1, precision="bf16", weights="bf16")
        super().__init__(size.model(depth, writers="standard"), config, size, device)
        self.taps = taps_for_dit(self.model)
        self.parts = [self.piece(batch, seed) for seed in range(pieces)]
        self.planner.before(batch * size.tokens)

    def gradients(self, parts: list[Any], probe: LayerProbe | None = None) -> None:
        self.optimizer.zero_grad()
        add_gradients(self.model, self.config, parts, self.graphs, probe)

    def update(self, *, watched: bool) -> None:
        """One synchronisation either way: the watch's norms are read with the clip's."""
        norm = global_norm(self.groups)
        found = list(gradient_norm_tensors(self.taps).values()) if watched else []
        total, *_ = read([norm, *found])
        clip_gradients_(self.groups, total, 1.0)
        self.optimizer.step(0.0)

    def plain(self) -> None:
        self.gradients(self.parts)
        self.update(watched=False)

    def tier_one(self) -> None:
        self.gradients(self.parts)
        self.update(watched=True)

    def probe(self, fields: tuple[str, ...]) -> None:
        probe = LayerProbe(self.taps, fields=fields)
        self.gradients(self.parts, probe)
        probe.read_gradients()
        self.update(watched=True)
        probe.arrays()


def check(bench: Bench) -> tuple[float, float]:
    """Largest relative difference of a gradient buffer between two passes by parts, then between
    such a pass and a probed one."""
    first, again = bench.parts[:1], bench.parts[:1]
    hooks = [b.ffn.register_forward_hook(lambda *_: None) for b in bench.model.blocks]
    bench.gradients(first)
    wanted = [group.grads.clone() for group in bench.groups]
    bench.gradients(again)
    repeated = _difference(bench, wanted)
    for hook in hooks:
        hook.remove()
    for _ in range(LOOKS):  # the last from a graph, where it has room for one
        bench.gradients(first, LayerProbe(bench.taps, fields=FIELDS))
    return repeated, _difference(bench, wanted)


def _difference(bench: Bench, wanted: list[Tensor]) -> float:
    """Of the group that differs most, ‖g − w‖/‖w‖; in pieces, for there is no room for a copy of
    billions of gradients in fp32."""
    worst = 0.0
    for group, before in zip(bench.groups, wanted, strict=True):
        pairs = list(zip(group.grads.split(2**26), before.split(2**26), strict=True))
        apart = sum((g.double() - w.double()).square().sum().item() for g, w in pairs)
        whole = sum(w.double().square().sum().item() for _, w in pairs)
        worst = max(worst, (apart / whole) ** 0.5)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("depth", 400), ("batch", 26), ("pieces", 4), ("repeats", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--small", action="store_true", help="narrow, for a trial on a CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size = Size(64, 2, 4, 8) if args.small else Size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(size, args.depth, args.batch, args.pieces, device)
    repeated, difference = check(bench)
    print(f"gradients: repeated {repeated:.1e}, probed {difference:.1e}", flush=True)
    if not difference <= 1.5 * repeated + 1e-6:
        raise SystemExit("a probe changes the gradients; no time is taken")
    free()
    steps = {
        "plain": bench.plain,
        "tier one": bench.tier_one,
        "probe, cheap": lambda: bench.probe(CHEAP_FIELDS),
        "probe, all": lambda: bench.probe(FIELDS),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(LOOKS):  # graphs are recorded
        for step in steps.values():
            step()
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
            print(name, times[name][-1], flush=True)
        result = summary(args, bench, times, (repeated, difference))
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["share_at_cadence"]["probe, cheap"] > TARGET:
        raise SystemExit(f"the watch costs more than {TARGET:.0%}")


def shares(median: dict[str, float], cadence: int) -> tuple[float, dict[str, float]]:
    """What the first tier adds to a plain step, as a share of it, and what it adds together with a
    look every `cadence` steps, for each set of fields."""
    plain = median["plain"]
    tier = (median["tier one"] - plain) / plain
    looks = ("probe, cheap", "probe, all")
    return tier, {n: tier + (median[n] - median["tier one"]) / plain / cadence for n in looks}


def summary(
    args: argparse.Namespace,
    bench: Bench,
    times: dict[str, list[float]],
    differences: tuple[float, float],
) -> dict[str, Any]:
    """The result from the times taken so far."""
    median = {name: statistics.median(values) for name, values in times.items()}
    cadence = bench.config.probe_every
    tier, cost = shares(median, cadence)
    on_gpu = bench.device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "tokens_per_step": args.batch * args.pieces * bench.size.tokens,
        "gradient_difference": dict(zip(("repeated", "probed"), differences, strict=True)),
        "times": times,
        "seconds": median,
        "looks_from_graphs": bench.graphs.looks if bench.graphs else 0,
        "peak_gib": peak_gib(),
        "cadence": cadence,
        "tier_one_share": tier,
        "share_at_cadence": cost,
    }


if __name__ == "__main__":
    main()
