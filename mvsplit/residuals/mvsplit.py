"""MV-Split: the mean and the centered part of a branch join the trunk by gains of their own.

With J the average over the tokens of a segment and P = I − J (paper Eq. 3):

    Z = X + β⊙PF + α⊙J(F − X)          (Eq. 7)
    X' = RMSNorm(Z)                     (Eq. 8)

What differs between tokens is scaled by β. The token mean, which a plain residual lets grow by
every layer, becomes a leaky integrator: JZ = (1 − α)⊙JX + α⊙JF, PZ = PX + β⊙PF (Eq. 9). Backward,
the mean of the gradient reaches the branch through α, the rest through β:
∂L/∂F = β⊙PG + α⊙JG (Eq. 10). At α = 0 the mean-coherent writer gradient, whose growth with the
number of tokens starts a collapse (Eq. 5), is shut off; it opens only as far as α is learned.

J is over all tokens of a segment, later ones too: a causal model would see its future through it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mvsplit.kernels import Gains, Segments, split_merge
from mvsplit.residuals.base import Branch, PostNorm, RuleConfig


def starts(config: RuleConfig, depth: int) -> tuple[float, float]:
    """β and α at the start of a network of `depth` blocks."""
    root = depth**-0.5
    beta = root if config.beta is None else config.beta
    if config.alpha is not None:
        return beta, config.alpha
    return beta, root if config.beta is None else 0.0


def starts_by_default(config: RuleConfig) -> bool:
    """Whether MV-Split is given neither β nor α: it starts with β = α = 1/√L then, and with writers
    of standard size instead of zeros."""
    return config.name == "mvsplit" and config.beta is None and config.alpha is None


def written_out(config: RuleConfig, depth: int) -> RuleConfig:
    """The rule with β and α as they start in a network of `depth` blocks; None where it has none.
    Two are equal where their merges are, however they were asked for; their writers may start
    apart (`starts_by_default`)."""
    has_gains = config.name.startswith("mvsplit")
    beta, alpha = starts(config, depth) if has_gains else (None, None)
    return replace(config, beta=beta, alpha=alpha)


class MVSplit(PostNorm):
    """X' = RMSNorm(X + β⊙PF + α⊙J(F − X)), β and α ∈ R^D learned for each branch of each block.

    Start: β = α = 1/√L and writers of standard size if neither gain is given
    (docs/experiments/depth-bench.md); writers zero if one is, and α = 0 where β is, as in the paper
    (β = 1 at 400 layers, 0.03 at 1000).
    With `tied_leak=False` the trunk mean leaks by its own λ: Z = X + β⊙PF + α⊙JF − λ⊙JX. At
    α = β = 1, λ = 0 that is the plain residual, so a plain model can become an MV-Split model.
    Source: arXiv 2605.06169, Eq. 7–8.
    """

    def __init__(self, config: RuleConfig, *, width: int, depth: int, branch: Branch) -> None:
        super().__init__(config, width=width, depth=depth, branch=branch)
        self.zero_writers = not starts_by_default(config)
        self.beta = nn.Parameter(torch.empty(width))
        self.alpha = nn.Parameter(torch.empty(width))
        self.leak = None if config.tied_leak else nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        beta, alpha = starts(self.config, self.depth)
        nn.init.constant_(self.beta, beta)
        nn.init.constant_(self.alpha, alpha)
        if self.leak is not None:
            nn.init.constant_(self.leak, self.config.leak)

    def extra_repr(self) -> str:
        """Width, and where the gains start: those of now may lie on another process."""
        beta, alpha = starts(self.config, self.depth)
        leak = "" if self.leak is None else f", leak from {self.config.leak:.3g}"
        return f"width={self.beta.numel()}, beta from {beta:.3g}, alpha from {alpha:.3g}{leak}"

    def gains(self) -> Gains:
        return Gains(self.beta, self.alpha, self.leak)  # a leak of None is tied to α


class UnnormedMVSplit(MVSplit):
    """X' = X + β⊙PF + α⊙JF − λ⊙JX, Eq. 7 with no norm behind it: for the joins of a network that
    is not ours and normalises its trunk itself, in front of the branches or after the merge.
    """

    normalised = False

    def merge(self, x: Tensor, f: Tensor, segments: Segments) -> Tensor:
        return split_merge(x, f, *self.gains(), segments, norm=False)
