"""Whether a network without a timestep input knows the time: a ridge probe of its states (App. H).

Shapes: N samples, T image tokens, D width, L layers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvsplit.flow import interpolate
from mvsplit.models import DiT
from mvsplit.training import Experiment, load_run
from mvsplit.training.builders import build_data

SAMPLES = 1536  # two thirds to fit, one third to score
BATCH = 128
RIDGE = 1e-6  # of the mean square of a feature

Array = NDArray[np.float64]


def read_times(run: Path, experiment: Experiment) -> dict[str, Any]:
    """How well t is read from a trained network, as R² on samples that the probe has not seen.

    Returns:
        `layers`: R² from the image-token mean that leaves each layer, with [D] features;
        `statistics`: R² from mean, spread and mean square of the noisy input alone; `shuffled`: the
        best R² over the layers when the times to fit are shuffled.
    """
    loaded = load_run(run, ema=False, device=experiment.train.device)
    examples = build_data(experiment.data).fetch(range(SAMPLES))
    draw = torch.Generator().manual_seed(0)
    times = torch.rand(SAMPLES, generator=draw)
    x1 = torch.randn(examples.latents.shape, generator=draw)
    noisy = interpolate(examples.latents, x1, times)
    states = _mean_states(loaded.model, loaded.embedder, noisy, examples.captions, experiment)
    t = times.double().numpy()
    shuffled = np.random.default_rng(0).permutation(t)
    return {
        "layers": [round(ridge_r2(x, t), 4) for x in states],
        "statistics": round(ridge_r2(input_statistics(noisy), t), 4),
        "shuffled": round(max(ridge_r2(x, shuffled) for x in states), 4),
    }


@torch.no_grad()
def _mean_states(
    model: DiT, embedder: Any, noisy: Tensor, captions: list[str], experiment: Experiment
) -> list[Array]:
    """The image-token mean after each layer, L arrays [N, D]."""
    device = next(model.parameters()).device
    patch, (height, width) = experiment.model.patch, noisy.shape[2:]
    image = (height // patch) * (width // patch)
    found: list[list[Array]] = []

    def keep(layer: int, _: nn.Module, __: Any, output: Tensor) -> None:
        found[layer].append(output[:, :image].float().mean(1).double().cpu().numpy())

    handles = []
    for layer, block in enumerate(model.blocks):
        found.append([])
        handles.append(block.register_forward_hook(partial(keep, layer)))
    low = experiment.train.precision == "bf16"
    for start in range(0, len(noisy), BATCH):
        rows = slice(start, start + BATCH)
        text, valid = embedder.encode(captions[rows])
        text = text.bfloat16() if low else text  # as in training, or the trunk would be fp32
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            model(noisy[rows].to(device), text.to(device), valid.to(device))
    for handle in handles:
        handle.remove()
    return [np.concatenate(parts) for parts in found]


def input_statistics(noisy: Tensor) -> Array:
    """Mean, standard deviation and mean square of each noisy sample. [N, C, H, W] → [N, 3]."""
    flat = noisy.flatten(1).double()
    return torch.stack((flat.mean(1), flat.std(1), flat.square().mean(1)), 1).numpy()


def ridge_r2(features: Array, target: Array) -> float:
    """R² of ridge regression with an intercept, on the last third. features [N, D], target [N]."""
    fit = 2 * len(target) // 3
    mean = features[:fit].mean(0)
    x, y = features[:fit] - mean, target[:fit] - target[:fit].mean()
    penalty = RIDGE * max(float(np.square(x).mean()), np.finfo(float).tiny) * fit
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    held_out = target[fit:]
    error = held_out - (target[:fit].mean() + (features[fit:] - mean) @ weights)
    return float(1 - np.square(error).sum() / np.square(held_out - held_out.mean()).sum())
