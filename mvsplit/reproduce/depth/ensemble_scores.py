"""What the members of an ensemble come to: validation losses, and scores of what they draw.

Shapes: E members, N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvsplit.data import Embedder
from mvsplit.evaluation.held_out import questions
from mvsplit.reproduce.depth.ensemble import Ensemble
from mvsplit.reproduce.depth.plan import BenchSize
from mvsplit.reproduce.depth.run import draw, held_out_shapes, six_digits, task_scores


@torch.no_grad()
def score(ensemble: Ensemble, embedder: Embedder, size: BenchSize) -> list[dict[str, Any]]:
    """Of each member what `run.score` says of a network that was trained alone, at the same
    samples, noise, times and prompts. The gains become numbers of the run's precision, as all
    parameters do there."""
    ensemble.refresh()
    ensemble.gains.copy_(ensemble.gains.to(ensemble.dtype))
    by_time = _losses(ensemble, embedder, size)
    prompts = [scene.caption for scene in held_out_shapes(size.pictures).scenes]
    pictures = draw_each(ensemble, embedder, prompts, size.drawing)
    return [
        {
            "validation_loss": six_digits(losses.mean()),
            "by_time": [six_digits(v) for v in losses],
            "tasks": task_scores(drawn),
        }
        for losses, drawn in zip(by_time, pictures, strict=True)
    ]


def _losses(ensemble: Ensemble, embedder: Embedder, size: BenchSize) -> Tensor:
    """[E, 10] in fp64: of each part of the times."""
    found = []
    asked = questions(
        embedder,
        held_out_shapes(size.pictures).shapes,
        [*range(size.validation)],
        device=ensemble.device,
        dtype=ensemble.dtype,
    )
    for question in asked:
        shared = (question.noisy, question.text, question.valid)
        velocity = ensemble.forward(*(t.expand(len(ensemble), *t.shape) for t in shared))
        errors = velocity.to(question.data.dtype) - (question.data - question.noise)
        found.append(errors.square().flatten(1).mean(1, dtype=torch.float64).cpu())
    return torch.stack(found, 1)


def draw_each(ensemble: Ensemble, embedder: Embedder, prompts: Sequence[str], steps: int) -> Tensor:
    """Pictures [E, N, 3, 32, 32] of each member, as `run.draw` has them of one network."""
    members, count = len(ensemble), len(prompts)

    def network(noisy: Tensor, text: Tensor, valid: Tensor | None) -> Tensor:
        """All members and prompts as one batch [2·E·N], of which the first half is unguided."""
        assert valid is not None
        parts = (t.unflatten(0, (2, members, count)) for t in (noisy, text, valid))
        velocity = ensemble.forward(*(p.transpose(0, 1).flatten(1, 2) for p in parts))
        return velocity.unflatten(1, (2, count)).transpose(0, 1).flatten(0, 2)

    like = ensemble.values.new_empty(0, dtype=ensemble.dtype)
    each = draw(network, embedder, prompts, steps, like=like, copies=members)
    return each.unflatten(0, (members, count))
