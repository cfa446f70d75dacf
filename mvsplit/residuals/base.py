"""What a residual rule is: how a branch reads the trunk, and how its output joins it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.kernels import Gains, Segments, split_merge

Branch = Literal["attention", "ffn"]
_GAINS = ("beta", "alpha", "leak", "gamma")  # fields of a `RuleConfig`
# Each merge multiplies the trunk mean by 1 − λ: past 2 it grows and changes its sign.
_MOST_LEAK = 2.0


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Which rule a network uses, and where its gains start. A rule ignores what it does not have.

    Attributes:
        name: mvsplit, plain, layerscale, rezero, deepnorm, keel, prenorm, sandwich, or one of the
            controls mvsplit-attention-only and hard-center.
        beta: start of MV-Split's centered gain β; None for 1/√L, L the blocks of the network. The
            paper uses 1 at 400 layers and 0.03 ≈ 1/√L at 1000: presets mvsplit-400l and
            mvsplit-1000l.
        alpha: start of MV-Split's mean gain α. None for 1/√L where β is not given either, and for
            the paper's 0 where it is. Where neither is given W_O and W_2 start at standard size,
            else at zero, unless a network's configuration says otherwise. Why:
            docs/experiments/depth-bench.md.
        tied_leak: True leaks the trunk mean by λ = α, as in the paper; False learns λ apart.
        leak: start of λ where it is not tied.
        gamma: start of LayerScale's γ.
        eps: ε of the rule's norms. The released code uses 1e-5.
    """

    name: str = "mvsplit"
    beta: float | None = None
    alpha: float | None = None
    tied_leak: bool = True
    leak: float = 0.0
    gamma: float = 0.01
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in _GAINS:
            self._check_gain(name, getattr(self, name))
        leak = "alpha" if self.tied_leak else "leak"
        if (getattr(self, leak) or 0) > _MOST_LEAK:
            raise UserError(
                f"rule.{leak}={getattr(self, leak)}: must be between 0 and 2 at the start, for "
                f"each merge multiplies the mean of the trunk by 1 − {leak}; 0 or 1/√L are usual"
            )
        if not 0 < self.eps < math.inf:
            raise UserError(f"rule.eps={self.eps}: must be greater than 0, for example 1e-5")

    def _check_gain(self, name: str, value: float | None) -> None:
        if value is None and name in ("beta", "alpha"):
            return
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"rule.{name}={value!r}: must be a finite number, for example 0.05")
        if value < 0:
            raise UserError(
                f"rule.{name}={value}: must not be negative at the start; leave it out for the "
                f"default, or give a number from 0 to 1"
            )


def as_recorded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `RuleConfig` that names the gains of weights, which learned them: what no
    start may be, a gain below 0 or a λ past 2, is brought to the nearest that one may. It is there
    for people to read, for the gains themselves lie in the weights; and what turned networks into
    MV-Split wrote it as it was until starts were restricted. All else stays, to be refused."""
    leak = "alpha" if fields.get("tied_leak", True) else "leak"
    found = dict(fields)
    for name in _GAINS:
        value = found.get(name)
        most = _MOST_LEAK if name == leak else math.inf
        if isinstance(value, int | float) and math.isfinite(value) and not 0 <= value <= most:
            found[name] = 0.0 if value < 0 else most
    return found


class Rule(nn.Module):
    """A residual rule for one branch of one block; it knows nothing of the network around it.

    A block applies it twice, once for each branch:

        x = rule.merge(x, attention(rule.enter(x)), segments)

    Attributes:
        zero_writers: whether the branch's last matrix (the writer, W_O or W_2) starts at zero; of
            MV-Split only where β or α is given.
        weight_scale: factor on the initial value, output and FFN weights (1 but for DeepNorm).
        normalised: whether the trunk leaves `merge` with unit RMS; where it does not, the network
            normalises it once before its head.
    """

    zero_writers: bool = False
    weight_scale: float = 1.0
    normalised: bool = True

    def __init__(self, config: RuleConfig, *, width: int, depth: int, branch: Branch) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.depth = depth
        self.branch = branch

    def enter(self, x: Tensor) -> Tensor:
        """The branch's input: the trunk itself (post-norm). [B, T, D] → [B, T, D]."""
        return x

    def merge(self, x: Tensor, f: Tensor, segments: Segments) -> Tensor:
        """The next trunk from the trunk `x` and the branch output `f`, both [B, T, D]."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Sets the gains to their start values; called on construction and by initialisation."""


class PostNorm(Rule):
    """X' = RMSNorm(X + β⊙PF + α⊙JF − λ⊙JX): a rule of this family is no more than its gains.

    So all of them run on one op, and a comparison changes the rule and nothing else.
    """

    @property
    def eps(self) -> float:
        """ε of the norm."""
        return self.config.eps

    def gains(self) -> Gains:
        """β, α and λ of the merge."""
        raise NotImplementedError

    def merge(self, x: Tensor, f: Tensor, segments: Segments) -> Tensor:
        if x.shape[-1] != self.width:
            raise UserError(
                f"the rule was built for width={self.width}, the trunk x has {x.shape[-1]}"
            )
        return split_merge(x, f, *self.gains(), segments, self.eps)
