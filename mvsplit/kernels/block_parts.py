"""What a block that runs as one autograd node is made of, on any device."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from mvsplit.kernels.segments import Segments

# What backward computes again, each level all of those before it; `kernels/fused/block.py` has the
# bytes that are saved.
Recompute = Literal["nothing", "packed", "attention", "trunk", "all"]
RECOMPUTE: tuple[Recompute, ...] = ("nothing", "packed", "attention", "trunk", "all")


class BlockWeights(NamedTuple):
    """The four matrices of a block, without biases; as many key/value heads as heads."""

    qkv: Tensor  # [3D, D]
    proj: Tensor  # [D, D], W_O
    w13: Tensor  # [2F, D]
    w2: Tensor  # [D, F]


class BlockSettings(NamedTuple):
    """What a block needs beside tensors that learn.

    Attributes:
        cos, sin: rotary tables [T, K/2].
        segments: of the tokens.
        heads: H.
        qk_eps: ε of the norm of queries and keys.
        eps: ε of the norms after attention and after the FFN.
        recompute: what the backward computes again instead of keeping it (GPU).
        adds: whether the gradients of the matrices are added to their `.grad` in place, where that
            exists and nobody has hooked onto it, instead of being handed to autograd (GPU).
    """

    cos: Tensor
    sin: Tensor
    segments: Segments
    heads: int
    qk_eps: float
    eps: tuple[float, float]
    recompute: Recompute = "nothing"
    adds: bool = False


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether somebody waits for the gradient of a parameter to pass through autograd."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
