"""The same numbers on every rank, so that all of them come to the same verdict."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, distributed

Arrays = dict[str, list[float | None]]


def is_distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return distributed.is_available() and distributed.is_initialized()


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return not is_distributed() or distributed.get_rank() == 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor of any shape over all ranks, the same bits on each; every rank has to
    call it. A value that is not finite anywhere is not finite everywhere."""
    if not is_distributed():
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def arrays_over_ranks(arrays: Arrays, fields: Collection[str], device: torch.device) -> Arrays:
    """The arrays of `LayerProbe.arrays`, each number the mean over the ranks that measured it, by
    one all-reduce; `layer` is left as it is.

    A look is of the samples of each rank. So G_mean and G_ctr are (1/R) Σ_r ‖ΔW^(r)‖ of the R
    shares ΔW^(r), and not ‖(1/R) Σ_r ΔW^(r)‖ of the whole, which is never larger: it is the same
    where the shares are alike, as those of ΔW_μ are in a collapse, and 1/√R of it where they are
    independent, as those of ΔW_c mostly are. G_mean / G_ctr is then too small by up to √R.

    Args:
        fields: those that the probe was asked for, the same on every rank; each rank may have
            measured other ones of them.
    """
    if not is_distributed():
        return arrays
    names = sorted(set(fields))
    absent: list[float | None] = [None] * len(arrays["layer"])
    columns = [arrays.get(name, absent) for name in names]
    values = [[0.0 if v is None else v for v in column] for column in columns]
    known = [[0.0 if v is None else 1.0 for v in column] for column in columns]
    sums = torch.tensor([values, known], dtype=torch.float32, device=device)  # [2, F, L]
    distributed.all_reduce(sums)
    total, count = sums.tolist()
    means = [list(map(_mean, *pair)) for pair in zip(total, count, strict=True)]
    measured = {n: m for n, m in zip(names, means, strict=True) if m != absent}
    return {"layer": arrays["layer"]} | measured


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def joined_norm(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """The L2 norm of several gradients together, from that of each; a scalar on `device`."""
    return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
