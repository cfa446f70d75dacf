"""Changes the network of a run between two steps, and all that is laid out by its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from mvsplit.kernels.low_adamw import move_bases_
from mvsplit.models.surgery import anneal_gains, into_mvsplit, rules, writer_parameters
from mvsplit.training.carried import correction
from mvsplit.training.config import ReactionConfig
from mvsplit.training.replicas import from_holders
from mvsplit.training.spread import local
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
    averages = {} if state.ema is None else state.ema.parameters()
    new = set(into_mvsplit(state.model, gain=gain))
    moments, updates = _in_one_unit(state), state.optimizer.updates()
    state.new_layers = []  # no longer apart: the gains are
    state.regroup(joined=new)
    state.optimizer.set_updates(updates | {"joined": 0})
    fresh = state.optimizer.moments()
    _take_over({name: fresh[name] for name in fresh if _parameter(name) not in new}, moments)
    if state.ema is not None:
        fresh = state.ema.parameters()
        _take_over({name: fresh[name] for name in fresh if name not in new}, averages)
    _rescale_writers(state, gain)


def _in_one_unit(state: TrainState) -> dict[str, Tensor]:
    """The moments, those of layers that growth put in multiplied so that they may go on under the
    count of the rest."""
    optimizer = state.optimizer
    moments, counts = optimizer.moments(), optimizer.updates()
    for name, moment in moments.items() if state.new_layers else ():
        local(moment).mul_(correction(name, state.new_layers, counts, optimizer.betas))
    return moments


def _take_over(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """Copies each tensor from the one of its name, which another rank may have held until now."""
    elsewhere = from_holders(sources, targets.keys())
    for name, target in targets.items():
        target.copy_(sources[name] if name in sources else elsewhere[name])


def anneal(state: TrainState, reaction: ReactionConfig) -> None:
    """Takes α and λ of a protected network one step closer to `reaction.alpha` and `reaction.leak`,
    where they are `reaction.anneal` steps after the surgery; what they learn meanwhile shrinks with
    the distance. At α = λ = 0 the network then stands where MV-Split starts, with the gain β that
    it has. Does nothing in any other network."""
    at = state.reactions.protected_at
    if at is not None and state.step > at:
        left = reaction.anneal - (state.step - at)
        anneal_gains(rules(state.model), left, alpha=reaction.alpha, leak=reaction.leak)


def _rescale_writers(state: TrainState, gain: float) -> None:
    """Averages and moments of the writers in the units of W/g."""
    ours = {id(p) for p in writer_parameters(state.model)}
    names = [name for name, p in state.model.named_parameters() if id(p) in ours]
    moments = state.optimizer.moments()
    averages = {} if state.ema is None else state.ema.parameters()
    for name in names:
        factors = {"exp_avg": gain, "exp_avg_scales": gain, "exp_avg_sq": gain**2}
        for moment, factor in factors.items():  # scales: of bf16 weights
            if f"{moment}.{name}" in moments:  # else another rank holds it
                moments[f"{moment}.{name}"].mul_(factor)
        bases = moments.get(f"exp_avg_sq_bases.{name}")  # the same
        if bases is not None:
            move_bases_(bases, gain**2)
        if name in averages:
            averages[name].div_(gain)


def _parameter(moment: str) -> str:
    return moment.partition(".")[2]
