"""Rules that the paper tried in order to see them fail."""

from __future__ import annotations

from mvsplit.kernels import Gains
from mvsplit.residuals.base import Branch, PostNorm, RuleConfig
from mvsplit.residuals.mvsplit import MVSplit
from mvsplit.residuals.rivals import Plain


class HardCenter(PostNorm):
    """X' = N(P(X + F)): every merge removes the token mean. β = 1, α = 0, λ = 1.

    Start: writers zero. Source: arXiv 2605.06169, App. J.
    """

    zero_writers = True

    def gains(self) -> Gains:
        return Gains(1.0, 0.0, 1.0)


def mvsplit_attention_only(
    config: RuleConfig, *, width: int, depth: int, branch: Branch
) -> MVSplit | Plain:
    """MV-Split after attention, the plain residual after the FFN: the spike moves to W_2.

    Source: arXiv 2605.06169, App. F.
    """
    rule = MVSplit if branch == "attention" else Plain
    return rule(config, width=width, depth=depth, branch=branch)
