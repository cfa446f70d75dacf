"""Moments of parameters with different numbers of updates behind them, in the units of one number.

Adam divides a moment by 1 − dⁿ, n being the updates that it has seen. Parameters that came to a
network later (`mvsplit.training.growth`, `mvsplit.training.surgery`) are counted apart. Where they
go on in one group with the rest, under its count, their moments have to be put into its units, or
their updates would be several times too large or too small.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping


def correction(
    moment: str, new_layers: Collection[int], counts: Mapping[str, int], betas: tuple[float, float]
) -> float:
    """(1 − dⁿ) / (1 − dᵏ) for the moment of a parameter with k updates behind it among others with
    n; 1 for one that came with the rest, or has seen no update.

    Args:
        moment: its name, `exp_avg.PARAMETER` or `exp_avg_sq.PARAMETER`.
        new_layers: the layers that are counted apart; without any, the gains of the rules are, if
            anything is.
        counts: updates of each group (`AdamW.updates`).
        betas: the decay of both moments.
    """
    kind, _, parameter = moment.partition(".")
    own = counts.get("joined", counts.get("joined-decayed", 0))
    if not own or not _is_apart(parameter, new_layers):
        return 1.0
    whole, decay = counts.get("decayed", counts.get("low", 0)), betas[kind == "exp_avg_sq"]
    return (1 - decay**whole) / (1 - decay**own)


def _is_apart(parameter: str, new_layers: Collection[int]) -> bool:
    if not new_layers:
        return ".rule_" in parameter
    layer = re.match(r"blocks\.(\d+)\.", parameter)
    return layer is not None and int(layer[1]) in new_layers
