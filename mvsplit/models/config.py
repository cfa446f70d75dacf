"""The shape of a DiT, and every reason why a shape is not possible."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mvsplit.errors import UserError, nearest
from mvsplit.residuals import RULES, RuleConfig


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A single-stream diffusion transformer (paper §3): no AdaLN, no timestep input.

    Attributes:
        depth: L, the number of blocks.
        width: D.
        heads: query heads; the head width D / heads must be a multiple of 4 (two rotary axes).
        kv_heads: key/value heads, a divisor of `heads`; None for as many as `heads`.
        ffn_width: F, the hidden width of SwiGLU.
        channels: C of the latents.
        patch: side of a square patch.
        text_width: width of the text states; they are projected where it differs from `width`.
        attention_bias, ffn_bias: biases on the projections (the released model has none).
        rule: the residual rule and its start values.
        writers: start of W_O and W_2: as the rule has it, zero, or standard.
        rope_theta: base of the rotary frequencies.
        qk_eps: ε of the QK-norm.
        norm_eps: ε of the norms at the input and before the head.
    """

    depth: int
    width: int
    heads: int
    ffn_width: int
    channels: int
    text_width: int
    kv_heads: int | None = None
    patch: int = 1
    attention_bias: bool = False
    ffn_bias: bool = False
    rule: RuleConfig = field(default_factory=RuleConfig)
    writers: Literal["rule", "zero", "standard"] = "rule"
    rope_theta: float = 10_000.0
    qk_eps: float = 1e-6
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "ffn_width", "channels", "text_width", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("rope_theta", "qk_eps", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)}: must be greater than 0")
        if self.width % self.heads:
            raise UserError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}; "
                f"choose heads from {_divisors(self.width)}"
            )
        if self.head_width % 4:
            raise UserError(
                f"model.width / model.heads = {self.head_width}: rotary embedding on two axes "
                f"needs a head width that is a multiple of 4"
            )
        if self.groups < 1 or self.heads % self.groups:
            raise UserError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; "
                f"choose from {_divisors(self.heads)}"
            )
        if self.rule.name not in RULES:
            raise UserError(
                f"model.rule.name={self.rule.name!r} is unknown: {nearest(self.rule.name, RULES)}"
            )
        if self.writers not in ("rule", "zero", "standard"):
            raise UserError(
                f"model.writers={self.writers!r} is unknown: choose 'rule', 'zero' or 'standard'"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def groups(self) -> int:
        """G, the key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
