"""All initialisation, in one function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvsplit.models.block import Block
from mvsplit.models.config import DiTConfig


def standard_std(fan_in: int) -> float:
    """1/√(3·fan_in), the spread of PyTorch's own Linear: 0.018 at fan-in 1024."""
    return (3 * fan_in) ** -0.5


@torch.no_grad()
def initialise(model: nn.Module, config: DiTConfig, generator: torch.Generator | None) -> None:
    """Sets every parameter of a DiT. Does nothing to the values of a model on the meta device.

    | parameter | start |
    |---|---|
    | patch, text projection, Q, K, V, w13, head | N(0, 1/(3·fan_in)) |
    | writers W_O, W_2 | zero where the rule (or `writers`) says so, else N(0, 1/(3·fan_in)) |
    | V, W_O, w13, W_2 | then times the rule's `weight_scale`: (8L)^{-1/4} for DeepNorm, else 1 |
    | biases | zero |
    | gains | the rule's own start (`reset_parameters`) |

    Weights are drawn in the order of the model's modules from `generator`.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, standard_std(module.in_features), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, Block):
            module.rule_attention.reset_parameters()
            module.rule_ffn.reset_parameters()
    for module in model.modules():
        if isinstance(module, Block):
            _scale_branches(module, config)


def _scale_branches(block: Block, config: DiTConfig) -> None:
    values = config.groups * config.head_width  # rows of V, the last of the packed projection
    branches = (
        (block.rule_attention, block.attention.proj, block.attention.qkv.weight[-values:]),
        (block.rule_ffn, block.ffn.w2, block.ffn.w13.weight),
    )
    for rule, writer, inner in branches:
        zero = rule.zero_writers if config.writers == "rule" else config.writers == "zero"
        scale_(inner, rule.weight_scale)
        scale_(writer.weight, 0.0 if zero else rule.weight_scale)


def scale_(weight: Tensor, factor: float) -> None:
    """weight ← factor · weight, leaving it untouched at 1."""
    if factor != 1:
        weight.mul_(factor)
