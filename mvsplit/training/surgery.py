"""Changes the network of a run between two steps, and all that is laid out by its parameters."""

from __future__ import annotations

from typing import cast

import torch

from mvsplit.models.surgery import into_mvsplit, rules, writer_parameters
from mvsplit.residuals import MVSplit
from mvsplit.training.state import TrainState


@torch.no_grad()
def protect(state: TrainState, *, gain: float) -> None:
    """Turns the network of a run into MV-Split with a free leak; what it computes stays
    (`mvsplit.models.surgery`). The moments of all parameters that stay are carried over, in the
    units of the new writers: W ← W/g makes their gradient g times as large. The new gains begin
    with fresh moments and a bias correction of their own.

    Raises:
        UserError: the rule cannot be turned into MV-Split; the run is as it was.
    """
    moments, updates = state.optimizer.moments(), state.optimizer.updates()
    averages = {} if state.ema is None else state.ema.parameters()
    new = set(into_mvsplit(state.model, gain=gain))
    state.regroup(joined=new)
    state.optimizer.set_updates(updates | {"joined": 0})
    fresh = state.optimizer.moments()
    for name in (n for n in fresh if _parameter(n) not in new):
        fresh[name].copy_(moments[name])
    if state.ema is not None:
        for name, average in state.ema.parameters().items():
            if name not in new:
                average.copy_(averages[name])
    _rescale_writers(state, gain)


@torch.no_grad()
def anneal(state: TrainState, steps: int) -> None:
    """Takes α of a protected network one step closer to 0, where it is `steps` steps after the
    surgery; what it learns meanwhile shrinks with it. With λ = 0 the network then stands where
    MV-Split starts, with the gain β that it has. Does nothing in any other network."""
    at = state.reactions.protected_at
    if at is None or not 0 < state.step - at <= steps:
        return
    left = steps - (state.step - at)
    for rule in rules(state.model):
        cast(MVSplit, rule).alpha.mul_(left / (left + 1))


def _rescale_writers(state: TrainState, gain: float) -> None:
    """Averages and moments of the writers in the units of W/g."""
    ours = {id(p) for p in writer_parameters(state.model)}
    names = [name for name, p in state.model.named_parameters() if id(p) in ours]
    moments = state.optimizer.moments()
    averages = {} if state.ema is None else state.ema.parameters()
    for name in names:
        first = "exp_avg" if f"exp_avg.{name}" in moments else "exp_avg_scales"  # of bf16 weights
        moments[f"{first}.{name}"].mul_(gain)
        moments[f"exp_avg_sq.{name}"].mul_(gain**2)
        if name in averages:
            averages[name].div_(gain)


def _parameter(moment: str) -> str:
    return moment.partition(".")[2]
