"""One block: attention joins the trunk by a rule, then the FFN joins it by a rule of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from mvsplit.kernels import Segments, backend, qk_norm_rope, swiglu
from mvsplit.kernels.attention import attend
from mvsplit.kernels.block_parts import BlockSettings, BlockWeights, Recompute
from mvsplit.kernels.cpu_block import block as cpu_block
from mvsplit.models.config import DiTConfig
from mvsplit.residuals import PostNorm, Rule, build_rule


class Attention(nn.Module):
    """Self-attention over all tokens with packed projections; padding is no key.

    `qkv` holds the rows of queries, then keys, then values; `proj` is the writer W_O.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.eps = config.heads, config.groups, config.qk_eps
        packed = (config.heads + 2 * config.groups) * config.head_width
        self.qkv = nn.Linear(config.width, packed, bias=config.attention_bias)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """x [B, T, D], tables [T, K/2] → [B, T, D]."""
        q, k, v = qk_norm_rope(self.qkv(x), cos, sin, self.heads, self.kv_heads, self.eps)
        # Padding is zero behind every merge, and behind a projection without bias.
        out = attend(q, k, v, segments, zero_padding=self.qkv.bias is None)
        return self.proj(out.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """W_2(silu(gate)⊙value): `w13` packs the gate's rows, then the value's; `w2` is the writer."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.width, 2 * config.ffn_width, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x)))


class Block(nn.Module):
    """x ← rule(x, attention(x)), then x ← rule(x, FFN(x)). [B, T, D] → [B, T, D].

    Attributes:
        recompute: what the backward of the node computes again instead of keeping it.
        recompute_parts: whether backward computes the block again where its parts run one by one.
        adds_gradients: whether the gradients of the matrices may be added to their `.grad` in
            place, around autograd: for a trainer that owns these buffers.
    """

    recompute: Recompute = "nothing"
    recompute_parts: bool = False
    adds_gradients: bool = False

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        size = {"width": config.width, "depth": config.depth}
        self.attention = Attention(config)
        self.rule_attention = build_rule(config.rule, **size, branch="attention")
        self.ffn = SwiGLU(config)
        self.rule_ffn = build_rule(config.rule, **size, branch="ffn")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        if self.runs_as_one_node(x, segments):
            return self._as_one_node(x, cos, sin, segments)
        if self.recompute_parts and torch.is_grad_enabled():
            return checkpoint(self._by_parts, x, cos, sin, segments, use_reentrant=False)
        return self._by_parts(x, cos, sin, segments)

    def _by_parts(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        f = self.attention(self.rule_attention.enter(x), cos, sin, segments)
        x = self.rule_attention.merge(x, f, segments)
        f = self.ffn(self.rule_ffn.enter(x))
        return self.rule_ffn.merge(x, f, segments)

    def runs_as_one_node(self, x: Tensor, segments: Segments) -> bool:
        """Whether the block runs as one autograd node: on a CPU (`kernels/cpu_block.py`) without
        padding or mixed precision, on a GPU (`kernels/fused/block.py`) in half precision; without
        biases, and while nobody watches or has replaced one of its parts. Its parts run one by one
        otherwise, and compute the same."""
        return (
            (_fits_the_gpu(x) if x.is_cuda else _fits_the_cpu(x, segments))
            and type(self.attention) is Attention
            and type(self.ffn) is SwiGLU
            and all(map(_is_a_plain_matrix, self._matrices()))
            and all(map(_is_just_gains, (self.rule_attention, self.rule_ffn)))
            and self.attention.heads == self.attention.kv_heads
            and not any(map(_is_watched, self._parts()))
            and not _has_any_global_hook()
            and not torch.compiler.is_compiling()
        )

    def _parts(self) -> tuple[nn.Module, ...]:
        rules = (self.rule_attention, self.rule_ffn)
        return self.attention, self.ffn, *self._matrices(), *rules

    def _matrices(self) -> tuple[nn.Linear, ...]:
        return self.attention.qkv, self.attention.proj, self.ffn.w13, self.ffn.w2

    def _as_one_node(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        rules = cast(tuple[PostNorm, PostNorm], (self.rule_attention, self.rule_ffn))
        settings = BlockSettings(
            cos,
            sin,
            segments,
            self.attention.heads,
            self.attention.eps,
            (rules[0].eps, rules[1].eps),
            self.recompute,
            self.adds_gradients,
        )
        weights = BlockWeights(*(matrix.weight for matrix in self._matrices()))
        run = _gpu_block() if x.is_cuda else cpu_block
        return run(x, weights, rules[0].gains(), rules[1].gains(), settings)


def _fits_the_cpu(x: Tensor, segments: Segments) -> bool:
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and segments.mask is None
        and not torch.is_autocast_enabled("cpu")
    )


def _fits_the_gpu(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and backend(x) == "triton"


def _gpu_block() -> Callable[..., Tensor]:
    from mvsplit.kernels.fused.block import block  # Triton is imported only where it is used

    return block


def _is_a_plain_matrix(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is None


def _is_just_gains(rule: nn.Module) -> bool:
    return (
        isinstance(rule, PostNorm)
        and type(rule).enter is Rule.enter
        and type(rule).merge is PostNorm.merge
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked onto the module, or gave this one a `forward` of its own."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
