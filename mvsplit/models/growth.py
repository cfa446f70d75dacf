"""Growth in depth: blocks that do nothing at first are put between those that have learned.

A new block leaves the trunk as it is where its branches write nothing: W_O = W_2 = 0, or a gain of
zero. What the rule then does with the trunk alone decides whether the function stays:

| rule | a new block | the trunk after it |
|---|---|---|
| prenorm, sandwich | zero writers | the same to the bit |
| plain, layerscale | zero writers | N(X) |
| mvsplit, mvsplit-attention-only | zero writers, α = λ = 0: −α⊙JX would leak the mean | N(X) |
| rezero | a = 0 with standard writers: with both at zero neither would have a gradient | N(X) |
| hard-center | N(PX) ≠ X: the norm gives each token a length of its own, so PX ≠ X | refused |
| deepnorm, keel | k depends on the depth, so the blocks there are would change too | refused |

X has been through N already: X = Z/√(m + ε) with m = ‖Z‖²/D, so that N(X) = X·(1 − δ) with
δ = ε(1 − 1/m)/2 up to ε², at most ε/2 = 5·10⁻⁶ for m ≥ ½. From there on N changes nothing (up to
ε²): however many blocks are put in one place, the change is that of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import nn

from mvsplit.errors import UserError
from mvsplit.models.block import Block
from mvsplit.models.dit import DiT
from mvsplit.residuals import MVSplit, ReZero, Rule, RuleConfig

Where = Literal["evenly", "end"]

REFUSED = {
    "deepnorm": "its trunk weight (2L)^(1/4) depends on the depth, so the blocks there are would "
    "change what they do",
    "keel": "its trunk weight 2L depends on the depth, so the blocks there are would change what "
    "they do",
    "hard-center": "a block that writes nothing still removes the token mean, which the norm after "
    "it brings back",
}


def places(old: int, new: int, where: Where) -> list[int]:
    """Where the blocks there are stand in the deeper network: with as many new ones after each, up
    to one, or with all new ones at the end. The first stays the first.

    Raises:
        UserError: it would not be deeper.
    """
    if new <= old:
        raise UserError(f"depth={new}: the network has {old} layers already; choose more layers")
    return [i * new // old for i in range(old)] if where == "evenly" else list(range(old))


@torch.no_grad()
def grown(
    model: DiT,
    depth: int,
    *,
    where: Where = "evenly",
    rule: RuleConfig | None = None,
    generator: torch.Generator | None = None,
) -> DiT:
    """A network of `depth` blocks that computes what `model` does, as the table above says. All
    parameters are copies, but for those of new blocks, which are drawn from `generator`.

    Args:
        rule: where the gains of new blocks start, if not where those of `model` did: β ≈ 1/√L is
            a smaller one in a deeper network. It differs from the model's rule in nothing else.

    Raises:
        UserError: the rule cannot keep the function, or `depth` is not greater than that of
            `model`.
    """
    name = model.config.rule.name
    if name in REFUSED:
        raise UserError(f"model.rule.name={name!r} cannot grow in depth: {REFUSED[name]}")
    moved = places(model.config.depth, depth, where)
    like = model.head.weight
    with like.device:
        config = replace(model.config, depth=depth, rule=rule or model.config.rule)
        deeper = DiT(config, generator).to(like.dtype)
    weights, learned = dict(deeper.named_parameters()), dict(model.named_parameters())
    for name, parameter in learned.items():
        weights[moved_name(name, moved)].copy_(parameter)
    for layer in new_layers(moved, depth):
        _silence(cast(Block, deeper.blocks[layer]))
    return deeper


def new_layers(moved: Sequence[int], depth: int) -> list[int]:
    """The layers that none of the old blocks took."""
    return sorted(set(range(depth)) - set(moved))


def moved_name(name: str, moved: Sequence[int]) -> str:
    """The name of a parameter once the blocks stand where `moved` says."""
    return re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{moved[int(m[1])]}.", name)


def parameters_of_layers(model: nn.Module, layers: Sequence[int]) -> list[str]:
    """The names of all parameters of some blocks."""
    starts = tuple(f"blocks.{layer}." for layer in layers)
    return [name for name, _ in model.named_parameters() if name.startswith(starts)]


def _silence(block: Block) -> None:
    """Makes both branches of a freshly drawn block write nothing."""
    branches = ((block.rule_attention, block.attention.proj), (block.rule_ffn, block.ffn.w2))
    for rule, writer in branches:
        if isinstance(rule, ReZero):
            rule.gain.zero_()
            continue
        for parameter in writer.parameters():
            parameter.zero_()
        _close_leak(rule)


def _close_leak(rule: Rule) -> None:
    if isinstance(rule, MVSplit):
        rule.alpha.zero_()
        if rule.leak is not None:
            rule.leak.zero_()
