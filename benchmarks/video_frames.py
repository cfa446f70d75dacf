"""How the writers' gradients grow with the frames of a clip, plain against MV-Split.

Eq. 5: ∇W = T·δ̄ȳᵀ + Σ_t δ̃_tỹ_tᵀ. Where tokens are alike, the first part grows like T and the second
like √T. Clips of 1 … 32 frames of the same scenes, the same tokens in each frame; a loss that is a
mean over the elements makes every δ_t smaller as T grows, so what is compared is the ratio of the
two parts, which that does not change, and both parts times the frames, where it is undone.

Measured by the probe on the tokens of the clip alone (`_segment_0`), in fp32: at initialisation
(step 1) and at the first steps of a training at a rate that kills the plain network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mvsplit.diagnostics.probe import LayerProbe
from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig, build_state
from mvsplit.training.step import train_step

FRAMES = (1, 2, 4, 8, 16, 32)
LOOKS = (1, 2, 4, 8, 16, 32)  # steps; the first looks at the network as it was drawn
DEPTH = 100
# width, heads, clips a step; that of a GPU is as wide as a patch has values
SIZES = {"gpu": (192, 6, 8), "cpu": (64, 2, 4)}
# name: rule, writers, whether it is trained
VARIANTS: dict[str, tuple[str, str, bool]] = {
    "plain": ("plain", "zero", True),
    "mvsplit": ("mvsplit", "zero", True),
    "plain, standard writers": ("plain", "standard", False),
}
SEGMENT = "_segment_0"  # the clip; the other is the text
FIELDS = ("tcs", "g_mean_attn", "g_ctr_attn", "g_mean_ffn", "g_ctr_ffn")


def experiment(
    variant: str, frames: int, seed: int, depth: int, device: str, size: str
) -> Experiment:
    rule, writers, trained = VARIANTS[variant]
    width, heads, clips = SIZES[size]
    model = DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        ffn_width=3 * width,
        channels=3,
        patch=8,  # 16 tokens a frame
        text_width=128,
        rule=RuleConfig(name=rule, beta=1.0),
        writers=writers,  # type: ignore[arg-type]
    )
    train = TrainConfig(
        steps=LOOKS[-1] if trained else 1,
        batch_size=clips,
        lr=1e-3,
        warmup=10,
        ema_decay=0.0,
        seed=seed,
        probe_every=0,
        device=device,
    )
    return Experiment(model=model, data=DataConfig(dataset="clips", frames=frames), train=train)


def run(
    variant: str, frames: int, seed: int, depth: int, device: str, size: str, steps: int
) -> dict[str, Any]:
    """One network's looks and losses."""
    begun = time.perf_counter()
    wanted = experiment(variant, frames, seed, depth, device, size)
    steps = min(steps, wanted.train.steps)
    state = build_state(replace(wanted, train=replace(wanted.train, steps=steps)))
    looks, losses = [], []
    for step in range(1, steps + 1):
        if step not in LOOKS:
            losses.append(train_step(state, wanted.train)["loss"])
            continue
        probe = LayerProbe(state.taps, fields=FIELDS, per_segment=True)
        line = train_step(state, wanted.train, look=probe)
        losses.append(line["loss"])
        names = ("grad_norm", "grad_query", "grad_key")
        looks.append({"step": step, **{n: line[n] for n in names}, **reduced(probe.arrays())})
    return {
        "variant": variant,
        "frames": frames,
        "seed": seed,
        "depth": depth,
        "size": size,
        "seconds": round(time.perf_counter() - begun, 1),
        "losses": [round(loss, 5) for loss in losses],
        "looks": looks,
    }


def reduced(arrays: dict[str, list[float | None]]) -> dict[str, float]:
    """Over the layers, of the clip's tokens: for gradients the root of the sum of squares over all
    layers and over the deepest quarter, for the similarity the mean over that quarter."""
    found: dict[str, float] = {}
    for field in FIELDS:
        layers = [v if v is not None else math.nan for v in arrays[field + SEGMENT]]
        deep = layers[-max(1, len(layers) // 4) :]
        if field == "tcs":
            found["tcs_deep"] = sum(deep) / len(deep)
            continue
        found[field] = math.sqrt(sum(v * v for v in layers))
        found[field + "_deep"] = math.sqrt(sum(v * v for v in deep))
    return found


def exponent(frames: list[int], values: list[float]) -> float:
    """k of the least-squares fit of values ∝ framesᵏ."""
    xs, ys = [math.log(f) for f in frames], [math.log(v) for v in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    along = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return along / sum((x - mean_x) ** 2 for x in xs)


def plan(variants: Iterable[str]) -> list[tuple[str, int]]:
    """All runs, the ends of every variant first, so that a killed job has them."""
    known = list(variants)
    order = sorted(FRAMES, key=lambda frames: -abs(math.log2(frames) - 2.4))
    return [(variant, frames) for frames in order for variant in known]
