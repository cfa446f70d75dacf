"""Residual rules behind two methods, `enter` and `merge`; they fit anybody's transformer.

MV-Split and its controls average over the tokens of a segment, so that a later token reaches an
earlier one through the merge: they are not for causal (autoregressive) models as they are. A prefix
with full attention may be a segment; tokens that are predicted one by one may not. The other rules
work on each token alone.
"""

from collections.abc import Callable
from typing import get_args

from mvsplit.errors import UserError, nearest
from mvsplit.residuals.base import Branch, PostNorm, Rule, RuleConfig, as_recorded
from mvsplit.residuals.controls import HardCenter, mvsplit_attention_only
from mvsplit.residuals.mvsplit import MVSplit, UnnormedMVSplit
from mvsplit.residuals.rivals import (
    DeepNorm,
    Keel,
    LayerScale,
    Plain,
    PreNorm,
    ReZero,
    Sandwich,
)

RULES: dict[str, Callable[..., Rule]] = {
    "plain": Plain,
    "mvsplit": MVSplit,
    "layerscale": LayerScale,
    "rezero": ReZero,
    "deepnorm": DeepNorm,
    "keel": Keel,
    "prenorm": PreNorm,
    "sandwich": Sandwich,
    "mvsplit-attention-only": mvsplit_attention_only,
    "hard-center": HardCenter,
}


def build_rule(config: RuleConfig | str, *, width: int, depth: int, branch: Branch) -> Rule:
    """The rule of one branch of one block.

    Args:
        config: which rule and where its gains start, or just a name of the registry.
        width: D.
        depth: L, the blocks of the whole network.
        branch: "attention" or "ffn".

    Raises:
        UserError: the name is not in the registry, there is no such branch, or a size is below 1.
    """
    config = RuleConfig(name=config) if isinstance(config, str) else config
    if config.name not in RULES:
        raise UserError(f"rule.name={config.name!r} is unknown: {nearest(config.name, RULES)}")
    if branch not in get_args(Branch):
        raise UserError(f"branch={branch!r} is unknown: {nearest(branch, get_args(Branch))}")
    for size, value in (("width", width), ("depth", depth)):
        if value < 1:
            raise UserError(f"{size}={value}: must be at least 1")
    return RULES[config.name](config, width=width, depth=depth, branch=branch)


__all__ = [
    "RULES",
    "Branch",
    "DeepNorm",
    "HardCenter",
    "Keel",
    "LayerScale",
    "MVSplit",
    "Plain",
    "PostNorm",
    "PreNorm",
    "ReZero",
    "Rule",
    "RuleConfig",
    "Sandwich",
    "UnnormedMVSplit",
    "as_recorded",
    "build_rule",
]
