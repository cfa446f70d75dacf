"""The Fréchet distance between two clouds of features.

Shapes: N samples, D features; S pixels a side.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mvsplit.data.counter import stream_key, uniforms
from mvsplit.errors import UserError

_WIDTHS = (32, 64)  # channels of the fixed network's two layers
_KERNEL = 5


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of [N₁, D] and [N₂, D], in fp64, with the covariances
    that divide by N − 1 (Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    tr (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁^½Σ₂Σ₁^½, which is symmetric.

    Raises:
        UserError: fewer than two samples.
    """
    for cloud in (first, second):
        if len(cloud) < 2:
            raise UserError(f"a Fréchet distance needs two samples or more, there is {len(cloud)}")
    (mean_1, spread_1), (mean_2, spread_2) = _moments(first), _moments(second)
    root = _symmetric_root(spread_1)
    roots = torch.linalg.eigvalsh(root @ spread_2 @ root).clamp_min(0).sqrt()
    gap = (mean_1 - mean_2).square().sum() + spread_1.trace() + spread_2.trace()
    return float(gap - 2 * roots.sum())


def fixed_features(pictures: Tensor) -> Tensor:
    """[B, C, S, S] in [−1, 1] → [B, D]: mean and standard deviation over the picture of two layers
    of a convolutional network whose weights are random numbers, the same everywhere.

    Nothing is learned, so the distance judges edges, colours and textures, not what is shown.
    """
    x = pictures.float().cpu().clamp(-1, 1)
    found = []
    for layer, width in enumerate(_WIDTHS):
        weight = _random_weights(layer, width, x.shape[1])
        x = functional.relu(functional.conv2d(x, weight, stride=2, padding=_KERNEL // 2))
        flat = x.flatten(2)
        found += [flat.mean(2), flat.std(2)]
    return torch.cat(found, 1)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    x = features.double()
    return x.mean(0), torch.atleast_2d(torch.cov(x.T))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@cache
def _random_weights(layer: int, width: int, channels: int) -> Tensor:
    """Standard normal [width, channels, k, k], by Box and Muller's formula, over √(fan in)."""
    shape = (width, channels, _KERNEL, _KERNEL)
    count = math.prod(shape)
    draws = uniforms(stream_key("fixed features", layer), np.arange(2 * count, dtype=np.uint64))
    radius, angle = np.sqrt(-2 * np.log1p(-draws[:count])), 2 * np.pi * draws[count:]
    normal = (radius * np.cos(angle)).reshape(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(normal.astype(np.float32))
