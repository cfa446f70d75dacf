"""The shape of a DiT, and every reason why a shape is not possible."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

from mvsplit.errors import UserError, nearest
from mvsplit.residuals import RULES, RuleConfig

Mean = Literal["clip", "frame", "sequence"]
MEANS: tuple[str, ...] = typing.get_args(Mean)


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
        patch_frames: frames of a patch of a clip; pictures need 1.
        mean: what has a mean of its own, beside the text: the whole clip, or each frame of it (of
            patches); or the sequence, clip and text together. A picture is a clip of one frame.
        text_width: width of the text states; they are projected where it differs from `width`.
        attention_bias, ffn_bias: biases on the projections (the released model has none).
        rule: the residual rule and its start values.
        writers: start of W_O and W_2: zero, standard, or as the rule has it, which for MV-Split is
            standard where neither β nor α is given and zero where one is.
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
    patch_frames: int = 1
    mean: Mean = "clip"
    attention_bias: bool = False
    ffn_bias: bool = False
    rule: RuleConfig = field(default_factory=RuleConfig)
    writers: Literal["rule", "zero", "standard"] = "rule"
    rope_theta: float = 10_000.0
    qk_eps: float = 1e-6
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("depth", "width", "heads", "ffn_width", "channels", "text_width", "patch")
        for name in (*sizes, "patch_frames"):
            _check_whole(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)}: must be at least 1")
        if self.kv_heads is not None:
            _check_whole("kv_heads", self.kv_heads)
        for name in ("rope_theta", "qk_eps", "norm_eps"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"model.{name}={getattr(self, name)!r}: must be a number")
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)}: must be greater than 0")
        if self.width % self.heads:
            raise UserError(
                f"model.width={self.width} is not divisible by model.heads={self.heads}; "
                + _choose_heads(self.width)
            )
        if self.head_width % 4:
            raise UserError(
                f"model.width / model.heads = {self.head_width}: rotary embedding on two axes "
                f"needs a multiple of 4; {_choose_heads(self.width)}"
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
        if self.mean not in MEANS:
            raise UserError(f"model.mean={self.mean!r} is unknown: {nearest(self.mean, MEANS)}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """Values of a patch of latents."""
        return self.channels * self.patch_frames * self.patch**2

    def patch_grid(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Frames, rows and columns of patches of latents of `size`, (H, W) or (F, H, W)."""
        frames, height, width = size if len(size) == 3 else (1, *size)
        return frames // self.patch_frames, height // self.patch, width // self.patch

    def check_frames(self, frames: int) -> None:
        """Raises UserError where a clip of so many frames cannot be read; a picture has one."""
        if frames < self.patch_frames:
            what = "a picture has 1" if frames == 1 else f"the clip has {frames}"
            raise UserError(
                f"model.patch_frames={self.patch_frames}: {what} frame{'s' * (frames > 1)}, fewer "
                "than a patch; take longer clips, or a smaller model.patch_frames"
            )
        if frames % self.patch_frames:
            raise UserError(
                f"model.patch_frames={self.patch_frames} does not divide the {frames} frames of "
                f"the clip; choose from {_divisors(frames)}"
            )
        if frames > self.patch_frames and self.head_width < 8:
            raise UserError(
                f"model.width / model.heads = {self.head_width}: rotary embedding on three axes "
                "needs a head width of at least 8; choose fewer heads"
            )

    @property
    def groups(self) -> int:
        """G, the key/value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        try:
            near = f", for example {max(1, round(float(value)))}"  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):  # no number at all, NaN, or infinity
            near = ""
        raise UserError(f"model.{name}={value!r}: must be a whole number{near}")


def _choose_heads(width: int) -> str:
    if width % 4:
        return "choose a width that is a multiple of 4"
    return f"choose heads from {_divisors(width // 4)}"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
