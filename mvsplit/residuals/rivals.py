"""The rules that MV-Split is compared with. F is the branch, N is RMSNorm, L counts blocks.

The post-norm rules are one op, X' = N(X + β⊙PF + α⊙JF − λ⊙JX), with special gains (`PostNorm`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvsplit.kernels import Gains, Segments, rms_norm, split_merge
from mvsplit.kernels.reference import zero_padding
from mvsplit.residuals.base import Branch, PostNorm, Rule, RuleConfig


class Plain(PostNorm):
    """X' = N(X + F), the post-norm residual: β = α = 1, λ = 0.

    Start: writers zero. Source: Vaswani et al. (arXiv 1706.03762) with RMSNorm; the baseline of
    arXiv 2605.06169.
    """

    zero_writers = True

    def gains(self) -> Gains:
        return Gains(1.0, 1.0, 0)


class LayerScale(PostNorm):
    """X' = N(X + γ⊙F), γ ∈ R^D learned: β = α = γ, λ = 0.

    Start: γ = `gamma` (the paper sweeps 1e-2…1e-5), all weights standard. Source: Touvron et al.
    (arXiv 2103.17239), here on the post-norm backbone, as arXiv 2605.06169 compares it.
    """

    def __init__(self, config: RuleConfig, *, width: int, depth: int, branch: Branch) -> None:
        super().__init__(config, width=width, depth=depth, branch=branch)
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.config.gamma)

    def gains(self) -> Gains:
        return Gains(self.gamma, self.gamma, 0)


class ReZero(PostNorm):
    """X' = N(X + a·F), one learned number a for each branch: β = α = a, λ = 0.

    Start: a = 0, all weights standard. Source: Bachlechner et al. (arXiv 2003.04887), here on the
    post-norm backbone.
    """

    def __init__(self, config: RuleConfig, *, width: int, depth: int, branch: Branch) -> None:
        super().__init__(config, width=width, depth=depth, branch=branch)
        self.gain = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def gains(self) -> Gains:
        return Gains(self.gain, self.gain, 0)


class WeightedTrunk(PostNorm):
    """X' = N(kX + F), computed as N(X + F/k) with ε/k²: the same, by the op all rules share."""

    trunk_weight: float

    @property
    def eps(self) -> float:
        return self.config.eps / self.trunk_weight**2

    def gains(self) -> Gains:
        return Gains(1 / self.trunk_weight, 1 / self.trunk_weight, 0)


class DeepNorm(WeightedTrunk):
    """X' = N(kX + F), k = (2L)^{1/4}.

    Start: standard, then the value, output and FFN weights divided by (8L)^{1/4}.
    Source: Wang et al. (arXiv 2203.00555), encoder-only column of their table.
    """

    def __init__(self, config: RuleConfig, *, width: int, depth: int, branch: Branch) -> None:
        super().__init__(config, width=width, depth=depth, branch=branch)
        self.trunk_weight = (2 * depth) ** 0.25
        self.weight_scale = (8 * depth) ** -0.25


class Keel(WeightedTrunk):
    """X' = N(kX + F(N X)), k = 2L, the number of residual merges.

    Start: all weights standard. Source: arXiv 2601.19895.
    """

    def __init__(self, config: RuleConfig, *, width: int, depth: int, branch: Branch) -> None:
        super().__init__(config, width=width, depth=depth, branch=branch)
        self.trunk_weight = 2.0 * depth

    def enter(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.config.eps)


class PreNorm(Rule):
    """X' = X + F(N X); the network normalises once before its head.

    Start: all weights standard. Source: Xiong et al. (arXiv 2002.04745) with RMSNorm.
    """

    normalised = False

    def enter(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.config.eps)

    def merge(self, x: Tensor, f: Tensor, segments: Segments) -> Tensor:
        return split_merge(x, f, 1.0, 1.0, 0, segments, norm=False)


class Sandwich(PreNorm):
    """X' = X + N(F(N X)); the network normalises once before its head.

    Start: all weights standard. Source: Ding et al. (arXiv 2105.13290) with RMSNorm.
    """

    def merge(self, x: Tensor, f: Tensor, segments: Segments) -> Tensor:
        # The norm's backward would multiply padding by zero, which leaves its NaN as NaN.
        f = rms_norm(zero_padding(f, segments), self.config.eps)
        return super().merge(x, f, segments)
