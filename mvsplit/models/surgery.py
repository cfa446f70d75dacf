"""Turns a network into an MV-Split network while it runs, with no change of what it computes.

Every post-norm rule is the merge Z = X + β⊙PF + α⊙JF − λ⊙JX with gains of its own. MV-Split with a
free leak starts from just these gains, now learned ones: a plain network from α = β = 1, λ = 0
(paper §2), LayerScale and ReZero from α = β = γ, DeepNorm from α = β = 1/k with its ε/k².

The gain can also be moved out of the writers: W ← W/g, β ← gβ, α ← gα leave β⊙PF and α⊙JF as they
are. From then on an update of W moves the branch g times as far, as it does in a network that began
with small gains. For g a power of two all of this is exact in floating point, but for underflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.models.block import Block
from mvsplit.models.dit import DiT
from mvsplit.residuals import MVSplit, PostNorm, Rule, RuleConfig, as_recorded, build_rule


def into_mvsplit(model: DiT, *, gain: float = 1.0) -> list[str]:
    """Replaces the rule of every block by MV-Split with a free leak, in place.

    What the network computes stays: bit for bit in fp32 for plain, LayerScale, ReZero, DeepNorm and
    MV-Split itself at a `gain` that is a power of two, else up to the rounding of W/g and gβ.

    Args:
        model: any of the post-norm rules that feed the trunk itself to the branch.
        gain: g, the part of β and α that is taken over from the writers W_O and W_2.

    Returns:
        The names of the parameters that are new: the gains of every branch.

    Raises:
        UserError: the rule cannot be turned into MV-Split, or `gain` is not in (0, 1]; the model
            is as it was.
    """
    check_gain(gain)
    old = [_convertible(rule, model.config.rule.name) for rule in rules(model)]
    gains = [_full_gains(rule, gain, like=model.head.weight) for rule in old]
    set_rule(model, _start_of(old[0], gains[0]))
    with torch.no_grad():
        for rule, (beta, alpha, leak) in zip(rules(model), gains, strict=True):
            new = cast(MVSplit, rule)
            new.beta.copy_(beta), new.alpha.copy_(alpha), cast(Tensor, new.leak).copy_(leak)
        for weight in writer_parameters(model):
            weight.div_(gain)
    return gain_names(model)


def check_gain(gain: float) -> None:
    """Raises UserError for a gain outside (0, 1]."""
    if not 0 < gain <= 1:
        raise UserError(f"gain={gain}: must be in (0, 1], for example 0.0625")


@torch.no_grad()
def anneal_gains(
    rules: Iterable[Rule], left: int, *, alpha: float = 0.0, leak: float = 0.0
) -> None:
    """One step of a straight way of α and λ to `alpha` and `leak`, where they arrive, to the bit,
    once `left` is 0: of the distance, left/(left + 1) remains. Does nothing below 0."""
    if left < 0:
        return
    for rule in rules:
        split = cast(MVSplit, rule)
        for gain, end in ((split.alpha, alpha), (cast(Tensor, split.leak), leak)):
            gain.lerp_(torch.full_like(gain, end), 1 / (left + 1))


def gain_names(model: DiT) -> list[str]:
    """The names of all parameters of the rules."""
    return [name for name, _ in model.named_parameters() if ".rule_" in name]


def set_rule(model: DiT, rule: RuleConfig) -> None:
    """Gives every block new modules of `rule` at their start values, on the model's device and of
    its head's dtype, and writes the rule into `model.config`. No other parameter is touched."""
    size = {"width": model.config.width, "depth": model.config.depth}
    like = model.head.weight  # matrices of blocks may be in bf16, in which a gain would not move
    for block in _blocks(model):
        for branch in ("attention", "ffn"):
            new = build_rule(rule, **size, branch=branch)
            setattr(block, f"rule_{branch}", new.to(like.device, like.dtype))
    model.config = dataclasses.replace(model.config, rule=rule)


def rules(model: DiT) -> list[Rule]:
    """The rule of every branch, in order of depth."""
    return [r for block in _blocks(model) for r in (block.rule_attention, block.rule_ffn)]


def writer_parameters(model: DiT) -> list[nn.Parameter]:
    """W_O and W_2 of every block with their biases, in order of depth: what a branch ends in."""
    return [p for b in _blocks(model) for w in (b.attention.proj, b.ffn.w2) for p in w.parameters()]


def _blocks(model: DiT) -> Iterable[Block]:
    return cast(Iterable[Block], model.blocks)


def _convertible(rule: Rule, name: str) -> PostNorm:
    if not isinstance(rule, PostNorm) or type(rule).enter is not Rule.enter:
        raise UserError(
            f"model.rule.name={name!r} cannot be turned into mvsplit: its branch does not read the "
            f"trunk as it is; choose another policy, for example rollback"
        )
    return rule


def _full_gains(rule: PostNorm, factor: float, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """β·factor, α·factor and λ as tensors [D]; a λ that is tied to α is written out."""
    beta, alpha, leak = rule.gains()
    values = (beta, alpha, alpha if leak is None else leak)
    full = [torch.as_tensor(v, dtype=like.dtype, device=like.device).detach() for v in values]
    beta, alpha, leak = (v.expand(rule.width) for v in full)
    return beta * factor, alpha * factor, leak.clone()


def _start_of(rule: PostNorm, gains: tuple[Tensor, Tensor, Tensor]) -> RuleConfig:
    """The configuration of the new rule: its kind and ε. The gains named in it are those of the
    first branch, for people to read; each branch's own are in its parameters."""
    beta, alpha, leak = (float(g.double().mean()) for g in gains)
    fields = {"beta": beta, "alpha": alpha, "tied_leak": False, "leak": leak}
    return RuleConfig(name="mvsplit", eps=rule.eps, **as_recorded(fields))
